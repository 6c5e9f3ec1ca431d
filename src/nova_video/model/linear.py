"""The linear layers of the encoders' blocks, as compiled blocks are trained with them on a GPU.

Autocast makes the gradient of a weight in bf16 and casts it: here it has the weight's type as it is summed up, and is
neither rounded nor moved twice. And the kernels of `gelu.py` and `norm.py` sum up that of the bias before, in passing.
"""

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional


def takes_kernels(x: Tensor) -> bool:
    """Whether what is computed of x has kernels of its own: in compiled blocks on a GPU. Others would lose to launches
    what the kernels save."""
    return x.is_cuda and torch.compiler.is_compiling()


def apply_linear(linear: nn.Module, x: Tensor) -> Tensor:
    """linear(x)."""
    if not (takes_kernels(x) and is_trained(linear)):
        out: Tensor = linear(x)
        return out
    return Linear.of(linear, x, sums_bias=True)


def apply_apart(linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """linear(x), and its bias if that learns: its gradient has to come from who was given it here.

    None of any other layer, such as one that adapters have wrapped: that looks after its own.
    """
    if not is_trained(linear):
        return linear(x), None
    return Linear.of(linear, x, sums_bias=False), linear.bias


def is_trained(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a plain layer all of which learns."""
    if type(linear) is not nn.Linear or linear.bias is None or not torch.is_grad_enabled():
        return False
    return linear.weight.requires_grad and linear.bias.requires_grad


class Linear(torch.autograd.Function):
    """A linear layer: x (..., C), weight (C', C), bias (C',) -> (..., C'). Its bias has a gradient if `sums_bias`."""

    @classmethod
    def of(cls, linear: nn.Linear, x: Tensor, sums_bias: bool) -> Tensor:
        kind = x.device.type
        x = x.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else linear.weight.dtype)
        out: Tensor = cls.apply(x, linear.weight, linear.bias, sums_bias)  # type: ignore[no-untyped-call]
        return out

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, sums_bias: bool) -> Tensor:
        return functional.linear(x, weight.to(x.dtype), bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, sums_bias = inputs
        ctx.bias = bias.dtype if sums_bias else None
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, to_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = to_out.flatten(0, -2)
        to_weight = product(rows.t(), x.flatten(0, -2), weight.dtype)
        to_bias = None if ctx.bias is None else rows.sum(0, dtype=torch.float32).to(ctx.bias)
        return to_out @ weight.to(to_out.dtype), to_weight, to_bias, None


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """(M, K), (K, N) -> (M, N) of a type at least as wide as theirs, which it is summed up in."""
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)
