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

BLOCK = 4096  # numbers of a program
WARPS = 8
ROWS, COLUMNS, TOGETHER = 128, 512, 8  # of a program of the gradient, which takes so many rows together


@triton.jit
def upper_tail(size, power):
    """1 - Phi(size) of size >= 0, where power is exp(-size^2 / 2)."""
    t = 1.0 / (1.0 + 0.2316419 * size)
    series = 0.127414796 + t * (-0.142248368 + t * (0.710706871 + t * (-0.726576014 + t * 0.530702715)))
    return t * series * power


@triton.jit
def gelu_kernel(x, out, count, BLOCK: tl.constexpr):
    """GELU of `count` numbers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    size = tl.abs(value)
    result = tl.maximum(value, 0.0) - size * upper_tail(size, tl.exp2(-0.721347520 * value * value))
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gelu_backward_kernel(
    x, to_out, to_x, sums, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr
):
    """The gradient of (rows, columns) numbers, to_out times Phi(x) + x phi(x); and its sums over every `ROWS` rows."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((TOGETHER, COLUMNS), tl.float32)
    for start in range(0, ROWS, TOGETHER):
        row = tl.program_id(0) * ROWS + start + tl.arange(0, TOGETHER)
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        given = tl.load(to_out + at, mask=inside, other=0.0).to(tl.float32)
        power = tl.exp2(-0.721347520 * value * value)
        tail = upper_tail(tl.abs(value), power)
        slope = tl.where(value >= 0, 1.0 - tail, tail) + 0.39894228 * value * power
        total += given * slope
        tl.store(to_x + at, (given * slope).to(to_x.dtype.element_ty), mask=inside)
    tl.store(sums + tl.program_id(0) * columns + column, tl.sum(total, 0), mask=column < columns)


@triton_op("nova_video::gelu", mutates_args=())
def gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., C). A `bias` (C,) is what was added to it without a gradient, which the bias then has from here."""
    x = x.contiguous()
    out = torch.empty_like(x)
    wrap_triton(gelu_kernel)[((x.numel() + BLOCK - 1) // BLOCK,)](x, out, x.numel(), BLOCK, num_warps=WARPS)
    return out


@triton_op("nova_video::gelu_backward", mutates_args=())
def gelu_backward(x: Tensor, to_out: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x (..., C), and its sums over parts of the rows, (parts, C) float32."""
    x, to_out = x.contiguous(), to_out.contiguous()
    columns = x.shape[-1]
    rows = x.numel() // columns
    grid = ((rows + ROWS - 1) // ROWS, (columns + COLUMNS - 1) // COLUMNS)
    to_x, sums = torch.empty_like(x), torch.empty(grid[0], columns, device=x.device, dtype=torch.float32)
    wrap_triton(gelu_backward_kernel)[grid](
        x, to_out, to_x, sums, rows, columns, ROWS, COLUMNS, TOGETHER, num_warps=WARPS
    )
    return to_x, sums


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.bias = None if inputs[1] is None else inputs[1].dtype


def _gradient(ctx, to_out: Tensor) -> tuple[Tensor, Tensor | None]:
    to_x, sums = gelu_backward(ctx.saved_tensors[0], to_out)
    return to_x, None if ctx.bias is None else sums.sum(0).to(ctx.bias)


gelu.register_autograd(_gradient, setup_context=_keep)
