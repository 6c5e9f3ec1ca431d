"""Between the pictures people hold and the tensors autoencoders take: a given image in, generated pixels out."""

from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from nova_video.io.fit import fit_frames
from nova_video.io.inputs import to_pixels


def image_to_pixels(image: Image.Image | np.ndarray, size: tuple[int, int]) -> Tensor:
    """A picture of any size -> (1, 3, H, W) float32 in [-1, 1]: resized to cover (H, W), centre-cropped.

    The exact size is used as it is, bit for bit.
    """
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    frames = np.asarray(picture.convert("RGB"))[None]  # (1, H, W, 3) uint8
    return to_pixels(fit_frames(frames, size)).transpose(0, 1)


def to_bytes(frames: np.ndarray) -> np.ndarray:
    """Frames, uint8 or floats in [0, 1] -> uint8."""
    return frames if frames.dtype == np.uint8 else (frames * 255).round().astype(np.uint8)


def unit_frames(pixels: Tensor) -> Tensor:
    """Decoded clips (B, 3, F, H, W) in [-1, 1] -> frames (B, F, 3, H, W), float32 in [0, 1]."""
    return (pixels.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)


def output_form(frames: Tensor, output_type: str) -> Any:
    """Frames (B, F, 3, H, W) in [0, 1] -> one entry a clip, in the form of `output_type`.

    pt: as they are; np: (B, F, H, W, 3), float32 in [0, 1]; pil: lists of pictures.
    """
    if output_type == "pt":
        return frames
    arrays = frames.permute(0, 1, 3, 4, 2).cpu().numpy()  # (B, F, H, W, 3)
    if output_type == "np":
        return arrays
    return [[Image.fromarray(frame) for frame in clip] for clip in to_bytes(arrays)]
