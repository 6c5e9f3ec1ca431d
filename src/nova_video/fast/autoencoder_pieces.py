"""The three pieces of a layer of `autoencoder.py` in plain torch, with cuDNN's convolutions on a GPU.

Legend: k frames of a part, H W rows and columns, C channels; all of one clip.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Normalise = Callable[[Tensor, Tensor, Tensor, Tensor], None]
Convolve = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, tuple[int, int]], tuple[Tensor, Tensor]]
Double = Callable[[Tensor], Callable[[int, Tensor], None]]


@dataclass(frozen=True)
class Pieces:
    """How the work of a layer is done; see the functions below for what each takes and gives."""

    normalise: Normalise
    convolve: Convolve
    double: Double


def normalise(part: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """silu(part * scale + shift) of a part (k, H, W, C), with scale and shift (C,) float32, into `out`, its shape."""
    out.copy_(F.silu(torch.addcmul(shift, part, scale)))


def convolve(
    window: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None, add: bool, first: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Window (k', H', W', C) with its borders, weight (D, C, kt, kh, kw) -> part (k, H, W, D), and its sums (2, D).

    `out`: where the part goes, and with `add` what it is added to; it may be strided. Given one, the convolution
    begins at row and column `first` of the window and ends where `out` is full; else it takes the whole window.
    """
    made = cudnn_convolve(window, weight, bias, out, first)
    if out is not None:
        made = out.add_(made) if add else out.copy_(made)
    return made, channel_sums(made)


def cudnn_convolve(
    window: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None, first: tuple[int, int]
) -> Tensor:  # (k, H, W, D)
    """The convolution alone, by the library of the device; `out` says its size and is not written."""
    if out is not None:
        (top, left), (rows, columns) = first, out.shape[1:3]
        window = window[:, top : top + rows + weight.shape[3] - 1, left : left + columns + weight.shape[4] - 1]
    made = F.conv3d(window.permute(3, 0, 1, 2)[None], weight, bias)  # (1, D, k, H, W)
    return made[0].permute(1, 2, 3, 0).contiguous()


def channel_sums(part: Tensor) -> Tensor:
    """Sums of values and squares of a part (k, H, W, D) over all but its channels, (2, D)."""
    exact = torch.float64 if part.dtype == torch.float32 else torch.float32
    rows = part.flatten(0, 2) if part.is_contiguous() else part.reshape(-1, part.shape[-1])
    return torch.stack([rows.sum(0, dtype=exact), torch.linalg.vector_norm(rows, dim=0, dtype=exact).square()])


def double(x: Tensor) -> Callable[[int, Tensor], None]:
    """Twice the rows and columns of x (T, H, W, C), and two frames for each but the first: linear interpolation.

    Returns a function that writes frames from `start` on into what it is given, (k, 2H, 2W, C).
    """
    clip = x.permute(3, 0, 1, 2)[None]  # (1, C, T, H, W)
    made = F.interpolate(clip[:, :, 0], scale_factor=2, mode="bilinear", align_corners=False).unsqueeze(2)
    if len(x) > 1:
        rest = F.interpolate(clip[:, :, 1:], scale_factor=2, mode="trilinear", align_corners=False)
        made = torch.cat([made, rest], dim=2)
    frames = made[0].permute(1, 2, 3, 0)  # (2T - 1, 2H, 2W, C)

    def write(start: int, out: Tensor) -> None:
        out.copy_(frames[start : start + len(out)])

    return write


PLAIN = Pieces(normalise, convolve, double)
