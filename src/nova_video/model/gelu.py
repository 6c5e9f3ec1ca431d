"""The GELU of the encoders' blocks: x Phi(x), the exact one.

While a GPU samples with compiled blocks, it is a Triton kernel: the erf of torch takes 37 instructions a number, which
last longer than reading and writing it, and ours takes 25. Everywhere else it is torch's.
"""

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 4096  # numbers of a program


def gelu(x: Tensor) -> Tensor:
    """x (...) -> as x. The kernel has no gradient, and saves little beside the launches of blocks not compiled."""
    if x.is_cuda and torch.compiler.is_compiling() and not torch.is_grad_enabled():
        return gelu_by_kernel(x)
    return functional.gelu(x)


def gelu_by_kernel(x: Tensor) -> Tensor:
    """With Phi of Abramowitz and Stegun (26.2.17), within 7.5e-8."""
    from nova_video.model.gelu_kernel import gelu_kernel

    x = x.contiguous()
    out = torch.empty_like(x)
    gelu_kernel[((x.numel() + BLOCK - 1) // BLOCK,)](x, out, x.numel(), BLOCK, num_warps=8)
    return out
