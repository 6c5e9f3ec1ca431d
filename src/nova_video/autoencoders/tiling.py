"""Overlapping tiles of a frame, computed one by one and blended: a clip's memory bounded by a tile's.

Plain functions over any map between pixels and latents; `base.py` uses them when tiling is enabled.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def tile_starts(length: int, size: int, overlap: int) -> list[int]:
    """Where tiles of `size` begin along `length`: at least `overlap` shared, all of them inside, all of one size."""
    if length <= size:
        return [0]
    last = length - size
    return [*range(0, last, size - overlap), last]


def blend_weight(size: int, overlap: int, at_start: bool, at_end: bool) -> Tensor:
    """Weights (size,) rising over the first `overlap` values and falling over the last, flat at the frame's edges."""
    position = torch.arange(size, dtype=torch.float32)
    rise = torch.ones(size) if at_start else (position + 0.5) / overlap
    fall = torch.ones(size) if at_end else (size - position - 0.5) / overlap
    return torch.minimum(rise, fall).clamp(max=1.0)


def map_tiles(
    function: Callable[[Tensor], Tensor], x: Tensor, unit: int, size: int, overlap: int, out_unit: int
) -> Tensor:
    """`function` over x (B, c, t, H, W) tile by tile; tiles overlap and are averaged with linear ramps.

    `size` and `overlap` count latent cells: a cell is `unit` values of x and `out_unit` values of the output wide.
    """
    rows, columns = x.shape[-2] // unit, x.shape[-1] // unit
    row_starts, column_starts = tile_starts(rows, size, overlap), tile_starts(columns, size, overlap)
    if len(row_starts) == len(column_starts) == 1:
        return function(x)
    height, width = min(size, rows), min(size, columns)  # cells of a tile
    total: Tensor | None = None
    norm = torch.zeros(rows * out_unit, columns * out_unit, device=x.device)
    for r in row_starts:
        down = blend_weight(height * out_unit, overlap * out_unit, r == 0, r + height == rows)
        for c in column_starts:
            across = blend_weight(width * out_unit, overlap * out_unit, c == 0, c + width == columns)
            weight = (down[:, None] * across[None, :]).to(x.device)
            tile = function(x[..., r * unit : (r + height) * unit, c * unit : (c + width) * unit])
            if total is None:
                total = tile.new_zeros(*tile.shape[:-2], rows * out_unit, columns * out_unit)
            here = (
                ...,
                slice(r * out_unit, (r + height) * out_unit),
                slice(c * out_unit, (c + width) * out_unit),
            )
            total[here] += tile * weight.to(tile.dtype)
            norm[here] += weight
    assert total is not None
    return total / norm.to(total.dtype)
