# mypy: ignore-errors
# ruff: noqa: N803
"""The Triton kernels of `pieces.py`: Triton comes with CUDA builds of torch. All compute in float32."""

import triton
import triton.language as tl


@triton.jit
def gelu_kernel(x, out, count, BLOCK: tl.constexpr):
    """GELU of `count` numbers, with Phi of Abramowitz and Stegun (26.2.17)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    size = tl.abs(value)
    t = 1.0 / (1.0 + 0.2316419 * size)
    series = 0.127414796 + t * (-0.142248368 + t * (0.710706871 + t * (-0.726576014 + t * 0.530702715)))
    result = tl.maximum(value, 0.0) - size * t * series * tl.exp2(-0.721347520 * value * value)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_norm_kernel(x, branch, weight, bias, out, eps, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """A row of x + LN(branch), both (R, WIDTH); PADDED is the least power of two not below WIDTH."""
    column = tl.arange(0, PADDED)
    inside = column < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + column
    value = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
    stream = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, value - tl.sum(value, 0) / WIDTH, 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
    result = stream + centred / deviation * scale + shift
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)
