"""Layer norms whose gradients are ours, in blocks that are compiled for a GPU and trained; everywhere else torch's.

At the end of each branch of the encoders' blocks, LN(linear(x)), they come from one Triton kernel. What torch.compile
makes of them reads everything twice, for the row's gradient and for the sums over rows, or writes parts of those sums
that are almost as large; and once more for the bias before it.

Those of the denoiser's, which its embedding scales, shifts and gates, are compiled, from formulas that begin with the
mean and the slope of a row. Where these are kept from the forward pass, as autograd does, torch.compile puts the
gradients of scale, shift and gate together in a kernel of its own, which reads everything once more.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nova_video.fast.linear import apply_apart, takes_kernels
from nova_video.model import denoiser as plain


def norm_of(norm: nn.LayerNorm, linear: nn.Module, x: Tensor) -> Tensor:
    """norm(linear(x)), x (..., C) -> (..., C')."""
    if not (takes_kernels(x) and torch.is_grad_enabled()):
        return norm(linear(x))
    out, bias = apply_apart(linear, x)
    result: Tensor = Norm.apply(out, bias, norm.weight, norm.bias, norm.eps)  # type: ignore[no-untyped-call]
    return result


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(1 + scale) LN(x) + shift, a layer norm without weights; all (..., C)."""
    if takes_kernels(x) and torch.is_grad_enabled():
        result: Tensor = ModulateFunction.apply(x, scale, shift, plain.NORM_EPS)  # type: ignore[no-untyped-call]
        return result
    return plain.modulate(x, scale, shift)


def add_gated(x: Tensor, gate: Tensor, norm: nn.LayerNorm, branch: Tensor) -> Tensor:
    """x + gate norm(branch); all (..., C)."""
    if takes_kernels(x) and torch.is_grad_enabled():
        gated: Tensor = GateFunction.apply(branch, gate, norm.weight, norm.bias, norm.eps)  # type: ignore[no-untyped-call]
        return x + gated.to(x.dtype)
    return plain.add_gated(x, gate, norm(branch))


class Norm(torch.autograd.Function):
    """Layer norm over the last axis: forward in torch's terms, which torch.compile joins with what is around it."""

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor, eps: float) -> Tensor:
        """LN(x + bias), x (..., C), bias (C,) or None, weight and shift (C,) -> as x. Computed in float32, as under
        autocast."""
        before = x.float() if bias is None else x.float() + bias.float()
        return cast(functional.layer_norm(before, x.shape[-1:], weight.float(), shift.float(), eps), x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, bias, weight, shift, ctx.eps = inputs
        ctx.types = [None if value is None else value.dtype for value in (bias, weight, shift)]
        ctx.save_for_backward(x, bias, weight)

    @staticmethod
    def backward(ctx: Any, to_out: Tensor) -> tuple[Tensor | None, ...]:
        from nova_video.fast import norm_kernel

        to_x, parts = norm_kernel.norm_backward(*ctx.saved_tensors, to_out, ctx.eps)
        sums = [None if kind is None else total.to(kind) for kind, total in zip(ctx.types, parts.sum(0), strict=True)]
        return to_x, *sums, None


class ModulateFunction(torch.autograd.Function):
    """`modulate`, computed in float32."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
        out = functional.layer_norm(x.float(), x.shape[-1:], eps=eps)
        return cast(torch.addcmul(shift.float(), out, 1 + scale.float()), x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, _, ctx.eps = inputs
        ctx.save_for_backward(x, scale)

    @staticmethod
    def backward(ctx: Any, to_out: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        normal, slope = normalise(x, ctx.eps)
        given = to_out.float()
        to_x = to_what_was_normalised(given * (1 + scale.float()), normal, slope)
        return to_x.to(x.dtype), (given * normal).to(scale.dtype), to_out.to(scale.dtype), None


class GateFunction(torch.autograd.Function):
    """gate LN(branch), computed in float32."""

    @staticmethod
    def forward(branch: Tensor, gate: Tensor, weight: Tensor, shift: Tensor, eps: float) -> Tensor:
        out = functional.layer_norm(branch.float(), branch.shape[-1:], weight.float(), shift.float(), eps)
        return cast(gate.float() * out, branch.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *saved, ctx.eps = inputs
        ctx.save_for_backward(*saved)

    @staticmethod
    def backward(ctx: Any, to_out: Tensor) -> tuple[Tensor | None, ...]:
        branch, gate, weight, shift = ctx.saved_tensors
        normal, slope = normalise(branch, ctx.eps)
        given = to_out.float()
        to_gate = given * (normal * weight.float() + shift.float())
        given = given * gate.float()
        to_branch = to_what_was_normalised(given * weight.float(), normal, slope)
        sums = [(given * normal).flatten(0, -2).sum(0), given.flatten(0, -2).sum(0)]
        return to_branch.to(branch.dtype), to_gate.to(gate.dtype), *(total.to(weight.dtype) for total in sums), None


def normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A layer norm without weights in float32, and what it multiplied each row by: (..., C), (..., 1)."""
    centred = x.float() - x.float().mean(-1, keepdim=True)
    slope = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * slope, slope


def to_what_was_normalised(to_normal: Tensor, normal: Tensor, slope: Tensor) -> Tensor:
    """The gradient of x, given that of `normalise(x)` and what it was."""
    level, along = to_normal.mean(-1, keepdim=True), (to_normal * normal).mean(-1, keepdim=True)
    return (to_normal - level - normal * along) * slope


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A cast to the type it has, compiled by torch 2.11, would have a gradient of zero."""
    return x if x.dtype == dtype else x.to(dtype)
