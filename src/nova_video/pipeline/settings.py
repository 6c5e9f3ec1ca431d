"""What a checkpoint says about itself beside its weights: the defaults of requests and its text encoder's name."""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from nova_video.common.checks import LIMITS, check_number
from nova_video.common.errors import InputError
from nova_video.io.text import decode_text, parse_json
from nova_video.sampling.schedulers import TrainedNoise
from nova_video.text.vocabulary import Vocabulary

SETTINGS_FILE = "nova.json"
SETS = " (it counts sets of tokens; the denoising steps of a set are num_diffusion_steps)"


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
    noise: TrainedNoise | None = field(default=None, compare=False)
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
