"""The settings of a checkpoint besides its weights: defaults of requests, name of the text encoder."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from nova_video.common.errors import InputError
from nova_video.common.option_fields import aliases_of, check_options, option_fields, with_aliases
from nova_video.io.checkpoints import find_beside
from nova_video.io.text import decode_text, parse_json
from nova_video.pipeline.options import Options
from nova_video.sampling.schedulers import TrainedNoise
from nova_video.text.vocabulary import Vocabulary

SETTINGS_FILE = "nova.json"


def _released_default(name: str, value: float | None) -> Any:
    """A field with the released models' value of an option, and that option's bounds and help."""
    return field(default=value, metadata=option_fields(Options)[name].metadata)


@with_aliases
@dataclass(frozen=True)
class Defaults:
    """The default values of a checkpoint: those of the released models, unless its folder has others."""

    num_frames: int = _released_default("num_frames", 1)
    fps: float = _released_default("fps", 12)
    sets: int = _released_default("sets", 64)
    diffusion_steps: int = _released_default("diffusion_steps", 25)
    guidance_scale: float = _released_default("guidance_scale", 5.0)
    motion_flow: float = _released_default("motion_flow", 5.0)
    context_frames: int | None = _released_default("context_frames", None)
    sink_frames: int = _released_default("sink_frames", 1)
    reanchor_frames: int = _released_default("reanchor_frames", 0)

    def __post_init__(self) -> None:
        check_options(self)


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
        settings = cls.from_json(values, path)
        text = None if settings.text_encoder is None else find_beside(settings.text_encoder, folder)
        return replace(settings, text_encoder=text, vocabulary=vocabulary)

    @classmethod
    def from_json(cls, values: object, path: str | Path = SETTINGS_FILE) -> "CheckpointSettings":
        """Settings from what JSON holds; `path` is where errors say that it comes from."""
        _check_keys(path, "", values, ["text_encoder", "defaults"])
        assert isinstance(values, dict)
        name = values.get("text_encoder")
        if name is not None and not (isinstance(name, str) and name):
            raise InputError(f"{path}: text_encoder is {name!r}: expected the name of a text encoder")
        defaults = values.get("defaults", {})
        own = [setting.name for setting in fields(Defaults)]
        _check_keys(path, "defaults.", defaults, own, tuple(aliases_of(Defaults)))
        try:
            return cls(name, Defaults(**defaults))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def as_json(self) -> dict[str, Any]:
        """The JSON form that `from_json` reads."""
        named = {} if self.text_encoder is None else {"text_encoder": self.text_encoder}
        return {**named, "defaults": asdict(self.defaults)}

    def save(self, folder: Path) -> None:
        (folder / SETTINGS_FILE).write_text(json.dumps(self.as_json(), indent=2) + "\n", encoding="utf-8")
        if self.vocabulary is not None:
            self.vocabulary.save(folder)


def _check_keys(
    path: str | Path, prefix: str, values: object, known: Sequence[str], aliases: Sequence[str] = ()
) -> None:
    if not isinstance(values, dict):
        raise InputError(f"{path}: {prefix.rstrip('.') or 'the file'} is {values!r}: expected an object")
    for key in values:
        if key not in known and key not in aliases:
            raise InputError(f"{path}: unknown key {prefix}{key}: expected one of {', '.join(known)}")
