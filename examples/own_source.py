"""An own source of data: pictures drawn by code, each with a caption. It could as well read a database or a service.

nova encode own_source:ColouredSquares -o dataset --size 64x64 --frames 1
"""

import io
from collections.abc import Iterator

from PIL import Image

COLOURS = ("red", "green", "blue", "yellow", "white", "black", "orange", "purple")


class ColouredSquares:
    """Samples in a fixed order: a name, the media (a file's bytes, path or URL), the caption."""

    fingerprint = "squares of eight colours, 64 pixels"  # another one: the samples are read and compared again

    def __iter__(self) -> Iterator[tuple[str, bytes, str]]:
        for colour in COLOURS:
            file = io.BytesIO()
            Image.new("RGB", (64, 64), colour).save(file, "PNG")
            yield f"{colour}.png", file.getvalue(), f"a {colour} square"
