# mypy: ignore-errors
# ruff: noqa: N803
"""The Triton kernels of `gelu.py`, forward and backward: Triton comes with CUDA builds of torch.

Both compute in float32, with Phi of Abramowitz and Stegun (26.2.17), within 7.5e-8.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from nova_video.fast.norm_kernel import share

WARPS = 8
COLUMNS, TOGETHER = 512, 8  # of a program
WARPS_BACK = 4
COLUMNS_BACK, TOGETHER_BACK = 512, 4  # of a program of the gradient, which takes so many rows together
STAGES = 3  # of its loop: the next rows are read while these are computed
PROGRAMS = 528  # of the gradient, at most: four at once on each multiprocessor of an H100 or H200


@triton.jit
def tail_series(size):
    """(1 - Phi(size)) / exp(-size^2 / 2) of size >= 0."""
    t = 1.0 / (1.0 + 0.2316419 * size)
    return t * (0.127414796 + t * (-0.142248368 + t * (0.710706871 + t * (-0.726576014 + t * 0.530702715))))


@triton.jit
def gelu_kernel(x, bias, out, rows, columns, BIAS: tl.constexpr, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr):
    """GELU of (rows, columns) numbers and a bias."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER)
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    size = tl.abs(value)
    result = tl.maximum(value, 0.0) - size * tail_series(size) * tl.exp2(-0.721347520 * value * value)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gelu_backward_kernel(
    x,
    bias,
    to_out,
    to_x,
    sums,
    rows,
    each,
    columns,
    BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOGETHER: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of GELU, to_out times Phi(x) + x phi(x), and its sums over every `each` rows.

    The bias is added to x first. All have (rows, columns) numbers.
    """
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_row = column < columns
    if BIAS:
        added = tl.load(bias + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((TOGETHER, COLUMNS), tl.float32)
    for start in tl.range(0, each, TOGETHER, num_stages=STAGES):
        row = tl.program_id(0) * each + start + tl.arange(0, TOGETHER)
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        mask = (row < rows)[:, None] & in_row[None, :]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        given = tl.load(to_out + at, mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            value += added
        size = tl.abs(value)
        rest = (tail_series(size) - 0.39894228 * size) * tl.exp2(-0.721347520 * value * value)
        gradient = given * tl.where(value >= 0, 1.0 - rest, rest)
        total += gradient
        tl.store(to_x + at, gradient.to(to_x.dtype.element_ty), mask=mask)
    tl.store(sums + tl.program_id(0) * columns + column, tl.sum(total, 0), mask=in_row)


@triton_op("nova_video::gelu", mutates_args=())
def gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """GELU(x + bias), x (..., C), bias (C,) or None."""
    x = x.contiguous()
    columns = x.shape[-1]
    rows = x.numel() // columns
    grid = ((rows + TOGETHER - 1) // TOGETHER, (columns + COLUMNS - 1) // COLUMNS)
    out = torch.empty_like(x)
    added = x if bias is None else bias
    wrap_triton(gelu_kernel)[grid](x, added, out, rows, columns, bias is not None, COLUMNS, TOGETHER, num_warps=WARPS)
    return out


@triton_op("nova_video::gelu_backward", mutates_args=())
def gelu_backward(x: Tensor, bias: Tensor | None, to_out: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x (..., C), and its sums over parts of the rows, (parts, C) float32."""
    x, to_out = x.contiguous(), to_out.contiguous()
    columns = x.shape[-1]
    rows = x.numel() // columns
    across = (columns + COLUMNS_BACK - 1) // COLUMNS_BACK
    each = share(rows, PROGRAMS // across, TOGETHER_BACK)
    grid = ((rows + each - 1) // each, across)
    to_x, sums = torch.empty_like(x), torch.empty(grid[0], columns, device=x.device, dtype=torch.float32)
    added = x if bias is None else bias
    sizes = rows, each, columns, bias is not None, COLUMNS_BACK, TOGETHER_BACK, STAGES
    wrap_triton(gelu_backward_kernel)[grid](x, added, to_out, to_x, sums, *sizes, num_warps=WARPS_BACK)
    return to_x, sums


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx, to_out: Tensor) -> tuple[Tensor, Tensor | None]:
    x, bias = ctx.saved_tensors
    to_x, sums = gelu_backward(x, bias, to_out)
    return to_x, None if bias is None else sums.sum(0).to(bias.dtype)


gelu.register_autograd(_gradient, setup_context=_keep)
