"""The motion score: mean optical-flow magnitude in pixels a frame, what conditions the model on how much moves.

Farneback flow is slow beside rendering, so it is measured once, when a world is prepared, over a sample of every
(motion, speed, size), and kept as a table with its spread; training looks scores up.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from nova_video.data.clips import SIZES
from nova_video.errors import InputError
from nova_video.extras import install_command

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


def flow_magnitude(frames: np.ndarray, every: int = 1) -> float:
    """Mean Farneback flow magnitude of one clip, frames (F, H, W, 3) uint8; of pairs of frames, only each
    `every`-th is measured."""
    return float(np.mean(flow_magnitudes(frames, every)))


def flow_magnitudes(frames: np.ndarray, every: int = 1) -> list[float]:
    """The same of each pair of frames that is measured: 0 and 1, then `every` and the one after it, and so on."""
    try:
        import cv2
    except ImportError as error:
        raise InputError(f"optical flow needs OpenCV: {install_command('train')}") from error
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    magnitudes = []
    for before, after in list(pairwise(gray))[::every]:
        flow = cv2.calcOpticalFlowFarneback(before, after, None, 0.5, 3, 15, 3, 5, 1.2, 0)  # (H, W, 2)
        magnitudes.append(float(np.linalg.norm(flow, axis=-1).mean()))
    return magnitudes
