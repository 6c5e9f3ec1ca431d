"""The past that the temporal encoder reads: all of it or a bounded context; and settings against drift.

A bounded context is laid out as a short clip of its own, first frames and then recent ones, and encoded anew for every
frame: its positions are those of a clip of that length, so that the model never meets one it was not trained on, with
absolute and with rotary positions alike. Plain functions and records; `generate.py` uses them.

Legend: B batch, C latent channels, h w latent grid.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

REFERENCE_FRAMES = 5  # latent frames whose statistics later ones are drawn to


@dataclass(frozen=True)
class Context:
    """Settings of one request. All counts are of latent frames."""

    frames: int | None = None
    """Longest clip that the temporal encoder is shown, the frame being made included; None: however long it is."""
    sink: int = 1
    """First frames that a bounded context keeps (attention sinks, arXiv 2309.17453)."""
    carry: int = 1
    """Frames from before a change of prompt that are read after it."""
    reanchor: int | None = None
    """Every so many frames the context is cut back to the first frames and the newest one."""
    history_noise: float = 0.0
    """Standard deviation of the noise on the frames that are read."""
    hold_statistics: float = 0.0
    """0 to 1: how far a new frame's channel statistics are drawn to those of the first frames."""

    def read(self, frame: int, begin: int = 0) -> list[int]:
        """Earlier frames that `frame` is made from, in order; nothing before `begin` counts."""
        recent = begin
        if self.reanchor is not None and frame - begin >= self.reanchor:
            recent = frame - (frame - begin) % self.reanchor - 1
        if self.frames is not None and frame - begin >= self.frames:
            recent = max(recent, frame - (self.frames - 1 - self.sink))
        kept = min(begin + self.sink, recent)
        return [*range(begin, kept), *range(recent, frame)]

    def slots(self, num_frames: int | None) -> int:
        """Places in the context of a clip of `num_frames`; None: without end."""
        if num_frames is None or self.frames is None:
            length = num_frames if self.frames is None else self.frames
            assert length is not None  # a clip without end has a bounded context: checked with the request
            return length
        return min(num_frames, self.frames)


@dataclass(frozen=True)
class Statistics:
    """Mean and deviation of every channel (B, C, 1, 1), averaged over `count` frames."""

    begin: int
    """Frame that the first prompt or the latest change of it starts from: what is measured is of one scene."""
    count: int
    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, latents: Tensor, begin: int) -> "Statistics":
        deviation, mean = torch.std_mean(latents.float(), dim=(2, 3), keepdim=True)
        return cls(begin, 1, mean, deviation)

    def joined(self, other: "Statistics") -> "Statistics":
        """The average of these `count` frames and one more."""
        share = 1 / (self.count + 1)
        return replace(
            self,
            count=self.count + 1,
            mean=self.mean.lerp(other.mean, share),
            deviation=self.deviation.lerp(other.deviation, share),
        )


def hold_statistics(latents: Tensor, reference: Statistics, strength: float) -> Tensor:
    """latents (B, C, h, w) with every channel's mean and deviation moved towards the reference's."""
    own = Statistics.of(latents, reference.begin)
    scale = reference.deviation / own.deviation.clamp_min(torch.finfo(torch.float32).eps)
    held = (latents.float() - own.mean) * scale + reference.mean
    return latents.float().lerp(held, strength).to(latents.dtype)
