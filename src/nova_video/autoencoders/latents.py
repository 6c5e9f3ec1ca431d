"""Between an autoencoder's latents and the transformer's: shift and scale, as the autoencoder's config says.

Works on our autoencoders and on diffusers' AutoencoderKL alike, for pictures (B, C, h, w) and clips (B, C, F, h, w).
"""

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor


def scale_latents(vae: ModelMixin, z: Tensor) -> Tensor:
    """The autoencoder's latents -> what the transformer sees: (z - mean) * scaling_factor / std."""
    mean, scale = _affine(vae, z)
    return (z - mean) * scale


def unscale_latents(vae: ModelMixin, z: Tensor) -> Tensor:
    """What the transformer made -> what the autoencoder decodes; undoes `scale_latents`."""
    mean, scale = _affine(vae, z)
    return z / scale + mean


def _affine(vae: ModelMixin, z: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Mean and scale, per channel where the config has `latents_mean` and `latents_std`, else plain numbers."""
    config = vae.config
    factor = float(config.scaling_factor)
    if config.latents_mean is None or config.latents_std is None:
        return float(config.get("shift_factor") or 0.0), factor
    shape = (1, -1) + (1,) * (z.ndim - 2)
    mean = torch.tensor(config.latents_mean, device=z.device, dtype=z.dtype).view(shape)
    std = torch.tensor(config.latents_std, device=z.device, dtype=z.dtype).view(shape)
    return mean, factor / std
