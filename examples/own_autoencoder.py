"""An own autoencoder: colours of 16x16 blocks, every fourth frame. It has no weights, and shows what the package needs.

    nova encode clips -o dataset --autoencoder own_autoencoder:BlockColours --size 64x64 --frames 5
    nova train recipe.toml        # with autoencoder = "own_autoencoder:BlockColours", run where this file is
    pipe = NovaPipeline.from_pretrained("runs/own/model", vae=BlockColours())

An autoencoder with weights is best a subclass of `nova_video.autoencoders.VideoAutoencoder`, which brings tiles,
slices, and streaming. Any object with the five members below works as well.
Axes: B clips, T pixel frames, H W pixels, F latent frames, h w blocks.
"""

import torch
from torch import Tensor
from torch.nn import functional


class BlockColours:
    """Mean colours of blocks; the first frame by itself, then one latent frame for every four."""

    latent_channels, spatial_stride, temporal_stride = 3, 16, 4
    scaling_factor = 2.0  # optional, as shift_factor, latents_mean and latents_std: latents of about unit variance

    def encode(self, clip: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W) in [-1, 1] -> latents (B, 3, F, h, w)."""
        return functional.avg_pool3d(clip[:, :, ::4], (1, 16, 16))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 3, F, h, w) -> pixels (B, 3, T, H, W)."""
        frames = torch.cat([latents[:, :, :1], latents[:, :, 1:].repeat_interleave(4, dim=2)], dim=2)
        return frames.repeat_interleave(16, dim=3).repeat_interleave(16, dim=4)
