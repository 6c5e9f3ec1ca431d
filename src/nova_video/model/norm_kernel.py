# mypy: ignore-errors
# ruff: noqa: N803
"""The Triton kernel of `norm.py`: a layer norm's gradients, of what it is given and of all that is summed over rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

ROWS, TOGETHER = 64, 4  # of a program, which takes so many rows together
STAGES = 3  # of its loop: the next rows are read while these are computed
WARPS = 4


@triton.jit
def norm_backward_kernel(
    x,
    weight,
    to_out,
    to_x,
    parts,
    rows,
    columns,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOGETHER: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of (rows, columns) numbers, and sums over every `ROWS` rows, one behind the other: the gradients of
    a bias added before, of the weight and of the shift."""
    column = tl.arange(0, COLUMNS)
    there = column < columns
    scale = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)[None, :]
    to_weight = tl.zeros((TOGETHER, COLUMNS), tl.float32)
    to_shift = tl.zeros((TOGETHER, COLUMNS), tl.float32)
    to_bias = tl.zeros((TOGETHER, COLUMNS), tl.float32)
    for start in tl.range(0, ROWS, TOGETHER, num_stages=STAGES):
        row = tl.program_id(0) * ROWS + start + tl.arange(0, TOGETHER)
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        inside = (row < rows)[:, None] & there[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        given = tl.load(to_out + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, value - (tl.sum(value, 1) / columns)[:, None], 0.0)
        variance = (tl.sum(value * value, 1) / columns + eps).to(tl.float32)  # torch.compile gives eps in float64
        slope = tl.rsqrt(variance)[:, None]
        value *= slope
        scaled = given * scale
        level = (tl.sum(scaled, 1) / columns)[:, None]
        along = (tl.sum(scaled * value, 1) / columns)[:, None]
        gradient = tl.where(inside, (scaled - level - value * along) * slope, 0.0)
        tl.store(to_x + at, gradient.to(to_x.dtype.element_ty), mask=inside)
        to_weight += given * value
        to_shift += given
        to_bias += gradient
    parts += tl.program_id(0).to(tl.int64) * 3 * columns + column
    tl.store(parts, tl.sum(to_bias, 0), mask=there)
    tl.store(parts + columns, tl.sum(to_weight, 0), mask=there)
    tl.store(parts + 2 * columns, tl.sum(to_shift, 0), mask=there)


@triton_op("nova_video::norm_backward", mutates_args=())
def norm_backward(x: Tensor, weight: Tensor, to_out: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x and to_out (..., C), weight (C,) -> the gradient of x, and parts of sums over rows, (parts, 3, C) float32:
    the gradients of a bias before, of the weight and of the shift."""
    x, to_out = x.contiguous(), to_out.contiguous()
    columns = x.shape[-1]
    rows = x.numel() // columns
    programs = (rows + ROWS - 1) // ROWS
    to_x, parts = torch.empty_like(x), torch.empty(programs, 3, columns, device=x.device, dtype=torch.float32)
    wrap_triton(norm_backward_kernel)[(programs,)](
        x,
        weight,
        to_out,
        to_x,
        parts,
        rows,
        columns,
        eps,
        ROWS,
        triton.next_power_of_2(columns),
        TOGETHER,
        STAGES,
        num_warps=WARPS,
    )
    return to_x, parts
