"""The parts and settings of a pipeline at the moment when a call begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from nova_video.autoencoders import adapt, find_layout, unscale_latents
from nova_video.common.errors import InputError
from nova_video.common.fast_parts import find_fast
from nova_video.common.timeline import Timeline
from nova_video.model import NOVATransformer3DModel
from nova_video.pipeline.engines import Engines
from nova_video.pipeline.offload import execution_device, is_offloaded, takes_turns
from nova_video.pipeline.plan import Capabilities, Plan
from nova_video.pipeline.settings import CheckpointSettings
from nova_video.sampling.engine import Engine
from nova_video.sampling.schedulers import TrainedNoise, check_scheduler, request_scheduler
from nova_video.sampling.stopwatch import Stopwatch
from nova_video.text.load import NamedTextEncoder


@dataclass(frozen=True, eq=False)
class Parts:
    """A pipeline's parts, as its calls, saved files and records need them."""

    transformer: NOVATransformer3DModel
    scheduler: Any
    vae: Any | None
    text_encoder: Any | None
    tokenizer: Any | None
    named_encoder: NamedTextEncoder
    """The text encoder that the settings name, for checkpoints without one."""
    settings: CheckpointSettings
    engines: Engines
    name: str | None = None
    """Folder or hub id that the parts were opened from."""
    stopwatch: Stopwatch | None = None
    """Times the call by its parts."""

    @property
    def device(self) -> torch.device:
        """Where calls compute: under CPU offload not where the weights are."""
        return execution_device(self.transformer)

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @property
    def is_offloaded(self) -> bool:
        """True if parts take turns on the device."""
        return is_offloaded(self.transformer, self.vae)

    @property
    def capabilities(self) -> Capabilities:
        """The abilities of the checkpoint, against which requests are checked."""
        config = self.transformer.config
        video = self.transformer.has_motion
        stride = (4 if video else 1) if self.vae is None else find_layout(self.vae).temporal_stride
        return Capabilities(
            image_size=(config.image_size[0], config.image_size[1]),
            image_stride=config.image_stride,
            size_multiple=self.transformer.size_multiple,
            any_size=config.rotary_pos_embed,
            video=video,
            temporal_stride=stride,
            text_dim=config.text_token_dim,
            text_len=config.text_token_len,
            shiftable=self.trained_noise.is_flow,
            max_diffusion_steps=self.scheduler.config.num_train_timesteps,
            latent_channels=config.image_dim,
            layers=len(self.transformer.video_encoder.blocks),
            width=self.transformer.width,
            value_bytes=self.transformer.dtype.itemsize,
            second_order=isinstance(self.scheduler, DDPMScheduler | FlowMatchEulerDiscreteScheduler),
        )

    @property
    def trained_noise(self) -> TrainedNoise:
        """The noise schedule that the weights were trained with, whatever scheduler is there now."""
        assert self.settings.noise is not None  # set with the settings
        return self.settings.noise

    def request_scheduler(self, flow_shift: float | None) -> Any:
        """The scheduler for one request; InputError if it does not fit what the weights were trained with."""
        check_scheduler(self.scheduler, self.trained_noise)
        return request_scheduler(self.scheduler, flow_shift if self.trained_noise.is_flow else None)

    def engine(self, compile: bool, fp8: bool) -> Engine:
        """How the sets of the call are computed."""
        return self.engines.engine(self.transformer, compile, fp8, self.is_offloaded)

    def unknown_words(self, prompts: Sequence[Timeline[str]], negatives: Sequence[str], plan: Plan) -> tuple[str, ...]:
        """Words of prompts that the checkpoint's vocabulary lacks, one line each, if it has one."""
        if self.settings.vocabulary is None:
            return ()
        texts = [text for timeline in prompts for text in timeline.values]
        return self.settings.vocabulary.check(texts, negatives, picture=plan.num_frames == 1)

    def require_vae(self, what: str) -> Any:
        """The autoencoder; InputError if there is none."""
        if self.vae is None:
            raise InputError(
                f"the checkpoint has no vae/, which {what} needs: expected output_type 'latent' and no image"
            )
        return self.vae

    def decode_picture(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) of one frame by itself -> pixels (B, 3, H, W) in [-1, 1]."""
        vae = adapt(self.require_vae("decoding"))
        return vae.decode(unscale_latents(self.vae, latents.to(vae.dtype)).unsqueeze(2))[:, :, 0]

    def decoding_vae(self, compile: bool) -> Any:
        """The autoencoder; with its fast decoder on a GPU unless `compile` is off, and where parts take turns."""
        vae = self.require_vae("decoding")
        if not (takes_turns(vae) or (compile and self.device.type == "cuda" and not self.is_offloaded)):
            return vae
        fast = find_fast("autoencoder")
        return vae if fast is None else fast.arrange_autoencoder(vae)
