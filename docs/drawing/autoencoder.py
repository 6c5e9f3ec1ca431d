"""Which frames an autoencoder connects, measured on it: an output uses the inputs that its gradient reaches."""

from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from drawing.style import ABSENT, SPACE, TIME


def encoder_reads(vae: Any, num_frames: int, side: int = 16) -> np.ndarray:
    """(F, T) bool: latent frame f depends on pixel frame t."""
    clip = _noise(1, 3, num_frames, side, side).requires_grad_()
    latents = vae.encode(clip).latent_dist.mean  # (1, C, F, h, w)
    return _used(latents, clip)


def decoder_reads(vae: Any, num_latents: int, side: int = 2) -> np.ndarray:
    """(T, F) bool: pixel frame t depends on latent frame f."""
    latents = _noise(1, vae.config.latent_channels, num_latents, side, side).requires_grad_()
    return _used(vae.decode(latents).sample, latents)


def _used(outputs: torch.Tensor, inputs: torch.Tensor) -> np.ndarray:
    """Both (1, C, frames, H, W) -> (frames out, frames in) bool."""
    rows = []
    for frame in range(outputs.shape[2]):
        (gradient,) = torch.autograd.grad(outputs[:, :, frame].square().sum(), inputs, retain_graph=True)
        rows.append(gradient.abs().amax((0, 1, 3, 4)) > 0)
    return torch.stack(rows).numpy()


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def draw_autoencoder(encoder: np.ndarray, decoder: np.ndarray) -> Figure:
    """encoder (F, T), decoder (T, F): latent frames down, pixel frames across, filled where one uses the other."""
    figure, panels = plt.subplots(1, 2, figsize=(8.8, 2.35))
    titles = ("Encoder: a row is made from the filled frames", "Decoder: a column is made from the filled rows")
    for axes, used, color, title in zip(panels, (encoder, decoder.T), (TIME, SPACE), titles, strict=True):
        axes.imshow(used, cmap=ListedColormap([ABSENT, color]), vmin=0, vmax=1, aspect="auto")
        latents, pixels = used.shape
        axes.set_xticks(np.arange(0, pixels, 2))
        axes.set_yticks(np.arange(latents))
        axes.set_xticks(np.arange(pixels + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(latents + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.2)
        axes.tick_params(which="both", length=0)
        axes.spines[:].set_visible(False)
        axes.set(xlabel="pixel frame", ylabel="latent frame", title=title)
    figure.tight_layout(w_pad=2)
    return figure
