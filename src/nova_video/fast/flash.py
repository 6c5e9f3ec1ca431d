"""FlashAttention 4 (flash-attn-4, the extra `flash`): attention without a mask on Hopper and Blackwell GPUs.

`attention.py` takes it where it is installed and suits. Its kernels are compiled when first called, in seconds; torch
sees them as operators with shapes and gradients, so that blocks around them compile as with any other. Its tensors are
(B, N, heads, head_dim). Where query, key and value are thirds of one tensor, so are their gradients: nothing has to put
them together.
"""

import importlib
import logging
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, register_autograd, register_fake

CAPABILITIES = (9, 10)  # Hopper, and Blackwell for servers
HALVES = (torch.float16, torch.bfloat16)
MOST_CHANNELS = 128  # of a head

log = logging.getLogger(__name__)


@torch.compiler.assume_constant_result
def is_installed(device: torch.device) -> bool:
    """True if flash-attn-4 is installed and supports this GPU: a constant for torch.compile."""
    return loads(device)


@cache
def loads(device: torch.device) -> bool:
    """True if flash-attn-4 is installed and supports this GPU."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(device)[0] not in CAPABILITIES:
        return False
    try:
        version("flash-attn-4")
        kernels()
    except PackageNotFoundError:
        return False
    except ImportError as error:  # something that it needs is missing
        log.warning("flash-attn-4 does not load, and attention goes without it: %s", error)
        return False
    return True


def suits(query: Tensor, key: Tensor) -> bool:
    """True if it takes these, of any layout (..., head_dim)."""
    channels = query.shape[-1]
    if not query.is_cuda or query.dtype not in HALVES or key.dtype != query.dtype:
        return False
    return channels % 8 == 0 and channels <= MOST_CHANNELS and is_installed(query.device)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot product attention, with gradients: query (B, S, heads, head_dim), key, value (B, N, heads, head_dim)
    -> as query."""
    out: Tensor = forward(query, key, value)[0]
    return out


def attend_packed(packed: Tensor) -> Tensor:
    """Attention of packed query, key and value: (B, N, 3, heads, head_dim) -> (B, N, heads, head_dim)."""
    out: Tensor = packed_forward(packed)[0]
    return out


@custom_op("nova_video::flash_attention", mutates_args=())
def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Result (B, S, heads, head_dim) and logarithms of the sums of exponentials (B, heads, S), float32."""
    out, sums = kernels()._flash_attn_fwd(query, key, value, return_lse=True)[:2]
    return out, sums


@custom_op("nova_video::flash_attention_backward", mutates_args=())
def backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    to_query, to_key, to_value = kernels()._flash_attn_bwd(query, key, value, out, gradient.contiguous(), sums)[:3]
    return to_query, to_key, to_value


@custom_op("nova_video::flash_attention_packed", mutates_args=())
def packed_forward(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Forward pass on packed query, key and value, as `forward`."""
    out, sums = kernels()._flash_attn_fwd(*packed.unbind(2), return_lse=True)[:2]
    return out, sums


@custom_op("nova_video::flash_attention_packed_backward", mutates_args=())
def packed_backward(gradient: Tensor, packed: Tensor, out: Tensor, sums: Tensor) -> Tensor:
    """The gradient of all three."""
    made = torch.empty_like(packed)
    to_query, to_key, to_value = made.unbind(2)
    kernels()._flash_attn_bwd(*packed.unbind(2), out, gradient.contiguous(), sums, dq=to_query, dk=to_key, dv=to_value)
    return made


@cache
def kernels() -> Any:
    """The package's functions of single kernels: its public ones are no operators that torch.compile could call."""
    return importlib.import_module("flash_attn.cute.interface")


@register_fake(forward)
def _shapes(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch, count, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(batch, heads, count, dtype=torch.float32)


@register_fake(backward)
def _gradient_shapes(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)  # each laid out as its tensor


@register_fake(packed_forward)
def _packed_shapes(packed: Tensor) -> tuple[Tensor, Tensor]:
    batch, count, _, heads, channels = packed.shape
    return packed.new_empty(batch, count, heads, channels), packed.new_empty(batch, heads, count, dtype=torch.float32)


@register_fake(packed_backward)
def _packed_gradient_shape(gradient: Tensor, packed: Tensor, out: Tensor, sums: Tensor) -> Tensor:
    return torch.empty_like(packed)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx: Any, to_out: Tensor, to_sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sums are nobody's input."""
    gradients: tuple[Tensor, Tensor, Tensor] = backward(to_out, *ctx.saved_tensors)
    return gradients


register_autograd(forward, _gradients, setup_context=_keep)


def _packed_gradient(ctx: Any, to_out: Tensor, to_sums: Tensor) -> Tensor:
    made: Tensor = packed_backward(to_out, *ctx.saved_tensors)
    return made


register_autograd(packed_forward, _packed_gradient, setup_context=_keep)
