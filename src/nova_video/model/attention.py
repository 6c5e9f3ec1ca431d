"""Attention and its one mask, the block-causal one of the temporal encoder (figure 2 of the paper)."""

import torch
from torch import Tensor
from torch.nn import functional


def block_numbers(condition_tokens: int, frame_tokens: int, num_frames: int, device: torch.device) -> Tensor:
    """(N,) of every token: condition and frame 0 form block 0, each later frame one block."""
    first = torch.zeros(condition_tokens, dtype=torch.long, device=device)
    return torch.cat([first, torch.arange(num_frames, device=device).repeat_interleave(frame_tokens)])


def block_causal_mask(condition_tokens: int, frame_tokens: int, num_frames: int, device: torch.device) -> Tensor:
    """(N, N) bool, True where row may attend to column: a token sees its own block and all earlier ones."""
    block = block_numbers(condition_tokens, frame_tokens, num_frames, device)
    return block.unsqueeze(1) >= block.unsqueeze(0)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot product attention: query (B, heads, S, head_dim), key, value (B, heads, N, head_dim) -> as query.

    `mask` is True where a row may attend to a column, (S, N), or (B, 1, 1, N) for columns that are padding.
    """
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
