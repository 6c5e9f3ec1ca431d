"""Pixels to latents and back: causal video autoencoders, one adapter for those of diffusers, the scaling of latents.

It may import `common` and `model`.
"""

from nova_video.autoencoders.adapter import AutoencoderAdapter, LatentLayout, adapt, find_layout
from nova_video.autoencoders.base import VideoAutoencoder
from nova_video.autoencoders.latents import scale_latents, unscale_latents
from nova_video.autoencoders.opensora import AutoencoderKLOpenSora
from nova_video.autoencoders.streaming import StreamDecoder
from nova_video.autoencoders.tiny import AutoencoderKLCausalTiny

__all__ = [
    "AutoencoderAdapter",
    "AutoencoderKLCausalTiny",
    "AutoencoderKLOpenSora",
    "LatentLayout",
    "StreamDecoder",
    "VideoAutoencoder",
    "adapt",
    "find_layout",
    "scale_latents",
    "unscale_latents",
]
