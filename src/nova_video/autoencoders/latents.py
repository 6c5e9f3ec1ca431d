"""Between an autoencoder's latents and the transformer's: shift and scale, as the autoencoder's config says.

This works on every autoencoder, for pictures (B, C, h, w) and clips (B, C, F, h, w). The values come from the config,
from buffers with the weights (LTX), or from attributes of a user's own object; what is absent changes nothing.
"""

from typing import Any

import torch
from torch import Tensor, nn


def scale_latents(vae: Any, z: Tensor) -> Tensor:
    """The autoencoder's latents -> what the transformer sees: (z - mean) * scaling_factor / std."""
    mean, scale = _affine(vae, z)
    return (z - mean) * scale


def unscale_latents(vae: Any, z: Tensor) -> Tensor:
    """Undoes `scale_latents`: latents of the transformer -> latents that the autoencoder decodes."""
    mean, scale = _affine(vae, z)
    return z / scale + mean


def has_scale(vae: Any) -> bool:
    """True if the autoencoder says how its latents are scaled."""
    return _value(vae, "scaling_factor") is not None or _value(vae, "latents_mean") is not None


def _affine(vae: Any, z: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Mean and scale: one a channel where there are `latents_mean` and `latents_std`, else plain numbers."""
    factor = _value(vae, "scaling_factor")
    factor = 1.0 if factor is None else float(factor)
    means, stds = _value(vae, "latents_mean"), _value(vae, "latents_std")
    if means is None or stds is None:
        return float(_value(vae, "shift_factor") or 0.0), factor
    shape = (1, -1) + (1,) * (z.ndim - 2)
    mean = torch.as_tensor(means, device=z.device, dtype=z.dtype).view(shape)
    std = torch.as_tensor(stds, device=z.device, dtype=z.dtype).view(shape)
    return mean, factor / std


def _value(vae: Any, name: str) -> Any:
    """A value of the config, else of the buffers, else of the object itself."""
    config = getattr(vae, "config", None)
    if config is None:
        return getattr(vae, name, None)
    value = config.get(name)
    buffers = vae._buffers if isinstance(vae, nn.Module) else {}
    return buffers.get(name) if value is None else value
