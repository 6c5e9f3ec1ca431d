"""The linear layers of the encoders' blocks, as compiled blocks are trained with them on a GPU.

Autocast makes the gradient of a weight in bf16 and casts it: here it has the weight's type as it is summed up, and is
neither rounded nor moved twice. And the kernels of `gelu.py` and `norm.py` add the bias before them, and sum up its
gradient, in passing.
"""

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional


def takes_kernels(x: Tensor) -> bool:
    """True where Triton's kernels run. Only compiled parts call what asks: launches would cost what kernels save."""
    return x.is_cuda


def apply_linear(linear: nn.Module, x: Tensor) -> Tensor:
    """linear(x)."""
    if not (takes_kernels(x) and is_trained(linear)):
        out: Tensor = linear(x)
        return out
    return multiply(x, linear.weight, linear.bias)


def apply_apart(linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """linear(x) without its bias, and the bias, which whoever is given both adds.

    Of any layer that does not learn, or that adapters have wrapped, all of linear(x) and None.
    """
    if not is_trained(linear):
        return linear(x), None
    return multiply(x, linear.weight, None), linear.bias


def is_trained(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """True if this is a plain layer of which all parameters learn."""
    if type(linear) is not nn.Linear or linear.bias is None or not torch.is_grad_enabled():
        return False
    return linear.weight.requires_grad and linear.bias.requires_grad


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., C), weight (C', C), bias (C',) -> (..., C'), in autocast's type if it is on."""
    kind = x.device.type
    x = x.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype)
    out: Tensor = Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


class Linear(torch.autograd.Function):
    """`multiply`, in the type of x."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias = inputs
        ctx.bias = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, to_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = to_out.flatten(0, -2)
        to_weight = product(rows.t(), x.flatten(0, -2), weight.dtype)
        to_bias = None if ctx.bias is None else rows.sum(0, dtype=torch.float32).to(ctx.bias)
        return to_out @ weight.to(to_out.dtype), to_weight, to_bias


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """(M, K), (K, N) -> (M, N) of a type at least as wide as theirs, which it is summed up in."""
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)
