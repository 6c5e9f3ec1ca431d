"""A clip written down: a TOML file for `nova generate --script`, with the command's flags and with scenes.

    seconds = 6
    seed = 3
    motion = 4

    [[scene]]
    at = 0
    prompt = "a whale moving left on a blue background"

    [[scene]]
    at = 2.5
    prompt = "a whale spinning clockwise on a blue background"
    motion = 8

A key is a flag, with underscores; paths start from the current folder, as those of flags do. A scene holds from its
second on, its motion and guidance until another scene has one. A sentence outside the scenes is the one at second 0.
"""

from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from nova_video.cli.arguments import Generate
from nova_video.common.checks import quote
from nova_video.common.errors import InputError
from nova_video.common.option_fields import aliases_of, is_timed, key_of, option_fields
from nova_video.io.text import read_toml
from nova_video.pipeline.options import Options

OPTIONS = option_fields(Options)
TIMELINE_KEYS = {key_of(each): name for name, each in OPTIONS.items() if is_timed(each)}
"""Options that may change in time: as written -> the field."""
BATCH_FLAGS = ("index", "engine", "workers", "threads", "ray")
"""Fields of `Generate` for batches alone."""
NOT_IN_SCRIPTS = (
    *("prompts", "prompt_at", "script", "resume", "like"),
    *(f"{key}_at" for key in TIMELINE_KEYS),
    *BATCH_FLAGS,
)
"""Fields of `Generate` that scenes stand for, or that are of one run."""
KEY_NAMES = {"video": "continue", **{name: key_of(each) for name, each in OPTIONS.items()}}
KEYS = {
    KEY_NAMES.get(field.name, field.name): field.name for field in fields(Generate) if field.name not in NOT_IN_SCRIPTS
}
"""Keys as written -> fields of `Generate`."""
ALIASES = {**aliases_of(Options), **{name: name for name in OPTIONS}}
SCENE_KINDS: dict[str, Any] = {"at": float, "prompt": str, **dict.fromkeys(TIMELINE_KEYS, float)}
KEY_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text in quotes",
    Path: "the name of a file in quotes",
}


def with_script(typed: Generate) -> Generate:
    """The settings of the script that --script names; flags that are given win."""
    assert typed.script is not None
    written = read_script(typed.script)
    given = {field.name: value for field in fields(Generate) if (value := getattr(typed, field.name)) != field.default}
    settings = replace(written, **given)
    if not settings.prompt and settings.video is None:
        first = f", the first scene is at {settings.prompt_at[0][0]:g}" if settings.prompt_at else ""
        raise InputError(f"{typed.script}: prompt is missing at second 0{first}: expected prompt, or a [[scene]] at 0")
    return settings


def read_script(path: Path) -> Generate:
    """The settings in a TOML file."""
    values = read_toml(path)
    scenes = values.pop("scene", [])
    if not isinstance(scenes, list) or not all(isinstance(scene, dict) for scene in scenes):
        raise InputError(f"{path}: scene is {scenes!r}: expected tables, each headed by [[scene]]")
    kinds = get_type_hints(Generate) | {"prompt": str}  # one sentence: a script is for one clip
    settings: dict[str, Any] = {}
    for key, value in values.items():
        name = field_of(key)
        if name is None:
            raise InputError(f"{path}: unknown key {key}: expected one of {', '.join(KEYS)}, or [[scene]]")
        if name in settings:
            raise InputError(f"{path}: {key} is there twice, under another name: expected one of them")
        checked = check_value(f"{path}: {key}", value, kinds[name])
        settings[name] = not checked if is_off(key) else checked
    for key, moments in _read_scenes(path, scenes).items():
        name = TIMELINE_KEYS.get(key, key)
        if moments and moments[0][0] == 0:
            if name in settings:
                raise InputError(f"{path}: {key} is there twice for second 0, in the scene at 0 and outside the scenes")
            settings[name] = moments.pop(0)[1]
        settings[f"{key}_at"] = tuple(moments)
    if "prompt" in settings:
        settings["prompt"] = (settings["prompt"],)
    return Generate(**settings)


def field_of(key: str) -> str | None:
    """The field of `Generate` for a key of a script or a record; aliases and no_NAME work too."""
    name = KEYS.get(key) or ALIASES.get(key)
    return key.removeprefix("no_") if is_off(key) else name


def is_off(key: str) -> bool:
    """True for no_NAME of an option that is on by default."""
    each = OPTIONS.get(key.removeprefix("no_"))
    return key.startswith("no_") and each is not None and each.default is True


def _read_scenes(path: Path, scenes: list[dict[str, Any]]) -> dict[str, list[tuple[float, Any]]]:
    """Reads the scenes: setting that changes -> (seconds, value) pairs."""
    timelines: dict[str, list[tuple[float, Any]]] = {key: [] for key in SCENE_KINDS if key != "at"}
    for number, scene in enumerate(scenes, 1):
        where = f"{path}: scene {number}"
        for key in scene:
            if key not in SCENE_KINDS:
                raise InputError(f"{where}: unknown key {key}: expected one of {', '.join(SCENE_KINDS)}")
        for key in ("at", "prompt"):
            if key not in scene:
                raise InputError(f"{where} has no {key}: expected one")
        checked = {key: check_value(f"{where}: {key}", value, SCENE_KINDS[key]) for key, value in scene.items()}
        at = checked.pop("at")
        for key, value in checked.items():
            timelines[key].append((at, value))
    for before, after in pairwise(at for at, _ in timelines["prompt"]):
        if after <= before:
            raise InputError(f"{path}: a scene is at {after:g} after one at {before:g}: expected scenes in order")
    return timelines


def check_value(where: str, value: Any, kind: Any) -> Any:
    """A value of the kind that a setting has."""
    if get_origin(kind) is not Literal:
        kind = next((part for part in get_args(kind) if part is not NoneType), kind)  # X | None -> X
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise InputError(f"{where} is {value!r}: expected one of {', '.join(get_args(kind))}")
        return value
    accepted: tuple[type, ...] = {float: (int, float), Path: (str,)}.get(kind, (kind,))
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{where} is {quote(value)}: expected {KEY_KINDS[kind]}")
    try:
        return kind(value)
    except (OverflowError, ValueError):  # an integer of hundreds of digits, a path with NUL
        raise InputError(f"{where} is {quote(value)}: expected {KEY_KINDS[kind]}") from None
