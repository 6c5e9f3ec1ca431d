"""The motion score: mean optical-flow magnitude in pixels a frame, what conditions the model on how much moves.

Farneback flow is slow beside rendering, so it is measured once, when a world is prepared, over a sample of every
(motion, speed, size), and kept as a table with its spread; training looks scores up.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nova_worlds.rendering.clips import SIZES

SIZE_BUCKETS = 4  # equal parts of SIZES


@dataclass(frozen=True, eq=False)
class MotionTable:
    """Scores in pixels a frame, by (motion, speed, size bucket): their mean and standard deviation over the sample."""

    mean: Tensor
    std: Tensor

    def lookup(self, motion: Tensor, speed: Tensor, size: Tensor) -> Tensor:
        return self.mean[motion, speed, size_bucket(size)]  # (N,)

    def to(self, device: torch.device | str) -> "MotionTable":
        return MotionTable(self.mean.to(device), self.std.to(device))


def size_bucket(size: Tensor) -> Tensor:
    low, high = SIZES
    return ((size - low) / (high - low) * SIZE_BUCKETS).long().clamp(0, SIZE_BUCKETS - 1)
