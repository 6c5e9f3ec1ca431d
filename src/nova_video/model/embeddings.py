"""The inputs of the encoders: text, motion and positions. Modules here hold weights only."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from nova_video.model.patches import token_positions

TABLE_LEN = 512  # rows of the padding table, in every release


def sinusoid(values: Tensor, frequencies: int = 128) -> Tensor:
    """[sin, cos] of `frequencies` frequencies 10000^(-i / frequencies): (...) -> (..., 2 * frequencies), float32."""
    exponent = torch.arange(frequencies, dtype=torch.float32, device=values.device) / frequencies
    angles = values.float().unsqueeze(-1) * 10000.0**-exponent
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def space_table(rows: int, columns: int, width: int, device: torch.device | None = None) -> Tensor:
    """Absolute positions of a row-major grid: [sin x, cos x, sin y, cos y] of D/4 frequencies -> (L, D)."""
    row, column = token_positions(rows, columns, device)
    return torch.cat([sinusoid(column, width // 4), sinusoid(row, width // 4)], dim=-1)


def rotary_angles(time: Tensor, row: Tensor, column: Tensor, head_dim: int) -> Tensor:
    """Angle of each adjacent pair of a head's channels at (time, row, column), all (N,) -> (N, head_dim / 2).

    head_dim is split over (time, row, column) as (d/8, (d - d/8)/2, (d - d/8)/2); theta is 10000 (RoFormer).
    """
    time_dim = head_dim // 8
    space_dim = (head_dim - time_dim) // 2
    parts = []
    for position, dim in ((time, time_dim), (row, space_dim), (column, space_dim)):
        exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=position.device) / dim
        parts.append(position.float().unsqueeze(-1) * 10000.0**-exponent)
    return torch.cat(parts, dim=-1)


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines (N, head_dim / 2) or, where tokens differ between samples, (B, N, head_dim / 2)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def from_angles(cls, angles: Tensor) -> "Rotary":
        return cls(angles.cos(), angles.sin())

    def after_condition(self, count: int) -> "Rotary":
        """These angles with `count` condition tokens in front, at position 0 (not rotated)."""
        shape = (*self.cos.shape[:-2], count, self.cos.shape[-1])
        return Rotary(
            torch.cat([self.cos.new_ones(shape), self.cos], dim=-2),
            torch.cat([self.sin.new_zeros(shape), self.sin], dim=-2),
        )

    def at(self, ids: Tensor) -> "Rotary":
        """Rows `ids` (B, S) of a table shared by all samples -> (B, S, head_dim / 2)."""
        return Rotary(self.cos[ids], self.sin[ids])

    def slice(self, start: int, stop: int) -> "Rotary":
        return Rotary(self.cos[..., start:stop, :], self.sin[..., start:stop, :])

    def rotate(self, x: Tensor) -> Tensor:
        """x (B, N, ..., heads, head_dim) with each adjacent pair rotated by its token's angle."""
        cos, sin = self.cos, self.sin  # ([B,] N, d/2)
        while cos.dim() < (x.dim() if self.cos.dim() == 3 else x.dim() - 1):
            cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        if not torch.compiler.is_compiling():  # the same product in one pass over the tensor
            pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


@dataclass(frozen=True)
class Positions:
    """Where tokens are, for one size and length; once per call. Absolute tables or rotary angles, never both."""

    num_frames: int
    time: Tensor | None  # (F, 1, D)
    video_space: Tensor | None  # (Lc, D)
    image_space: Tensor | None  # (L, D)
    video_rotary: Rotary | None  # (F * Lc, head_dim / 2)
    image_rotary: Rotary | None  # (L, head_dim / 2)

    @classmethod
    def absolute(cls, time: Tensor, grid: tuple[int, int], width: int) -> "Positions":
        """Tables for embedded frames `time` (F, 1, D) of `grid` = (rows, columns) spatial tokens."""
        video, image = (
            space_table(grid[0] // size, grid[1] // size, width, time.device).to(time.dtype) for size in (2, 1)
        )
        return cls(len(time), time, video, image, None, None)

    @classmethod
    def rotary(cls, num_frames: int, grid: tuple[int, int], head_dim: int, device: torch.device) -> "Positions":
        """Angles for frames of `grid` = (rows, columns) spatial tokens; the spatial encoder's have time 0."""
        row, column = token_positions(grid[0] // 2, grid[1] // 2, device)
        frame = torch.arange(num_frames, device=device).repeat_interleave(row.numel())
        video = rotary_angles(frame, row.repeat(num_frames), column.repeat(num_frames), head_dim)
        row, column = token_positions(*grid, device)
        image = rotary_angles(torch.zeros_like(row), row, column, head_dim)
        return cls(num_frames, None, None, None, Rotary.from_angles(video), Rotary.from_angles(image))

    @property
    def video_tokens(self) -> int:
        """Lc, the temporal encoder's tokens of a frame."""
        if self.video_rotary is not None:
            return self.video_rotary.cos.shape[0] // self.num_frames
        assert self.video_space is not None
        return self.video_space.shape[0]


class TextEmbed(nn.Module):
    """Prompt features over the head of a padding table, then LN(proj(.)).

    The table is a buffer: random, stored with the weights and never trained, as in the released models. The null
    prompt of classifier-free guidance is a prompt of length 0: the padding table alone.
    """

    def __init__(self, token_dim: int, token_len: int, width: int, table_len: int = TABLE_LEN) -> None:
        super().__init__()
        self.weight: Tensor
        self.token_len = token_len
        self.proj = nn.Linear(token_dim, width)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("weight", torch.empty(table_len, token_dim).normal_(std=0.02))

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """features (B, T', token_dim), T' <= token_len, of which the first lengths (B,) count -> (B, token_len, D)."""
        padding = self.weight[: self.token_len].expand(features.shape[0], -1, -1)  # (B, T, token_dim)
        head = features.shape[1]
        used = torch.arange(head, device=features.device) < lengths.unsqueeze(-1)  # (B, T')
        given = torch.where(used.unsqueeze(-1), features.to(padding.dtype), padding[:, :head])
        return self.norm(self.proj(torch.cat([given, padding[:, head:]], dim=1)))


class MotionEmbed(nn.Module):
    """Motion score (mean optical flow) and frames per second, one token each (section 3.1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.flow_proj = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.fps_proj = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, motion: Tensor, fps: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """motion (B,), fps (B,) -> (B, 2, D); `dtype` is what the model computes in."""
        tokens = [self.flow_proj(sinusoid(motion).to(dtype)), self.fps_proj(sinusoid(fps).to(dtype))]
        return torch.stack(tokens, dim=1)


class MaskEmbed(nn.Module):
    """Two learned tokens: `bos_token`, the temporal input of frame 0, and `mask_token`, a token not yet revealed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bos_token = nn.Parameter(torch.empty(1, width).normal_(std=0.02))
        self.mask_token = nn.Parameter(torch.empty(1, width).normal_(std=0.02))


class VideoPosEmbed(nn.Module):
    """Absolute time positions of the temporal encoder; frame indices are scaled to the length trained on."""

    def __init__(self, width: int, base_frames: int) -> None:
        super().__init__()
        self.base_frames = base_frames
        self.time_proj = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, num_frames: int) -> Tensor:
        """(F, 1, D): one embedding a frame, for all its tokens."""
        weight = self.norm.weight
        index = torch.arange(num_frames, device=weight.device) * (self.base_frames / num_frames)
        return self.norm(self.time_proj(sinusoid(index).to(weight.dtype))).unsqueeze(1)


def timestep_frequencies(timestep: Tensor) -> Tensor:
    """[cos, sin] of 128 frequencies exp(-ln(10000) i / 128): (...) -> (..., 256), float32 (as in DiT)."""
    exponent = torch.arange(128, dtype=torch.float32, device=timestep.device) * (-math.log(10000.0) / 128)
    angles = timestep.float().unsqueeze(-1) * exponent.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Mixer(nn.Module):
    """Scale-and-shift of the first frame's feature by the current one's (section 3.2): c_0 * (1 + s) + b."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.lora = nn.Linear(width, rank, bias=False) if rank > 0 else nn.Identity()
        self.proj = nn.Linear(rank if rank > 0 else width, 2 * width)

    def forward(self, first: Tensor, feature: Tensor) -> Tensor:
        """first, feature (..., Lc, D) -> (..., Lc, D)."""
        scale, shift = self.proj(self.lora(functional.silu(feature))).chunk(2, dim=-1)
        return first * (1 + scale) + shift
