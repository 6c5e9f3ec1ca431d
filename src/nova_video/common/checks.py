"""Checks of values, the bounds that hold for every model, and how a value is shown in a message."""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nova_video.common.errors import InputError

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)")  # also as Path leaves one; C:/ is none

AttentionKernels = Literal["auto", "cudnn", "flash"]
"""The best kernels that attention may take on a GPU: FlashAttention 4, cuDNN's, torch's own."""


def check_number(
    name: str,
    value: object,
    low: float,
    *,
    integer: bool = False,
    above: bool = False,
    high: float | None = None,
    below: bool = False,
    hint: str = "",
) -> None:
    """Refuses a `value` that is not a finite number from `low` to `high`.

    With `above` it must be more than `low`, with `below` less than `high`.
    """
    kinds = (int, np.integer) if integer else (int, float, np.integer, np.floating)
    if isinstance(value, kinds) and not isinstance(value, bool) and is_finite(value):  # compared exactly, as it is
        fits = high is None or value < high or (value == high and not below)
        if fits and value >= low and not (above and value == low):
            return
    bound = f"{'more than' if above else 'at least'} {low:g}"
    bound += "" if high is None else f" and {'less than' if below else 'at most'} {_bound(high)}"
    raise InputError(
        f"{name} is {quote(value)}: expected {'a whole number' if integer else 'a number'} of {bound}{hint}"
    )


def _bound(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) and number >= 10_000 else f"{number:g}"


def check_whether(name: str, value: object) -> None:
    """`value` is True, False or None, or an InputError."""
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{name} is {quote(value)}: expected True or False")


def shorten(text: str, length: int = 200) -> str:
    """Text for a message, cut where it is long."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def quote(value: object, length: int = 60) -> str:
    """A value for a message, cut where it is long: integers may have more digits than Python writes."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits than Python writes, or endless nesting
        return f"a number of about {int(value).bit_length() * 0.30103:.0f} digits" if isinstance(value, int) else "?"
    return shorten(" ".join(text.split()), length)


@dataclass(frozen=True)
class Limits:
    """Upper bounds of one request, for every model. More is a typing error, and would fail after a long wait.

    `plan.py` also estimates the memory of a request and compares it with `GenerateRequest.memory_gb`.
    """

    side: int = 16_384
    """Height and width in pixels."""
    frames: int = 1_000_000
    """Pixel frames of a clip with an end, and of its context."""
    pictures: int = 10_000
    """Pictures or clips of one call: prompts times num_images_per_prompt."""
    sets: int = 65_536
    diffusion_steps: int = 100_000
    """Also at most those that the noise schedule was trained with."""
    least_fps: float = 0.1
    fps: float = 1_000.0
    seconds: float = 1_000_000.0
    scale: float = 1_000.0
    """Guidance scales, the shift of a schedule, scales of adapters, standard deviations of noise."""
    motion: float = 100_000.0
    """Pixels a frame."""


LIMITS = Limits()


def is_finite(value: Any) -> bool:
    """True if a number is finite as a float; integers of hundreds of digits are not."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_local(name: str, place: str | Path, hint: str = "") -> None:
    """Refuses a URL as a place to write to; otherwise a folder with that name would appear here."""
    if (match := URL.match(str(place))) is not None:
        raise InputError(f"{name} is {match[1]}://{match[2]}: expected a local folder{hint}")


MAX_PIXELS = 2**29


def max_pixels() -> int:
    """The budget of a file in pixels times frames, 2^29 unless NOVA_MAX_PIXELS says otherwise.

    It bounds what a picture, an animation, or a clip that is read as a whole may hold, and each frame of a video that
    is read frame by frame. A pixel takes 3 bytes.
    """
    text = os.environ.get("NOVA_MAX_PIXELS", "")
    if not text:
        return MAX_PIXELS
    if not re.fullmatch(r"[1-9]\d{0,17}", text):
        raise InputError(f"NOVA_MAX_PIXELS is {text!r}: expected a whole number of at least 1")
    return int(text)
