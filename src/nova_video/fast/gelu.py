"""The GELU of the encoders' blocks: x Phi(x), the exact one.

In blocks compiled for a GPU it is a pair of Triton kernels: the erf of torch takes 37 instructions a number, which last
longer than reading and writing it, and ours takes 25. In training they also add the bias before it, which would be cast
first, and sum up its gradient, for which everything would be read once more. Everywhere else it is torch's.
"""

from torch import Tensor, nn
from torch.nn import functional

from nova_video.fast.linear import apply_apart, takes_kernels


def gelu_of(linear: nn.Module, x: Tensor) -> Tensor:
    """GELU(linear(x)), x (..., C) -> (..., C')."""
    if not takes_kernels(x):
        return functional.gelu(linear(x))
    from nova_video.fast import gelu_kernel

    result: Tensor = gelu_kernel.gelu(*apply_apart(linear, x))
    return result
