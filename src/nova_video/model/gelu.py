"""The GELU of the encoders' blocks: x Phi(x), the exact one.

In blocks compiled for a GPU it is a pair of Triton kernels: the erf of torch takes 37 instructions a number, which last
longer than reading and writing it, and ours takes 25. In training they also sum up the gradient of the bias before it,
for which everything would be read once more. Everywhere else it is torch's.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


def gelu_of(linear: nn.Module, x: Tensor) -> Tensor:
    """GELU(linear(x)), x (..., C) -> (..., C'). The kernels save little beside the launches of blocks not compiled."""
    if not (x.is_cuda and torch.compiler.is_compiling()):
        return functional.gelu(linear(x))
    from nova_video.model import gelu_kernel

    bias = None
    if type(linear) is nn.Linear and linear.bias is not None and linear.bias.requires_grad and torch.is_grad_enabled():
        bias = linear.bias
        added = functional.linear(x, linear.weight, bias.detach())
    else:
        added = linear(x)
    result: Tensor = gelu_kernel.gelu(added, bias)
    return result
