"""The transformer block both encoders are made of, and the temporal encoder's key/value cache.

Unusual against a standard ViT: post-norm inside the residual branch, x + LN(f(x)), and rotary positions over
(time, row, column) where a checkpoint asks for them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nova_video.model.attention import attend
from nova_video.model.embeddings import Rotary
from nova_video.model.patches import gather_tokens


class TemporalCache:
    """Keys and values of all earlier frames, for one request: made by the caller, handed to every step.

    Storage is allocated once for `capacity` tokens. `length` tokens of it are filled; every layer of a step appends
    behind them, and `advance` counts the step once all layers have.
    """

    def __init__(self, layers: int, batch: int, heads: int, capacity: int, head_dim: int, like: Tensor) -> None:
        self.keys = like.new_empty(layers, batch, heads, capacity, head_dim)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store key and value (B, heads, N, head_dim); returns that layer's so far (B, heads, length + N, head_dim)."""
        end = self.length + key.shape[2]
        if end > self.keys.shape[3]:
            raise ValueError(f"the temporal cache holds {self.keys.shape[3]} tokens; {end} were to be stored")
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, count: int) -> None:
        self.length += count

    def clear(self) -> None:
        """Forget everything; the storage stays."""
        self.length = 0

    def release(self) -> None:
        """Forget everything, and let go of the storage: nothing can be stored any more."""
        self.length = 0
        for storage in (self.keys, self.values):
            if storage.is_cuda:  # made on one CUDA stream, and perhaps read on another
                storage.record_stream(torch.cuda.current_stream(storage.device))
        self.keys = self.values = self.keys.new_empty(*self.keys.shape[:3], 0, self.keys.shape[-1])


@dataclass(frozen=True)
class CacheLayer:
    """One layer's door into a `TemporalCache`."""

    cache: TemporalCache
    layer: int

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.cache.append(self.layer, key, value)


class Attention(nn.Module):
    """Multi-head attention of tokens to one another, (B, N, D) -> (B, N, D), or (B, S, D) for the rows (B, S) alone."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        mask: Tensor | None = None,
        cache: CacheLayer | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (B, N, 3, heads, head_dim)
        query, key, value = qkv.unbind(2)
        if rotary is not None:
            query, key = rotary.rotate(qkv[:, :, :2]).unbind(2)
        if rows is not None:
            query = gather_tokens(query.flatten(2), rows).unflatten(2, (self.heads, -1))  # (B, S, heads, head_dim)
        query, key, value = (y.transpose(1, 2) for y in (query, key, value))  # (B, heads, N, head_dim)
        if cache is not None:
            key, value = cache.append(key, value)
        return self.proj(attend(query, key, value, mask).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, GELU, Linear, four times as wide inside; (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + LN(attn(x)), then x + LN(mlp(x)); (B, N, D) -> (B, N, D), or (B, S, D) for the rows (B, S) alone.

    All rows are attended to in any case. The sums keep the type of x, also under autocast, whose norms are float32.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.mlp = Mlp(width)
        self.norm2 = nn.LayerNorm(width)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        mask: Tensor | None = None,
        cache: CacheLayer | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        y = self.norm1(self.attn(x, rotary, mask, cache, rows)).to(x.dtype)
        x = (x if rows is None else gather_tokens(x, rows)) + y
        return x + self.norm2(self.mlp(x)).to(x.dtype)


def call_block(owner: nn.Module, block: nn.Module, *args: Any) -> Tensor:
    """Calls a block of `owner`. Under gradient checkpointing, the backward pass computes its insides a second time.

    diffusers' `enable_gradient_checkpointing` sets the switch and the function on every part that has the switch.
    """
    if owner.gradient_checkpointing and torch.is_grad_enabled():
        out: Tensor = owner._gradient_checkpointing_func(block, *args)  # type: ignore[operator]
        return out
    return block(*args)


def residual_stream(x: Tensor) -> Tensor:
    """x in the type of the blocks' sums: under autocast that of the products, which halves the bytes."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def heads_for_width(width: int) -> int:
    """Attention heads of the released sizes; any other width has heads of 32 channels."""
    return {768: 12, 1024: 16, 1536: 16}.get(width, width // 32)
