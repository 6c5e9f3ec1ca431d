"""`nova generate --like FILE`: the settings of a file's own record, to make it again or with changes.

`describe_inputs` adds to a record what tells that a given file or the model has changed since.
"""

import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from nova_video.cli.arguments import CommonFlags, Edit, Format, Generate
from nova_video.cli.script import BATCH_FLAGS, OPTIONS, TIMELINE_KEYS, check_value, field_of, is_off
from nova_video.common.checks import quote
from nova_video.common.errors import InputError
from nova_video.common.option_fields import facts_of, option_fields
from nova_video.common.timeline import is_timeline
from nova_video.io.files import file_mark
from nova_video.sampling.presets import SHARES, SpeedOptions

if TYPE_CHECKING:
    from nova_video.pipeline.generation import Generation

FILES = ("image", "video", "file", "mask", "lora")  # fields that name a file to read
TIMELINES = ("prompt", *TIMELINE_KEYS.values())  # fields whose changes in time have a field of their own
RESULTS = ("given_frames", "sets_made")  # settings that follow from others
NOT_RECORDED = (  # of a run and not of a result, or another way to say a setting
    *("output", "format", "sheet", "json", "live", "state", "resume", "like", "script", "prompts", "batch"),
    *("num_images", "size", "head", "prompt_at", *(f"{key}_at" for key in TIMELINE_KEYS)),
    *BATCH_FLAGS,
    *(name for name, each in OPTIONS.items() if not facts_of(each).recorded),
)
FLAGS = ("low_memory", "tiled", "int8_text")
REPLACEMENTS = {  # what is typed -> what it replaces of a record
    "prompt": ("prompt_at",),
    "prompts": ("prompt", "prompt_at"),
    "size": ("width", "height"),
    "seconds": ("num_frames",),
    "image": ("video",),
    "video": ("image",),
    "preset": (*SHARES, *option_fields(SpeedOptions)),
    **{name: (f"{key}_at",) for key, name in TIMELINE_KEYS.items()},
}


def with_record(typed: Generate) -> tuple[Generate | Edit, dict[str, Any]]:
    """The arguments that made the file of `--like`, overridden by the typed ones, and its record."""
    from nova_video.io.media import read_metadata

    assert typed.like is not None
    record = read_metadata(typed.like)
    changes = {field.name: value for field in fields(typed) if (value := getattr(typed, field.name)) != field.default}
    del changes["like"]
    settings = _settings(typed.like, record, changes)
    for name in changes:
        for replaced in REPLACEMENTS.get(name, ()):
            settings.pop(replaced, None)
    if "file" not in settings:
        return Generate(**settings | changes), record
    known = {field.name for field in fields(Edit)}
    if foreign := [name for name in changes if name not in known]:
        raise InputError(f"got --{foreign[0].replace('_', '-')} with an edited file: expected flags of nova edit")
    one = settings | changes
    prompt = one.pop("prompt")
    if len(prompt) != 1 or "prompt_at" in one:
        raise InputError(f"{typed.like} is an edited file: expected one sentence for it")
    return Edit(**{name: value for name, value in one.items() if name in known}, prompt=prompt[0]), record


def describe_inputs(args: CommonFlags, record: dict[str, Any], generation: "Generation") -> None:
    """Add to a record the number of sets, flags that change rounding, and marks of model and files."""
    from nova_video.pipeline.saving import model_mark

    state, parts = generation.state, generation.parts
    made = len(state.sizes_of(state.num_tokens))  # without those that are empty by rounding
    record["settings"] |= {"sets_made": made} | {name: True for name in FLAGS if getattr(args, name)}
    if not parts.capabilities.video:
        record["settings"]["motion"] = None  # the model takes none
    given = [path for name in FILES if isinstance(path := getattr(args, name, None), Path) and path.is_file()]
    record["weights"] = model_mark(parts.transformer)
    if given:
        record["inputs"] = {str(path): file_mark(path) for path in given}


def warn_of_changes(record: Mapping[str, Any], made: Mapping[str, Any], path: Path) -> None:
    """Print the differences between the record of a file and that of its remake, except the requested ones."""
    log = logging.getLogger(__name__)
    if record.get("model") == made.get("model") and record.get("weights", made["weights"]) != made["weights"]:
        log.warning("the weights of %s have changed since %s was made: the result will differ", made["model"], path)
    before, now = (_devices(each) for each in (record, made))
    if before != now and None not in before:
        log.warning("%s was made on %s in %s, this is %s in %s: random numbers or rounding differ", path, *before, *now)


def _devices(record: Mapping[str, Any]) -> tuple[Any, Any]:
    settings = record.get("settings") or {}
    return str(settings.get("device", "")).split(":")[0] or None, settings.get("dtype")


def _settings(path: Path, record: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Fields of a command, from a record that anyone may have written."""
    from nova_video.pipeline.own_parts import CHECKS

    told = record.get("settings")
    if not isinstance(told, dict) or "prompt" not in record:
        raise InputError(f"{path} carries no settings to make it again: expected a file of nova generate or nova edit")
    values = {name: record.get(name) for name in ("prompt", "negative", "seed", "model", "lora", "lora_scale")} | told
    kinds = get_type_hints(Edit) | get_type_hints(Generate) | {"prompt": str}
    settings: dict[str, Any] = {}
    foreign = []
    for key, value in values.items():
        name = recorded_field(key)
        if value is None or name in RESULTS:
            continue
        if name in CHECKS:  # code is imported where the user names it, never where a file does
            if name not in changes:
                raise InputError(
                    f"{path} was made with the {key} {quote(value)}: expected --{key.replace('_', '-')} with it"
                )
            continue
        if name not in kinds or name in NOT_RECORDED:
            foreign.append(key)
        elif name in TIMELINES and is_timeline(value):
            first, *rest = [(at, check_value(f"{path}: {key}", moment, kinds[name])) for at, moment in value]
            settings[name], settings[f"{key}_at"] = first[1], tuple(rest)
        else:
            checked = check_value(f"{path}: {key}", value, kinds[name])
            settings[name] = not checked if is_off(key) else checked
    if foreign:
        logging.getLogger(__name__).warning(
            "%s was made with settings that this command has not, and that are left out: %s", path, ", ".join(foreign)
        )
    if "prompt" in settings:
        settings["prompt"] = (settings["prompt"],)
    if settings.get("device") != "cpu":
        settings.pop("device", None)  # a GPU, whichever is here
    if told.get("num_frames", 0) is None and not {"num_frames", "seconds"} & set(changes):
        raise InputError(f"{path} was made without an end: expected --num-frames or --seconds, as in --seconds 10")
    for name in FILES:
        if name in settings and name not in changes:
            settings[name] = _find_input(path, settings[name], record)
    one = settings.get("num_frames") == 1
    suffix = "frames" if path.is_dir() else path.suffix.lower().lstrip(".").replace("jpeg", "jpg")
    output = changes.get("output")
    named = output is not None and output.suffix != ""
    if suffix != ("png" if one else "mp4") and suffix in get_args(Format) and not named and "format" not in changes:
        settings["format"] = suffix
    return settings


def recorded_field(key: str) -> str:
    """The field of a command that a key of a record means."""
    return "file" if key == "edited" else field_of(key) or key


def _find_input(path: Path, name: Path, record: Mapping[str, Any]) -> Path:
    """A given file, from the current folder or from that of the file that was made with it."""
    places = [name, path.parent / name]
    place = next((place for place in places if place.exists()), None)
    if place is None:
        raise InputError(f"{path} was made with {name}, which is not there: expected that file, or another one")
    marks = record.get("inputs")
    if isinstance(marks, dict) and place.is_file() and marks.get(str(name), mark := file_mark(place)) != mark:
        logging.getLogger(__name__).warning("%s has changed since %s was made with it", place, path)
    return place
