"""Frames of any size to a wanted one: resized to cover it, and cut alike from both sides.

Legend: F frames, H W pixels.
"""

import numpy as np
from PIL import Image


def cover_box(source: tuple[int, int], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part of a source (H, W) that fills `size`: as large as can be, from the centre (left, top, right, bottom)."""
    height, width = source
    ratio = size[1] / size[0]
    box_height, box_width = float(height), float(width)
    if width / height > ratio:
        box_width = ratio * height
    elif width / height < ratio:
        box_height = width / ratio
    left, top = (width - box_width) * 0.5, (height - box_height) * 0.5
    return left, top, left + box_width, top + box_height


def fit_frames(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Frames (F, H, W, 3) of any size -> the same kind, resized to cover (H, W) and centre-cropped.

    The exact size is used as it is, bit for bit.
    """
    if frames.shape[1:3] == size:
        return frames
    box = cover_box(frames.shape[1:3], size)
    if frames.dtype == np.uint8:
        return np.stack([_resize(frame, size, box) for frame in frames])
    planes = np.moveaxis(frames, 3, 1)  # (F, 3, H, W): pictures of floats have one channel
    fitted = np.stack([[_resize(np.ascontiguousarray(plane), size, box) for plane in frame] for frame in planes])
    return np.ascontiguousarray(np.moveaxis(fitted, 1, 3)).clip(0, 1)  # bicubic overshoots


def _resize(picture: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    image = Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
    return np.asarray(image)
