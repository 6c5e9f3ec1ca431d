"""The motion of a clip: mean optical-flow magnitude in pixels a frame (Farneback)."""

from itertools import pairwise

import numpy as np

from nova_video.common.errors import InputError
from nova_video.common.extras import install_command


def flow_magnitude(frames: np.ndarray, every: int = 1) -> float:
    """Mean Farneback flow magnitude of one clip, frames (F, H, W, 3) uint8. Only each `every`-th pair is measured."""
    return float(np.mean(flow_magnitudes(frames, every)))


def flow_magnitudes(frames: np.ndarray, every: int = 1) -> list[float]:
    """Flow magnitude of each measured pair of frames: 0 and 1, then `every` and its next one, and so on."""
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
