"""The measured models: the released sizes with random weights, or any checkpoint.

Speed does not depend on the values of the weights, so that nothing has to be downloaded: each size is built on its
device from a seed. Layers that training starts at zero are made random too, since a GPU multiplies zeros faster.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from torch import nn

from nova_video.autoencoders import AutoencoderKLOpenSora
from nova_video.common.errors import InputError
from nova_video.model import NOVATransformer3DModel
from nova_video.pipeline.pipeline import NovaPipeline
from nova_video.pipeline.settings import CheckpointSettings, Defaults
from nova_video.sampling.schedulers import new_scheduler

SEED = 0
TEXT_DIM, TEXT_LEN = 2560, 256  # Phi-2's


@dataclass(frozen=True)
class Size:
    """A released model: its network and what it makes."""

    image_size: tuple[int, int]
    """Height and width in pixels."""
    width: int
    """Width of both encoders."""
    denoiser: str
    """Its `arch` entry."""
    num_frames: int = 1
    """Pixel frames; more than one: a model of video."""
    scaling_factor: float = 0.13025
    """Scaling factor of the image autoencoder's latents."""
    scheduler: Literal["flow", "ddpm"] = "flow"
    """Its noise schedule; that of 512 px by the size of the released file."""


SIZES = {
    "t2i-512-0.6b": Size((512, 512), 1024, "mlp_d6w1024", scaling_factor=0.18215, scheduler="ddpm"),
    "t2i-1024-0.3b": Size((1024, 1024), 768, "mlp_d6w768"),
    "t2i-1024-0.6b": Size((1024, 1024), 1024, "mlp_d6w1024"),
    "t2i-1024-1.4b": Size((1024, 1024), 1536, "mlp_d6w1536"),
    "t2v-480-0.6b": Size((480, 768), 1024, "mlp_d3w1280", num_frames=33, scheduler="ddpm"),
}
BATCHES = {  # samples of a training step on one device
    "t2i-512-0.6b": 16,
    "t2i-1024-0.3b": 8,
    "t2i-1024-0.6b": 8,
    "t2i-1024-1.4b": 8,
    "t2v-480-0.6b": 3,
}
LOSS_REPEAT = 4  # in training


def resize_model(size: Size, height: int, width: int) -> Size:
    """This model for another size in pixels, with position tables for that size."""
    if height % 32 or width % 32 or min(height, width) < 32:
        raise InputError(f"size is {width}x{height}: expected width and height in multiples of 32")
    return replace(size, image_size=(height, width))


def build(size: Size, device: torch.device, dtype: torch.dtype) -> NovaPipeline:
    """A pipeline of this size, without a text encoder. On the device "meta" it has shapes alone."""
    rows, columns = (side // 16 for side in size.image_size)  # tokens of the spatial encoder; the temporal has half
    video = size.num_frames > 1
    torch.manual_seed(SEED)
    with device:
        transformer = NOVATransformer3DModel(
            image_size=size.image_size,
            text_token_dim=TEXT_DIM,
            text_token_len=TEXT_LEN,
            image_base_size=(rows, columns),
            video_base_size=(16 if video else 1, rows // 2, columns // 2),
            video_mixer_rank=24 if video else None,
            arch=(f"vit_d16w{size.width}", f"vit_d32w{size.width}", size.denoiser),
        )
        vae = AutoencoderKLOpenSora() if video else image_autoencoder(size)
        fill_zeros(transformer)
    settings = CheckpointSettings(defaults=Defaults(num_frames=size.num_frames))
    for part in (transformer, vae):
        nn.Module.to(part, dtype)  # diffusers' own warns of layers to be kept in float32, of which there are none
    return NovaPipeline(transformer.eval(), new_scheduler(size.scheduler), vae.eval(), settings=settings)


def image_autoencoder(size: Size) -> Any:
    """The network of Stable Diffusion's and SDXL's autoencoder: both have the same."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=max(size.image_size),
        scaling_factor=size.scaling_factor,
        force_upcast=False,
    )


@torch.no_grad()
def fill_zeros(model: nn.Module) -> None:
    """Weights that start at zero, made random; biases stay."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not (module.weight.is_meta or module.weight.any()):
            nn.init.normal_(module.weight, std=0.02)
