"""The transformer block both encoders are made of, and the temporal encoder's key/value cache.

Unusual against a standard ViT: post-norm inside the residual branch, x + LN(f(x)), and rotary positions over
(time, row, column) where a checkpoint asks for them.
"""

from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor, nn

from nova_video.fast.gelu import gelu_of
from nova_video.fast.linear import apply_linear
from nova_video.fast.norm import norm_of
from nova_video.model.attention import Mask, attend, attend_packed
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
    """What the heads find, side by side: (B, N, D) -> (B, N or S, D). `proj` is left to the norm behind it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        mask: Mask | None = None,
        cache: CacheLayer | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        batch, count, width = x.shape
        heads = index(self.heads)  # where blocks are sharded torch.compile would take any number, and lay out for none
        qkv = apply_linear(self.qkv, x).view(batch, count, 3, heads, width // heads)  # (B, N, 3, heads, head_dim)
        if rotary is None and cache is None and rows is None:
            return attend_packed(qkv, mask).reshape(batch, count, width)
        query, key, value = qkv.unbind(2)
        if rotary is not None:
            query, key = rotary.rotate(qkv[:, :, :2]).unbind(2)
        if rows is not None:
            query = gather_tokens(query.flatten(2), rows).unflatten(2, (heads, -1))  # (B, S, heads, head_dim)
        query, key, value = (y.transpose(1, 2) for y in (query, key, value))  # (B, heads, N, head_dim)
        if cache is not None:
            key, value = cache.append(key, value)
        out = attend(query, key, value, mask)
        return out.transpose(1, 2).reshape(batch, -1, width)


class Mlp(nn.Module):
    """The hidden layer, (B, N, D) -> (B, N, 4 D). `fc2` is left to the norm behind it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return gelu_of(self.fc1, x)


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
        mask: Mask | None = None,
        cache: CacheLayer | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        y = norm_of(self.norm1, self.attn.proj, self.attn(x, rotary, mask, cache, rows)).to(x.dtype)
        x = (x if rows is None else gather_tokens(x, rows)) + y
        return x + norm_of(self.norm2, self.mlp.fc2, self.mlp(x)).to(x.dtype)


def residual_stream(x: Tensor) -> Tensor:
    """What blocks are to add to: under autocast in the type that it multiplies in, as a model in that type has it, so
    that norms and sums, which the memory's rate bounds, move half as much."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def heads_for_width(width: int) -> int:
    """Attention heads of the released sizes; any other width has heads of 32 channels."""
    return {768: 12, 1024: 16, 1536: 16}.get(width, width // 32)
