# mypy: ignore-errors
# ruff: noqa: N803
"""The Triton kernel of `gelu.py`: Triton comes with CUDA builds of torch."""

import triton
import triton.language as tl


@triton.jit
def gelu_kernel(x, out, count, BLOCK: tl.constexpr):
    """GELU of `count` numbers, computed in float32, with Phi of Abramowitz and Stegun (26.2.17)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    size = tl.abs(value)
    t = 1.0 / (1.0 + 0.2316419 * size)
    series = 0.127414796 + t * (-0.142248368 + t * (0.710706871 + t * (-0.726576014 + t * 0.530702715)))
    result = tl.maximum(value, 0.0) - size * t * series * tl.exp2(-0.721347520 * value * value)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)
