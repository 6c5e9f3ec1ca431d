"""What the encoders' blocks compute between their products: GELU, and the sum behind a branch.

While a GPU samples with compiled blocks, each is a Triton kernel. The erf of torch takes 37 instructions a number,
which last longer than reading and writing it; ours takes 25. And compiled layer norms of more than 1,024 channels read
their input three times; ours reads it once. Everywhere else both are those of torch.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

BLOCK = 4096  # numbers of a program


def uses_kernels(x: Tensor) -> bool:
    """Kernels have no gradients, and what they save is little beside the launches of blocks that are not compiled."""
    return x.is_cuda and torch.compiler.is_compiling() and not torch.is_grad_enabled()


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), the exact one, of any shape."""
    return gelu_by_kernel(x) if uses_kernels(x) else functional.gelu(x)


def add_norm(x: Tensor, branch: Tensor, norm: nn.LayerNorm) -> Tensor:
    """x + LN(branch), all (B, N, D)."""
    if uses_kernels(x):
        return add_norm_by_kernel(x, branch, norm.weight, norm.bias, norm.eps)
    return x + norm(branch)


def gelu_by_kernel(x: Tensor) -> Tensor:
    """With Phi of Abramowitz and Stegun (26.2.17), within 7.5e-8."""
    from nova_video.model.pieces_kernels import gelu_kernel

    x = x.contiguous()
    out = torch.empty_like(x)
    gelu_kernel[((x.numel() + BLOCK - 1) // BLOCK,)](x, out, x.numel(), BLOCK, num_warps=8)
    return out


def add_norm_by_kernel(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """In float32, rounded once."""
    from nova_video.model.pieces_kernels import add_norm_kernel

    x, branch = x.contiguous(), branch.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    padded = 1 << (width - 1).bit_length()
    add_norm_kernel[(x.numel() // width,)](x, branch, weight, bias, out, eps, width, padded, num_warps=4)
    return out
