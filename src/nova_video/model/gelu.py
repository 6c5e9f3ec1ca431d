"""The GELU of the encoders' blocks: x Phi(x), the exact one.

In blocks compiled for a GPU it is a pair of Triton kernels: the erf of torch takes 37 instructions a number, which last
longer than reading and writing it, and ours takes 25. Everywhere else it is torch's.
"""

import torch
from torch import Tensor
from torch.nn import functional


def gelu(x: Tensor) -> Tensor:
    """x (...) -> as x. The kernels save little beside the launches of blocks not compiled."""
    if x.is_cuda and torch.compiler.is_compiling():
        from nova_video.model import gelu_kernel

        result: Tensor = gelu_kernel.gelu(x)
        return result
    return functional.gelu(x)
