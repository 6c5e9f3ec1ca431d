"""Attention and its one mask: the block-causal one of the temporal encoder (figure 2 of the paper), in two forms.

A tensor is read by plain attention anywhere. A `BlockMask` is read by flex attention, which skips what is hidden
instead of computing it: for training on a GPU, as it has no backward on a CPU. Both are made of the same numbers.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from nova_video.common.checks import AttentionKernels
from nova_video.common.devices import compile_every_variant
from nova_video.fast import flash

Mask = Tensor | BlockMask
"""Which column a row may attend to: (N, N) bool, or (B, 1, 1, N) bool of columns that are there at all."""

FLEX_HEAD_DIM = 16
"""Channels of a head that flex attention needs at least; it takes any number from there."""

CUDNN_TILE = 128
"""Tokens that cuDNN's kernels take at a time. Steps whose lengths are no multiples of it have had gradients of NaN from
them (torch 2.11, cuDNN 9.19, H200)."""

OTHER_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""All of torch's but cuDNN's."""


def block_numbers(condition_tokens: int, frame_tokens: int, num_frames: int, device: torch.device) -> Tensor:
    """(N,) of every token: condition and frame 0 form block 0, each later frame one block."""
    first = torch.zeros(condition_tokens, dtype=torch.long, device=device)
    return torch.cat([first, torch.arange(num_frames, device=device).repeat_interleave(frame_tokens)])


def block_causal_mask(condition_tokens: int, frame_tokens: int, num_frames: int, device: torch.device) -> Tensor:
    """(N, N) bool, True where row may attend to column: a token sees its own block and all earlier ones."""
    block = block_numbers(condition_tokens, frame_tokens, num_frames, device)
    return block.unsqueeze(1) >= block.unsqueeze(0)


def flex_block_causal_mask(
    condition_tokens: int, frame_tokens: int, num_frames: int, device: torch.device
) -> BlockMask:
    """The same for flex attention."""
    block = block_numbers(condition_tokens, frame_tokens, num_frames, device)

    def sees(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return block[row] >= block[column]

    return create_block_mask(sees, None, None, len(block), len(block), device=device)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask | None) -> Tensor:
    """Scaled dot product attention: query (B, heads, S, head_dim), key, value (B, heads, N, head_dim) -> as query.

    FlashAttention 4 where it is installed and suits; but a call of it takes a tenth of a millisecond in Python, which
    only compiled or trained blocks are worth. Else without gradients torch chooses its kernels freely; with them,
    cuDNN's are left out where they are not safe.
    """
    if mask is None or isinstance(mask, Tensor):
        if mask is None and takes_flash(query, key):
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, N, heads, head_dim)
            return flash.attend(query, key, value).transpose(1, 2)
        if query.is_cuda and query.requires_grad and not suits_cudnn(query, key, mask):
            return attend_without_cudnn(query, key, value, mask)
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    if query.is_cuda and not torch.compiler.is_compiling():
        return _compiled_flex()(query, key, value, block_mask=mask)
    out: Tensor = flex_attention(query, key, value, block_mask=mask)
    return out


def attend_packed(packed: Tensor, mask: Mask | None) -> Tensor:
    """The same where all are of the same tokens, in one: (B, N, 3, heads, head_dim) -> (B, N, heads, head_dim)."""
    query, key, value = packed.unbind(2)
    if mask is None and takes_flash(query, key):
        return flash.attend_packed(packed)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return attend(query, key, value, mask).transpose(1, 2)


def takes_flash(query: Tensor, key: Tensor) -> bool:
    """Whether FlashAttention 4 suits these, and is worth its call."""
    return (torch.compiler.is_compiling() or query.requires_grad) and flash.suits(query, key)


def allow_kernels(kernels: AttentionKernels) -> None:
    """Which kernels may be taken from now on where nothing is masked. What was compiled before keeps those it has."""
    flash.allowed = kernels == "auto"
    torch.backends.cuda.enable_cudnn_sdp(kernels != "flash")


def allowed_kernels() -> AttentionKernels:
    """As last set, or as torch has them."""
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return "flash"
    return "auto" if flash.allowed else "cudnn"


def suits_cudnn(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether cuDNN's gradients are safe: nothing is masked, and both lengths are whole tiles."""
    return mask is None and query.shape[2] % CUDNN_TILE == 0 and key.shape[2] % CUDNN_TILE == 0


def attend_without_cudnn(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The same with any other kernels."""
    with sdpa_kernel(OTHER_KERNELS):
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    """Uncompiled, flex attention would hold every score. Each size is compiled for itself: its fastest kernels."""
    compile_every_variant()
    return torch.compile(flex_attention, dynamic=False)
