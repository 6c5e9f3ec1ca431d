"""One interface to every autoencoder: ours, those of diffusers, and users' own.

`adapt(vae)` knows an autoencoder's channels and strides, encodes clips (B, 3, T, H, W) and decodes latents
(B, C, F, h, w), also where the autoencoder itself takes pictures (B, 3, H, W) alone. The strides of a diffusers class
are found by a trial of its config on the meta device, which computes shapes and no numbers.
Axes: B batch, T pixel frames, H W pixels, C latent channels, F latent frames, h w latent grid.
"""

import functools
import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from nova_video.autoencoders.base import VideoAutoencoder
from nova_video.autoencoders.latents import has_scale
from nova_video.common.errors import InputError, first_line

TRIAL_FRAMES, TRIAL_SIDE = 17, 256  # multiples of every usual stride, plus the first frame
CERTAIN = -30.0  # logarithm of the variance of latents without noise: the least that a posterior keeps
OWN_ATTRIBUTES = ("latent_channels", "spatial_stride", "temporal_stride")


@dataclass(frozen=True)
class LatentLayout:
    """How latents relate to pixels: a clip has temporal_stride * (F - 1) + 1 frames."""

    channels: int
    spatial_stride: int
    temporal_stride: int
    """1: the autoencoder takes pictures alone."""
    has_time: bool
    """True if tensors have an axis of frames, also those of a picture."""


def find_layout(vae: Any) -> LatentLayout:
    """The layout of an autoencoder's latents. Raises InputError for an autoencoder that cannot work here."""
    vae = getattr(vae, "_orig_mod", vae)  # torch.compile wraps it
    if isinstance(vae, VideoAutoencoder):
        return LatentLayout(vae.config.latent_channels, vae.spatial_stride, vae.temporal_stride, True)
    if isinstance(vae, ModelMixin):
        return _try_layout(vae.__class__, vae.to_json_string())
    channels, spatial, temporal = (_own_number(vae, name) for name in OWN_ATTRIBUTES)
    return LatentLayout(channels, spatial, temporal, True)


def _own_number(vae: Any, name: str) -> int:
    """An attribute that a user's own object declares."""
    value = getattr(vae, name, None)
    if not isinstance(value, int) or value < 1:
        raise InputError(f"{type(vae).__name__}.{name} is {value!r}: expected a whole number of 1 or more")
    return value


@functools.cache
def _try_layout(cls: Any, config: str) -> LatentLayout:
    """The layout of a diffusers class with that config, from shapes alone."""
    name = cls.__name__
    try:
        with torch.device("meta"):
            vae = cls.from_config(json.loads(config)).eval()
        picture = _try_clip(vae, 1)
    except Exception as error:  # libraries raise many kinds
        raise InputError(f"{name} encodes no RGB picture: {first_line(error)}") from None
    if not has_scale(vae):
        raise InputError(f"{name} has no scale of its latents: expected scaling_factor or latents_mean in its config")
    channels, frames, height, width = picture.latents
    stride = TRIAL_SIDE // height
    fits = (frames, height * stride, width * stride) == (1, TRIAL_SIDE, TRIAL_SIDE)
    if not fits or picture.pixels != (3, 1, TRIAL_SIDE, TRIAL_SIDE):
        raise InputError(
            f"{name} turns a picture of {TRIAL_SIDE}x{TRIAL_SIDE} into latents {picture.latents} and pixels"
            f" {picture.pixels}: expected one latent frame of that picture, and the picture back"
        )
    if not picture.has_time:
        return LatentLayout(channels, stride, 1, False)
    try:
        clip = _try_clip(vae, TRIAL_FRAMES)
    except Exception as error:  # as above
        raise InputError(f"{name} encodes no clip of {TRIAL_FRAMES} frames: {first_line(error)}") from None
    temporal = (TRIAL_FRAMES - 1) // max(1, clip.latents[1] - 1)
    if temporal * (clip.latents[1] - 1) + 1 != TRIAL_FRAMES or clip.pixels[1] != TRIAL_FRAMES:
        raise InputError(
            f"{name} turns {TRIAL_FRAMES} frames into {clip.latents[1]} latent frames and {clip.pixels[1]} frames:"
            " expected a causal autoencoder, one latent frame for the first frame and one for each s that follow"
        )
    return LatentLayout(channels, stride, temporal, True)


@dataclass(frozen=True)
class _Trial:
    """Shapes without the batch: latents (C, F, h, w) and pixels (3, T, H, W)."""

    latents: tuple[int, ...]
    pixels: tuple[int, ...]
    has_time: bool


@torch.no_grad()
def _try_clip(vae: Any, frames: int) -> _Trial:
    """Encode and decode zeros: as a clip, or a single frame as a picture where the autoencoder knows no clips."""
    clip = torch.zeros(1, 3, frames, TRIAL_SIDE, TRIAL_SIDE, device="meta")
    try:
        latents, has_time = _posterior(vae.encode(clip)).mean, True
    except Exception:  # of a layer that takes pictures, of whatever kind
        if frames > 1:
            raise
        latents, has_time = _posterior(vae.encode(clip[:, :, 0])).mean.unsqueeze(2), False
    pixels = _sample(vae.decode(latents if has_time else latents[:, :, 0]))
    pixels = pixels if has_time else pixels.unsqueeze(2)
    return _Trial(tuple(latents.shape[1:]), tuple(pixels.shape[1:]), has_time)


class AutoencoderAdapter:
    """An autoencoder of any class, as the pipeline and the datasets use it. It holds no weights of its own."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.layout = find_layout(vae)
        self._plain = getattr(vae, "_orig_mod", vae)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights; float32 where there are none."""
        dtype: torch.dtype = getattr(self.vae, "dtype", None) or self._weight().dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(getattr(self.vae, "device", None) or self._weight().device)

    def _weight(self) -> Tensor:
        parameters = self.vae.parameters() if isinstance(self.vae, nn.Module) else iter(())
        return next(parameters, torch.empty(0))

    def encode(self, clip: Tensor) -> DiagonalGaussianDistribution:
        """Pixels (B, 3, T, H, W) in [-1, 1] -> the posterior of unscaled latents (B, C, F, h, w)."""
        if clip.shape[2] > 1 and self.layout.temporal_stride == 1:
            raise InputError(
                f"the autoencoder {type(self._plain).__name__} takes pictures: expected clips of 1 frame, got"
                f" {clip.shape[2]}"
            )
        if self.layout.has_time:
            return _posterior(self.vae.encode(clip))
        parameters = _posterior(self.vae.encode(clip[:, :, 0])).parameters
        return DiagonalGaussianDistribution(parameters.unsqueeze(2))

    def decode(self, latents: Tensor, context: int = 0) -> Tensor:
        """Unscaled latents (B, C, F, h, w) -> pixels (B, 3, T, H, W) in about [-1, 1].

        `context` is that of `VideoAutoencoder.decode`; other classes decode whole clips and single pictures without.
        """
        if isinstance(self._plain, VideoAutoencoder):
            return _sample(self.vae.decode(latents, context=context))
        if context:
            name = type(self._plain).__name__
            raise InputError(f"context is {context}: expected 0, since {name} decodes whole clips")
        if self.layout.has_time:
            return _sample(self.vae.decode(latents))
        pictures = [_sample(self.vae.decode(frame)) for frame in latents.unbind(2)]
        return torch.stack(pictures, dim=2)

    @property
    def decode_context(self) -> int:
        """Latent frames that must stand before a piece of a clip: see `VideoAutoencoder.decode_context`."""
        return self._plain.decode_context if isinstance(self._plain, VideoAutoencoder) else 0

    @property
    def decodes_whole_clips(self) -> bool:
        """True if no pixels are final before the clip's last latent frame is there."""
        return self.layout.temporal_stride > 1 and not isinstance(self._plain, VideoAutoencoder)

    def decode_piece(self, decoded: int) -> int:
        """How many of the latent frames after the first `decoded` ones become pixels together."""
        if isinstance(self._plain, VideoAutoencoder):
            return self._plain.decode_piece(decoded)
        return sys.maxsize if self.decodes_whole_clips else 1


def adapt(vae: Any) -> AutoencoderAdapter:
    """The adapter of an autoencoder, or the one that is given."""
    return vae if isinstance(vae, AutoencoderAdapter) else AutoencoderAdapter(vae)


def _posterior(output: Any) -> DiagonalGaussianDistribution:
    """The distribution of the latents: exact where the autoencoder gives latents instead of a distribution."""
    found = getattr(output, "latent_dist", None)
    if found is not None:
        posterior: DiagonalGaussianDistribution = found
        return posterior
    latents = output
    for name in ("latent", "latents"):
        latents = getattr(output, name, latents)
    return DiagonalGaussianDistribution(torch.cat([latents, torch.full_like(latents, CERTAIN)], dim=1))


def _sample(output: Any) -> Tensor:
    """The pixels of a decoder's output, which diffusers wraps."""
    pixels: Tensor = getattr(output, "sample", output)
    return pixels
