"""The model's parts with other ways to compute the same: kernels on a GPU, and tables instead of repeated work.

`arrange.py` makes them over the layers of the plain parts that they stand for, so that weights and their names stay.
Blocks with kernels are for `torch.compile`; uncompiled, launches would cost what kernels save.
"""

from collections.abc import Callable
from functools import cache
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nova_video.common.checks import AttentionKernels
from nova_video.common.devices import compile_every_variant
from nova_video.fast.attention_choice import Mask, attend, attend_packed, temporal_mask
from nova_video.fast.gelu import gelu_of
from nova_video.fast.linear import apply_linear
from nova_video.fast.norm import add_gated, modulate, norm_of
from nova_video.model.denoiser import AdaLayerNorm, DenoiserBlock, TimeCondEmbed
from nova_video.model.embeddings import Rotary
from nova_video.model.patches import gather_tokens
from nova_video.model.transformer import VideoEncoder
from nova_video.model.vit import Attention, Block, CacheLayer, heads_for_width


def heads_joined(
    attn: Attention,
    x: Tensor,
    rotary: Rotary | None,
    mask: Mask | None,
    cache: CacheLayer | None,
    rows: Tensor | None,
    kernels: AttentionKernels,
) -> Tensor:
    """The output of `attn` before its projection: (B, N, D) -> (B, N or S, D)."""
    batch, count, width = x.shape
    heads = index(attn.heads)  # where blocks are sharded torch.compile would take any number, and lay out for none
    qkv = apply_linear(attn.qkv, x).view(batch, count, 3, heads, width // heads)  # (B, N, 3, heads, head_dim)
    if rotary is None and cache is None and rows is None:
        return attend_packed(qkv, mask, kernels).reshape(batch, count, width)
    query, key, value = qkv.unbind(2)
    if rotary is not None:
        query, key = rotary.rotate(qkv[:, :, :2]).unbind(2)
    if rows is not None:
        query = gather_tokens(query.flatten(2), rows).unflatten(2, (heads, -1))  # (B, S, heads, head_dim)
    query, key, value = (y.transpose(1, 2) for y in (query, key, value))  # (B, heads, N, head_dim)
    if cache is not None:
        key, value = cache.append(key, value)
    return attend(query, key, value, mask, kernels).transpose(1, 2).reshape(batch, -1, width)


class FastAttention(Attention):
    """Attention by the fastest kernels that suit, in blocks that are not compiled."""

    kernels: AttentionKernels = "auto"

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        mask: Mask | None = None,
        cache: CacheLayer | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        return self.proj(heads_joined(self, x, rotary, mask, cache, rows, self.kernels))


class FastBlock(Block):
    """A block with kernels for its attention, GELU and norms, and for their gradients."""

    kernels: AttentionKernels = "auto"

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        mask: Mask | None = None,
        cache: CacheLayer | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        y = heads_joined(self.attn, x, rotary, mask, cache, rows, self.kernels)
        y = norm_of(self.norm1, self.attn.proj, y).to(x.dtype)
        x = (x if rows is None else gather_tokens(x, rows)) + y
        return x + norm_of(self.norm2, self.mlp.fc2, gelu_of(self.mlp.fc1, x)).to(x.dtype)


class CompiledBlock(FastBlock):
    """A fast block that is compiled once for all blocks of a model."""

    def forward(self, *args: Any) -> Tensor:
        out: Tensor = compile_function(FastBlock.forward)(self, *args)
        return out


class FastVideoEncoder(VideoEncoder):
    """A temporal encoder of fast blocks: its mask is in the form that suits the device."""

    def causal_mask(self, condition_tokens: int, frame_tokens: int, num_frames: int, device: torch.device) -> Mask:
        width = self.norm.weight.shape[0]
        head_dim = width // heads_for_width(width)
        return temporal_mask(condition_tokens, frame_tokens, num_frames, device, head_dim)


class FastAdaLayerNorm(AdaLayerNorm):
    """An adaptive norm with kernels for its gradients."""

    def forward(self, x: Tensor, active: Tensor) -> tuple[Tensor, ...]:
        scale, shift, *gate = self.proj(active).chunk(self.chunks, dim=-1)
        return modulate(x, scale, shift), *gate


class FastDenoiserBlock(DenoiserBlock):
    """A block of the denoiser with kernels for the gradients of its norms."""

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        scale, shift, gate = self.norm1.proj(active).chunk(3, dim=-1)
        return add_gated(x, gate, self.norm2, self.proj(modulate(x, scale, shift)))


class TableTimeEmbed(TimeCondEmbed):
    """Embeds each timestep of a noise table once, and looks those of the tokens up.

    A timestep that is not in the table is NaN: looking for one would make the CPU wait for the GPU.
    """

    timesteps: Tensor  # (K,)

    def embed_times(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        embedded = super().embed_times(self.timesteps, dtype)  # (K, width)
        count = len(embedded)
        ordered, place = self.timesteps.sort()
        nearest = torch.searchsorted(ordered, timestep.contiguous()).clamp(max=count - 1)
        row = torch.where(ordered[nearest] == timestep, place[nearest], count)
        missing = torch.full_like(embedded[:1], torch.nan)
        return functional.embedding(row, torch.cat([embedded, missing]))


@cache
def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function, compiled once for all blocks and any number of tokens."""
    compile_every_variant()
    return torch.compile(function, dynamic=True)
