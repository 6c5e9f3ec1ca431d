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
def gelu_backward_kernel(x, to_out, to_x, count, BLOCK: tl.constexpr):
    """The gradient of `count` numbers: to_out times Phi(x) + x phi(x)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    given = tl.load(to_out + at, mask=inside, other=0.0).to(tl.float32)
    power = tl.exp2(-0.721347520 * value * value)
    tail = upper_tail(tl.abs(value), power)
    slope = tl.where(value >= 0, 1.0 - tail, tail) + 0.39894228 * value * power
    tl.store(to_x + at, (given * slope).to(to_x.dtype.element_ty), mask=inside)


@triton_op("nova_video::gelu", mutates_args=())
def gelu(x: Tensor) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    wrap_triton(gelu_kernel)[((x.numel() + BLOCK - 1) // BLOCK,)](x, out, x.numel(), BLOCK, num_warps=WARPS)
    return out


@triton_op("nova_video::gelu_backward", mutates_args=())
def gelu_backward(x: Tensor, to_out: Tensor) -> Tensor:
    x, to_out = x.contiguous(), to_out.contiguous()
    to_x = torch.empty_like(x)
    grid = ((x.numel() + BLOCK - 1) // BLOCK,)
    wrap_triton(gelu_backward_kernel)[grid](x, to_out, to_x, x.numel(), BLOCK, num_warps=WARPS)
    return to_x


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0])


def _gradient(ctx, to_out: Tensor) -> Tensor:
    return gelu_backward(ctx.saved_tensors[0], to_out)


gelu.register_autograd(_gradient, setup_context=_keep)
