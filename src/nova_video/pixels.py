"""Between the pictures people hold and the tensors autoencoders take: a given image in, generated pixels out."""

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def image_to_pixels(image: Image.Image | np.ndarray, size: tuple[int, int]) -> Tensor:
    """A picture of any size -> (1, 3, H, W) float32 in [-1, 1]: resized to cover (H, W), centre-cropped.

    The exact size is used as it is, bit for bit.
    """
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    picture = picture.convert("RGB")
    height, width = size
    if picture.size != (width, height):
        picture = ImageOps.fit(picture, (width, height), method=Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.array(picture))  # (H, W, 3) uint8
    return ((values.float() - 127.5) / 127.5).permute(2, 0, 1).unsqueeze(0)


def pixels_to_output(pixels: Tensor, output_type: str) -> Any:
    """Clips (B, 3, F, H, W) in [-1, 1] -> one entry each, in the form of `output_type`.

    pt: (B, F, 3, H, W) and np: (B, F, H, W, 3), float32 in [0, 1]; pil: lists of pictures.
    """
    frames = (pixels.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)  # (B, F, 3, H, W)
    if output_type == "pt":
        return frames
    arrays = frames.permute(0, 1, 3, 4, 2).cpu().numpy()  # (B, F, H, W, 3)
    if output_type == "np":
        return arrays
    return [[Image.fromarray(frame) for frame in clip] for clip in (arrays * 255).round().astype(np.uint8)]
