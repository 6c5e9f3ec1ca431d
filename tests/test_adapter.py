"""Diffusers' own autoencoders behind the adapter: shapes there and back, scales as they are meant, refusals by name."""

from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLAllegro,
    AutoencoderKLCogVideoX,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    ModelMixin,
)

from nova_video.autoencoders import LatentLayout, StreamDecoder, adapt, find_layout, scale_latents, unscale_latents
from nova_video.common.errors import InputError
from nova_video.pipeline.loading import load_autoencoder, outline_autoencoder


def make_wan() -> ModelMixin:
    return AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.5] * 4, latents_std=[2.0] * 4
    )


def make_ltx() -> ModelMixin:
    sizes, layers = (8, 8, 8, 8), (1, 1, 1, 1, 1)
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=sizes,
        decoder_block_out_channels=sizes,
        layers_per_block=layers,
        decoder_layers_per_block=layers,
    )
    vae.latents_mean.fill_(0.5)
    vae.latents_std.fill_(2.0)
    return vae


def make_cog() -> ModelMixin:
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4, scaling_factor=0.7
    )


def make_hunyuan() -> ModelMixin:
    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )


def make_dc(channels: int = 3) -> ModelMixin:
    blocks, sizes, scales, layers = ("ResBlock",) * 3 + ("EfficientViTBlock",), (8,) * 4, ((), (), (), (5,)), (1,) * 4
    return AutoencoderDC(
        in_channels=channels,
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=sizes,
        decoder_block_out_channels=sizes,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
    )


LAYOUTS: list[tuple[Callable[[], ModelMixin], LatentLayout]] = [
    (make_wan, LatentLayout(4, 8, 4, True)),
    (make_ltx, LatentLayout(4, 32, 8, True)),
    (make_cog, LatentLayout(4, 8, 4, True)),
    (make_hunyuan, LatentLayout(4, 8, 4, True)),
    (make_dc, LatentLayout(4, 8, 1, False)),
]


@pytest.mark.parametrize(("make", "layout"), LAYOUTS, ids=lambda value: getattr(value, "__name__", ""))
def test_clips_go_there_and_back_through_a_saved_autoencoder(
    make: Callable[[], ModelMixin], layout: LatentLayout, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    made = make().eval()
    made.save_pretrained(tmp_path / "vae")
    assert find_layout(outline_autoencoder(tmp_path / "vae")) == layout
    vae = load_autoencoder(tmp_path)
    adapter = adapt(vae)
    frames = 1 if layout.temporal_stride == 1 else 17
    clip = torch.rand(2, 3, frames, 64, 64) * 2 - 1
    with torch.no_grad():
        posterior = adapter.encode(clip)
        side, count = 64 // layout.spatial_stride, (frames - 1) // layout.temporal_stride + 1
        assert posterior.parameters.shape == (2, 8, count, side, side)
        pixels = adapter.decode(posterior.mean)
        assert pixels.shape == clip.shape
        own = made.encode(clip if layout.has_time else clip[:, :, 0])
        expected = own.latent_dist.mean if layout.has_time else own.latent.unsqueeze(2)
        torch.testing.assert_close(posterior.mean, expected)
        assert bool(posterior.std.max() < 1e-6) is not layout.has_time  # AutoencoderDC gives latents without noise
        assert adapter.encode(clip[:, :, :1]).mean.shape == (2, 4, 1, side, side)
        decoder = StreamDecoder(vae)
        pieces = [piece for latent in posterior.mean.unbind(2) for piece in decoder.push(latent)]
        pieces += decoder.finish()
    torch.testing.assert_close(torch.cat(pieces, dim=2), pixels)  # whole clips are decoded when they are complete


def test_latents_are_scaled_as_each_class_means_it() -> None:
    latents = torch.randn(1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    for make, expected in (
        (make_wan, (latents - 0.5) / 2),  # from the config, without a factor
        (make_ltx, (latents - 0.5) / 2),  # from buffers
        (make_cog, latents * 0.7),
        (make_hunyuan, latents * 0.476986),
    ):
        vae = make()
        torch.testing.assert_close(scale_latents(vae, latents), expected)
        torch.testing.assert_close(unscale_latents(vae, expected), latents)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (AutoencoderKLTemporalDecoder, "AutoencoderKLTemporalDecoder encodes no RGB picture"),
        (AutoencoderKLAllegro, "AutoencoderKLAllegro encodes no RGB picture: Encoding without tiling"),
        (AutoencoderKLMochi, "AutoencoderKLMochi turns 17 frames into 3 latent frames"),
        (AutoencoderKLFlux2, "AutoencoderKLFlux2 has no scale of its latents"),
        (lambda: make_dc(4), "AutoencoderDC .*picture"),
    ],
    ids=["svd", "allegro", "mochi", "flux2", "four channels"],
)
def test_what_cannot_work_is_refused_by_name(make: Callable[[], ModelMixin], message: str) -> None:
    with torch.device("meta"):
        vae = make()
    with pytest.raises(InputError, match=message):
        find_layout(vae)


def test_clips_do_not_go_into_an_autoencoder_of_pictures() -> None:
    with pytest.raises(InputError, match="AutoencoderDC takes pictures: expected clips of 1 frame, got 5"):
        adapt(make_dc()).encode(torch.zeros(1, 3, 5, 32, 32))


class OwnAutoencoder:
    """Blocks of 16x16 pixels, by their mean; four frames to a latent frame."""

    latent_channels, spatial_stride, temporal_stride = 3, 16, 4
    scaling_factor = 2.0

    def encode(self, clip: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool3d(clip[:, :, ::4], (1, 16, 16))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        frames = torch.cat([latents[:, :, :1], latents[:, :, 1:].repeat_interleave(4, 2)], dim=2)
        return frames.repeat_interleave(16, 3).repeat_interleave(16, 4)


def test_an_own_object_is_an_autoencoder() -> None:
    adapter = adapt(OwnAutoencoder())
    assert adapter.layout == LatentLayout(3, 16, 4, True)
    assert (adapter.dtype, adapter.device) == (torch.float32, torch.device("cpu"))
    clip = torch.full((1, 3, 5, 32, 32), 0.25)
    latents = adapter.encode(clip).mean
    assert latents.shape == (1, 3, 2, 2, 2)
    torch.testing.assert_close(scale_latents(adapter.vae, latents), torch.full_like(latents, 0.5))
    torch.testing.assert_close(adapter.decode(latents), clip)
    adapter.vae.spatial_stride = 0
    with pytest.raises(InputError, match=r"OwnAutoencoder.spatial_stride is 0: expected a whole number of 1 or more"):
        adapt(adapter.vae)


@pytest.mark.slow
def test_every_image_and_video_autoencoder_is_adapted_or_refused() -> None:
    """A new class of the library is either known by its shapes or an InputError; nothing else escapes."""
    adapted = set()
    for name in dir(diffusers):
        cls = getattr(diffusers, name, None) if name.startswith("AutoencoderKL") else None
        if not isinstance(cls, type):
            continue
        try:
            with torch.device("meta"):
                vae = cls()
        except TypeError:  # it has no default config
            continue
        try:
            find_layout(vae)
        except InputError:
            continue
        adapted.add(name)
    assert {"AutoencoderKL", "AutoencoderKLWan", "AutoencoderKLLTXVideo", "AutoencoderKLCogVideoX"} <= adapted
    assert {"AutoencoderKLHunyuanVideo", "AutoencoderKLQwenImage", "AutoencoderKLMagvit"} <= adapted
