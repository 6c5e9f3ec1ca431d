"""Attention by the fastest kernels that suit: FlashAttention 4, cuDNN's, torch's own, and flex attention for masks.

Where every mask is a tensor, these give what `model.attention.attend` gives. A `BlockMask` is read by flex attention,
which skips what is hidden instead of computing it: for training on a GPU, as it has no backward on a CPU.
"""

import logging
from collections.abc import Callable
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from nova_video.common.checks import AttentionKernels
from nova_video.common.devices import compile_every_variant
from nova_video.fast import flash
from nova_video.model.attention import block_causal_mask, block_numbers

Mask = Tensor | BlockMask
"""Which column a row may attend to: (N, N) bool, or (B, 1, 1, N) bool of columns that are no padding."""

FLEX_HEAD_DIM = 16
"""Channels of a head that flex attention needs at least; it takes any number from there."""

CUDNN_TILE = 128
"""Tokens that cuDNN's kernels take at a time. Steps whose lengths are no multiples of it have had gradients of NaN from
them (torch 2.11, cuDNN 9.19, H200)."""

OTHER_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""All of torch's but cuDNN's."""

log = logging.getLogger(__name__)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, kernels: AttentionKernels = "auto") -> Tensor:
    """Scaled dot product attention: query (B, heads, S, head_dim), key, value (B, heads, N, head_dim) -> as query.

    `kernels` bounds the choice: "auto" may take FlashAttention 4, "cudnn" all of torch's, "flash" torch's but cuDNN's.
    With gradients, cuDNN's are left out where they are not safe.
    """
    if isinstance(mask, BlockMask):
        if query.is_cuda and not torch.compiler.is_compiling():
            return _compiled_flex()(query, key, value, block_mask=mask)
        out: Tensor = flex_attention(query, key, value, block_mask=mask)
        return out
    if mask is None and kernels == "auto" and flash.suits(query, key):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, N, heads, head_dim)
        return flash.attend(query, key, value).transpose(1, 2)
    if query.is_cuda and (kernels == "flash" or (query.requires_grad and not suits_cudnn(query, key, mask))):
        return attend_without_cudnn(query, key, value, mask)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def attend_packed(packed: Tensor, mask: Mask | None, kernels: AttentionKernels = "auto") -> Tensor:
    """Attention of packed query, key and value: (B, N, 3, heads, head_dim) -> (B, N, heads, head_dim)."""
    query, key, value = packed.unbind(2)
    if mask is None and kernels == "auto" and flash.suits(query, key):
        return flash.attend_packed(packed)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return attend(query, key, value, mask, kernels).transpose(1, 2)


def suits_cudnn(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """True where cuDNN's gradients are safe: nothing is masked, and both lengths are whole tiles."""
    return mask is None and query.shape[2] % CUDNN_TILE == 0 and key.shape[2] % CUDNN_TILE == 0


def attend_without_cudnn(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention with any kernels but cuDNN's."""
    with sdpa_kernel(OTHER_KERNELS):
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    """Uncompiled, flex attention would hold every score. Each size is compiled for itself: its fastest kernels."""
    compile_every_variant()
    return torch.compile(flex_attention, dynamic=False)


# The temporal mask ----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def temporal_mask(
    condition_tokens: int, frame_tokens: int, num_frames: int, device: torch.device, head_dim: int
) -> Mask:
    """The block-causal mask, made once for each size: for flex attention where it works, else for plain attention."""
    make = flex_block_causal_mask if chooses_flex(device, head_dim) else block_causal_mask
    with torch.inference_mode(False):
        return make(condition_tokens, frame_tokens, num_frames, device)


def flex_block_causal_mask(
    condition_tokens: int, frame_tokens: int, num_frames: int, device: torch.device
) -> BlockMask:
    """The block-causal mask for flex attention."""
    block = block_numbers(condition_tokens, frame_tokens, num_frames, device)

    def sees(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return block[row] >= block[column]

    return create_block_mask(sees, None, None, len(block), len(block), device=device)


@cache
def chooses_flex(device: torch.device, head_dim: int) -> bool:
    """True if the temporal mask is for flex attention on this device; logs the choice, once."""
    reason = why_not_flex(device, head_dim)
    if reason is None:
        log.info("block-causal mask on %s: flex attention, which skips what is hidden", device)
    else:
        log.info("block-causal mask on %s: plain attention (%s)", device, reason)
    return reason is None


def why_not_flex(device: torch.device, head_dim: int) -> str | None:
    """The reason why flex attention cannot train here, or None. A GPU tries it, forward and back, on two blocks."""
    if device.type != "cuda":
        return "flex attention has no backward there"
    if head_dim < FLEX_HEAD_DIM:
        return f"heads of {head_dim} channels: flex attention needs {FLEX_HEAD_DIM}"
    try:
        with torch.enable_grad():  # wherever the first mask is wanted
            mask = flex_block_causal_mask(64, 64, 3, device)
            ones = torch.ones(3, 1, 1, 256, head_dim, device=device, dtype=torch.bfloat16, requires_grad=True)
            query, key, value = ones
            attend(query, key, value, mask).sum().backward()
            torch.cuda.synchronize(device)
    except Exception as error:  # no compiler, a GPU it does not know: the same numbers come without it
        return f"{flex_attention.__name__} fails here: {(str(error) or repr(error)).splitlines()[0]}"
    return None
