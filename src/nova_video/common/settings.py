"""What a checkpoint says of itself beside its weights: the defaults of requests, and its text encoder's name.

Defaults and their bounds are written here and nowhere else; `request.py` and `plan.py` use them.
"""

import json
import math
import os
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nova_video.common.errors import InputError
from nova_video.io.text import decode_text, parse_json
from nova_video.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from nova_video.sampling.schedulers import TrainedNoise

SETTINGS_FILE = "nova.json"
SETS = " (it counts sets of tokens; the denoising steps of a set are num_diffusion_steps)"
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
    """`value` is a finite number of at least `low` (more than it with `above`) and at most `high` (less than it with
    `below`), or an InputError."""
    kinds = (int, np.integer) if integer else (int, float, np.integer, np.floating)
    if isinstance(value, kinds) and not isinstance(value, bool) and is_finite(value):  # compared exactly, as it is
        fits = high is None or value < high or (value == high and not below)
        if fits and value >= low and not (above and value == low):
            return
    bound = f"{'more than' if above else 'at least'} {low:g}"
    bound += "" if high is None else f" and {'less than' if below else 'at most'} {_bound(high)}"
    raise InputError(
        f"{name} is {shown(value)}: expected {'a whole number' if integer else 'a number'} of {bound}{hint}"
    )


def _bound(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) and number >= 10_000 else f"{number:g}"


def check_whether(name: str, value: object) -> None:
    """`value` is True, False or None, or an InputError."""
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{name} is {shown(value)}: expected True or False")


def shown(value: object, length: int = 60) -> str:
    """A value for a message, cut where it is long: integers may have more digits than Python writes."""
    try:
        text = repr(value)
    except ValueError:
        return f"a number of about {int(value).bit_length() * 0.30103:.0f} digits" if isinstance(value, int) else "?"
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 3]}..."


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for, of any model: more is a slip of the pen, and would fail after a long wait.

    What a request would take of memory is estimated besides (`plan.py`), against `GenerateRequest.memory_gb`.
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
    """Whether a number is finite as a float: integers of hundreds of digits are not."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_local(name: str, place: str | Path, hint: str = "") -> None:
    """`place`, which is written to, is a path: where a URL is meant, a folder of its name would be made here."""
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


@dataclass(frozen=True)
class Defaults:
    """What None means for one checkpoint: the released models' values, unless its folder says otherwise."""

    num_frames: int = 1
    """Pixel frames; 1 is an image."""
    fps: float = 12
    """Frames per second: told to the model and written into the file."""
    num_inference_steps: int = 64
    """Sets in which the tokens of a frame are revealed. Not denoising steps: those are `num_diffusion_steps`."""
    num_diffusion_steps: int = 25
    """Denoising steps of each set."""
    guidance_scale: float = 5.0
    """Classifier-free guidance; off at 1 and below."""
    motion_flow: float = 5.0
    """Motion score: mean optical flow in pixels a frame."""
    context_frames: int | None = None
    """Longest clip that the model is shown, in pixel frames; None: however long it is."""
    sink_frames: int = 1
    """First pixel frames that a bounded context keeps."""
    reanchor_frames: int = 0
    """Against drift: every so many pixel frames the context is cut back to the first frames and the newest one; 0:
    never."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None or name != "context_frames":
                check_setting(name, value)


def check_setting(name: str, value: object) -> None:
    """The bounds of the settings that have a default."""
    counts = {"num_inference_steps": LIMITS.sets, "num_diffusion_steps": LIMITS.diffusion_steps}
    hint = SETS if name == "num_inference_steps" else ""
    if name == "fps":
        check_number(name, value, LIMITS.least_fps, high=LIMITS.fps)
    elif name == "guidance_scale":
        check_number(name, value, 0, high=LIMITS.scale)
    elif name == "motion_flow":
        check_number(name, value, 0, high=LIMITS.motion)
    else:  # "reanchor_frames" is 0 for never
        check_number(
            name, value, name != "reanchor_frames", integer=True, high=counts.get(name, LIMITS.frames), hint=hint
        )


@dataclass(frozen=True)
class CheckpointSettings:
    """The optional `nova.json` and `vocabulary.json` beside a checkpoint's parts."""

    text_encoder: str | None = None
    """Looked up by name when a call needs it and the folder has no text_encoder/ of its own."""
    defaults: Defaults = Defaults()
    noise: "TrainedNoise | None" = field(default=None, compare=False)
    """The noise schedule that the weights were trained with; not in the file, since scheduler/ tells it."""
    vocabulary: Vocabulary | None = None
    """All words that the model knows, in a file of its own. None: any text."""

    @classmethod
    def load(cls, folder: Path) -> "CheckpointSettings":
        """Read from a checkpoint folder; the released values where there is no such file."""
        path, vocabulary = folder / SETTINGS_FILE, Vocabulary.load(folder)
        if not path.is_file():
            return cls(vocabulary=vocabulary)
        try:
            values = parse_json(decode_text(path.read_bytes()))
        except ValueError as error:
            raise InputError(f"{path}: not JSON ({error})") from None
        return replace(cls.from_json(values, path), vocabulary=vocabulary)

    @classmethod
    def from_json(cls, values: object, path: str | Path = SETTINGS_FILE) -> "CheckpointSettings":
        """Of what JSON holds; `path` is where errors say that it comes from."""
        _check_keys(path, "", values, ["text_encoder", "defaults"])
        assert isinstance(values, dict)
        name = values.get("text_encoder")
        if name is not None and not (isinstance(name, str) and name):
            raise InputError(f"{path}: text_encoder is {name!r}: expected the name of a text encoder")
        defaults = values.get("defaults", {})
        _check_keys(path, "defaults.", defaults, [setting.name for setting in fields(Defaults)])
        try:
            return cls(name, Defaults(**defaults))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        named = {} if self.text_encoder is None else {"text_encoder": self.text_encoder}
        return {**named, "defaults": asdict(self.defaults)}

    def save(self, folder: Path) -> None:
        (folder / SETTINGS_FILE).write_text(json.dumps(self.as_json(), indent=2) + "\n", encoding="utf-8")
        if self.vocabulary is not None:
            self.vocabulary.save(folder)


def _check_keys(path: str | Path, prefix: str, values: object, known: list[str]) -> None:
    if not isinstance(values, dict):
        raise InputError(f"{path}: {prefix.rstrip('.') or 'the file'} is {values!r}: expected an object")
    for key in values:
        if key not in known:
            raise InputError(f"{path}: unknown key {prefix}{key}: expected one of {', '.join(known)}")
