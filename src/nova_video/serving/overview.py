"""Small pictures of results: previews, thumbnails, and pages of a clip's frames."""

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from nova_video.data.sheets import spread
from nova_video.io.decode import open_media
from nova_video.io.media import PNG_KEY

SMALL, LARGE = 256, 512  # pixels: the longer side of a preview, and of a thumbnail
COLUMNS, MOST = 4, 16  # of a page of frames
CELL = 240  # pixels: the longer side of each


def small_webp(picture: NDArray[np.uint8]) -> bytes:
    """A preview of a picture (H, W, 3)."""
    return _webp(_within(picture, SMALL), quality=80)


def draw_thumbnail(picture: NDArray[np.uint8]) -> bytes:
    return _webp(_within(picture, LARGE), quality=90)


def as_png(picture: NDArray[np.uint8], record: dict[str, Any] | None = None) -> bytes:
    """A picture as a file, with its record inside."""
    file, chunks = io.BytesIO(), PngImagePlugin.PngInfo()
    if record is not None:
        chunks.add_text(PNG_KEY, json.dumps(record))
    Image.fromarray(picture).save(file, format="PNG", pnginfo=chunks)
    return file.getvalue()


def read_fragment(data: bytes) -> list[NDArray[np.uint8]]:
    """The frames of the head of a stream with one fragment behind it."""
    media = open_media(io.BytesIO(data), "fragment.mp4")
    try:
        return [frame.pixels() for _, _, frame in media.frames()]
    finally:
        media.close()


def draw_spritesheet(read: Callable[[int], bytes], fragments: int) -> bytes:
    """A page of up to 16 frames, evenly spread over the clip. `read` gives the head with the fragment of a number."""
    frames = [frame for number in spread(fragments, MOST) for frame in read_fragment(read(number))]
    cells = [_within(frames[index], CELL) for index in spread(len(frames), MOST)]
    columns, (width, height) = min(COLUMNS, len(cells)), cells[0].size
    page = Image.new("RGB", (columns * width, -(-len(cells) // columns) * height))
    for index, cell in enumerate(cells):
        page.paste(cell, (index % columns * width, index // columns * height))
    return _webp(page, quality=85)


def _within(picture: NDArray[np.uint8], side: int) -> Image.Image:
    """A picture whose longer side is at most so many pixels."""
    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def _webp(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, format="WEBP", quality=quality, method=2)
    return file.getvalue()
