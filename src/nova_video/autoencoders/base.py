"""The base of video autoencoders: checks of shapes, pictures as clips of one frame, slicing, tiling.

A subclass says how a whole clip becomes moments and how latents become pixels; this file does the rest, so that both
autoencoders meet the pipeline and the trainer through the same `encode` and `decode`. Nothing about a call is kept.
Axes: B batch, T pixel frames, H W pixels, C latent channels, F latent frames, h w latent grid.
"""

from functools import partial

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from nova_video.autoencoders.tiling import map_tiles
from nova_video.common.errors import InputError


class VideoAutoencoder(ModelMixin, ConfigMixin):
    """Pixels (B, 3, T, H, W) in [-1, 1] <-> latents (B, C, F, h, w), T = 4 (F - 1) + 1, H = 8 h, W = 8 w.

    Frame 0 is encoded by itself, so that a picture (B, 3, H, W) is a clip of one frame and gives (B, C, h, w).
    """

    temporal_stride = 4
    spatial_stride = 8
    tile_size = 256
    """Side in pixels of a spatial tile, and so the size above which tiling starts to act."""
    tile_overlap = 64
    """Pixels over which neighbouring tiles are blended."""
    use_slicing = False
    use_tiling = False
    decode_context = 1
    """Earlier latent frames that a piece of a clip needs to have the pixels of the whole clip.

    There is one at least, because a piece with nothing before it is the beginning of a clip.
    """

    def encode_clip(self, x: Tensor) -> Tensor:
        """Whole clip (B, 3, T, H, W) -> moments (B, 2C, F, h, w)."""
        raise NotImplementedError

    def decode_clip(self, z: Tensor, context: int = 0) -> Tensor:
        """Latents (B, C, F, h, w) -> pixels (B, 3, T, H, W), without those of the `context` leading latent frames."""
        raise NotImplementedError

    def decode_piece(self, decoded: int) -> int:
        """How many of the latent frames after the first `decoded` ones become pixels together."""
        raise NotImplementedError

    @apply_forward_hook  # CPU offload moves the weights here
    def encode(self, x: Tensor) -> AutoencoderKLOutput:
        """Pixels in [-1, 1], a clip or a picture -> the posterior of its unscaled latents."""
        clip = _as_clip(x, self.config.in_channels, "pixels")
        _, _, T, H, W = clip.shape
        if (T - 1) % self.temporal_stride:
            raise InputError(f"the autoencoder takes 4k + 1 frames (1, 5, 9, ...), got {T}")
        if H % self.spatial_stride or W % self.spatial_stride:
            raise InputError(f"height and width must be multiples of {self.spatial_stride}, got {H}x{W}")
        moments = torch.cat([self._encode_tiles(part) for part in self._slices(clip)])  # (B, 2C, F, h, w)
        moments = moments.squeeze(2) if x.ndim == 4 else moments
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))

    @apply_forward_hook
    def decode(self, z: Tensor, context: int = 0) -> DecoderOutput:
        """Unscaled latents of a clip or a picture -> pixels, about [-1, 1] (not clamped).

        The `context` leading latent frames are only looked at: no pixels of theirs are given out.
        """
        clip = _as_clip(z, self.config.latent_channels, "latents")
        if not 0 <= context < clip.shape[2]:
            raise InputError(
                f"context must leave latent frames to decode: expected 0 to {clip.shape[2] - 1}, got {context}"
            )
        pixels = torch.cat([self._decode_tiles(part, context) for part in self._slices(clip)])  # (B, 3, T, H, W)
        return DecoderOutput(sample=pixels.squeeze(2) if z.ndim == 4 else pixels)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> DecoderOutput:
        """Pixels through a sample of their posterior and back: what training an autoencoder looks at."""
        return self.decode(self.encode(x).latent_dist.sample(generator))

    def enable_slicing(self) -> None:
        """Take a batch one clip at a time: slower, bounded in memory, the same numbers."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        self.use_slicing = False

    def enable_tiling(self) -> None:
        """Take large frames in overlapping, blended tiles: bounded in memory, nearly the same numbers."""
        self.use_tiling = True

    def disable_tiling(self) -> None:
        self.use_tiling = False

    def _slices(self, clip: Tensor) -> tuple[Tensor, ...]:
        return clip.split(1) if self.use_slicing else (clip,)

    def _encode_tiles(self, clip: Tensor) -> Tensor:
        if not self.use_tiling:
            return self.encode_clip(clip)
        s = self.spatial_stride
        return map_tiles(self.encode_clip, clip, s, self.tile_size // s, self.tile_overlap // s, 1)

    def _decode_tiles(self, clip: Tensor, context: int) -> Tensor:
        if not self.use_tiling:
            return self.decode_clip(clip, context)
        s = self.spatial_stride
        decode = partial(self.decode_clip, context=context)
        return map_tiles(decode, clip, 1, self.tile_size // s, self.tile_overlap // s, s)


def _as_clip(x: Tensor, channels: int, what: str) -> Tensor:
    """A picture as a clip of one frame; any other shape is an error that names it."""
    clip = x.unsqueeze(2) if x.ndim == 4 else x
    if clip.ndim != 5 or clip.shape[1] != channels or 0 in clip.shape:
        expected = f"(B, {channels}, frames, height, width) or (B, {channels}, height, width)"
        raise InputError(f"the autoencoder takes {what} {expected}, got {tuple(x.shape)}")
    return clip
