"""The GELU of the encoders' blocks: x Phi(x), the exact one.

While a GPU samples with compiled blocks, a Triton kernel computes it: torch's erf takes 37 instructions a number, which
last longer than the reading and writing of the numbers, and this one 25. Everywhere else it is torch's.
"""

import torch
from torch import Tensor
from torch.nn import functional

BLOCK, WARPS = 4096, 8  # numbers and warps of a program


def gelu(x: Tensor) -> Tensor:
    """x (...) -> as x."""
    if x.is_cuda and torch.compiler.is_compiling() and not torch.is_grad_enabled():
        return short_gelu(x)
    return functional.gelu(x)


def short_gelu(x: Tensor) -> Tensor:
    """The same with Phi of Abramowitz and Stegun (26.2.17), within 7.5e-8; x is contiguous."""
    from nova_video.model.gelu_kernel import gelu_kernel

    out = torch.empty_like(x)
    count = x.numel()
    gelu_kernel[((count + BLOCK - 1) // BLOCK,)](x, out, count, BLOCK, num_warps=WARPS)
    return out
