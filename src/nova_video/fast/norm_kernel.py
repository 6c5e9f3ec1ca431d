# mypy: ignore-errors
# ruff: noqa: N803
"""The Triton kernel of `norm.py`: gradients of a layer norm, for its input and for all sums over rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

TOGETHER = 2  # rows that a program takes at once
STAGES = 4  # of its loop: the next rows are read while these are computed
WARPS = 4
PROGRAMS = 396  # at most: three at once on each multiprocessor of an H100 or H200


@triton.jit
def norm_backward_kernel(
    x,
    bias,
    weight,
    to_out,
    to_x,
    parts,
    rows,
    each,
    columns,
    eps,
    BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOGETHER: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of (rows, columns) numbers, and sums over every `each` rows.

    The sums are the gradients of the bias, of the weight and of the shift, one behind the other.
    """
    column = tl.arange(0, COLUMNS)
    in_row = column < columns
    scale = tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        added = tl.load(bias + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
    to_weight = tl.zeros((TOGETHER, COLUMNS), tl.float32)
    to_shift = tl.zeros((TOGETHER, COLUMNS), tl.float32)
    to_bias = tl.zeros((TOGETHER, COLUMNS), tl.float32)
    for start in tl.range(0, each, TOGETHER, num_stages=STAGES):
        row = (tl.program_id(0) * each + start + tl.arange(0, TOGETHER)).to(tl.int64)[:, None]
        at = row * columns + column[None, :]
        mask = (row < rows) & in_row[None, :]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        given = tl.load(to_out + at, mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            value += added
        value = tl.where(in_row[None, :], value - (tl.sum(value, 1) / columns)[:, None], 0.0)
        variance = (tl.sum(value * value, 1) / columns + eps).to(tl.float32)  # torch.compile gives eps in float64
        slope = tl.rsqrt(variance)[:, None]
        value *= slope
        scaled = given * scale
        level = (tl.sum(scaled, 1) / columns)[:, None]
        along = (tl.sum(scaled * value, 1) / columns)[:, None]
        gradient = (scaled - level - value * along) * slope
        tl.store(to_x + at, gradient.to(to_x.dtype.element_ty), mask=mask)
        to_weight += given * value
        to_shift += given
        to_bias += gradient
    parts += tl.program_id(0).to(tl.int64) * 3 * columns + column
    tl.store(parts, tl.sum(to_bias, 0), mask=in_row)
    tl.store(parts + columns, tl.sum(to_weight, 0), mask=in_row)
    tl.store(parts + 2 * columns, tl.sum(to_shift, 0), mask=in_row)


def share(rows: int, programs: int, together: int) -> int:
    """Rows per program, so that all programs run in one wave.

    There are at most `programs`, and each takes `together` rows at once.
    """
    return together * ((rows + programs * together - 1) // (programs * together))


@triton_op("nova_video::norm_backward", mutates_args=())
def norm_backward(x: Tensor, bias: Tensor | None, weight: Tensor, to_out: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of LN(x + bias): x and to_out (..., C), bias and weight (C,).

    -> that of x, and parts of sums over rows, (parts, 3, C) float32: those of the bias, of the weight and of the shift.
    """
    x, to_out = x.contiguous(), to_out.contiguous()
    columns = x.shape[-1]
    rows = x.numel() // columns
    each = share(rows, PROGRAMS, TOGETHER)
    programs = (rows + each - 1) // each
    to_x, parts = torch.empty_like(x), torch.empty(programs, 3, columns, device=x.device, dtype=torch.float32)
    wrap_triton(norm_backward_kernel)[(programs,)](
        x,
        x if bias is None else bias,
        weight,
        to_out,
        to_x,
        parts,
        rows,
        each,
        columns,
        eps,
        bias is not None,
        triton.next_power_of_2(columns),
        TOGETHER,
        STAGES,
        num_warps=WARPS,
    )
    return to_x, parts
