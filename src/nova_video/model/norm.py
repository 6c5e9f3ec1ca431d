"""The layer norm at the end of each branch of the encoders' blocks, LN(linear(x)).

In blocks that are compiled for a GPU and trained its gradients come from one Triton kernel. What torch.compile makes of
them reads everything twice, for the row's gradient and for the sums over rows, or writes parts of those sums that are
almost as large; and once more for the bias before it. Everywhere else it is torch's.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nova_video.model.linear import apply_apart, takes_kernels


def norm_of(norm: nn.LayerNorm, linear: nn.Module, x: Tensor) -> Tensor:
    """norm(linear(x)), x (..., C) -> (..., C')."""
    if not (takes_kernels(x) and torch.is_grad_enabled()):
        return norm(linear(x))
    result: Tensor = Norm.apply(*apply_apart(linear, x), norm.weight, norm.bias, norm.eps)  # type: ignore[no-untyped-call]
    return result


class Norm(torch.autograd.Function):
    """Layer norm over the last axis: forward in torch's terms, which torch.compile joins with what is around it."""

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor, eps: float) -> Tensor:
        """x (..., C), to which a `bias` (C,) was added without a gradient; weight and shift (C,) -> as x. Computed in
        float32, as under autocast."""
        out = functional.layer_norm(x.float(), x.shape[-1:], weight.float(), shift.float(), eps)
        # Cast to the type it has, and compiled by torch 2.11, it would have a gradient of zero.
        return out if out.dtype == x.dtype else out.to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *summed, ctx.eps = inputs
        ctx.types = [None if value is None else value.dtype for value in summed]
        ctx.save_for_backward(x, summed[1])

    @staticmethod
    def backward(ctx: Any, to_out: Tensor) -> tuple[Tensor | None, ...]:
        from nova_video.model import norm_kernel

        x, weight = ctx.saved_tensors
        to_x, parts = norm_kernel.norm_backward(x, weight, to_out, ctx.eps)
        sums = [None if kind is None else sums.to(kind) for kind, sums in zip(ctx.types, parts.sum(0), strict=True)]
        return to_x, *sums, None
