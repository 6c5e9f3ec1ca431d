"""Which recipe and which data each step of a run learned from: `OUTPUT/segments.jsonl`, a line a segment.

A segment begins where a run is started or goes on with another recipe, other data or other devices, and at least one
step is taken. The model card and the recipes beside an export are made from these records. Used by `trainer.py`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from nova_video.common.errors import InputError
from nova_video.io.files import atomic_path
from nova_video.training.recipe import Recipe, changes, load_recipe, parse_recipe

SEGMENTS = "segments.jsonl"


@dataclass(frozen=True)
class RunSegment:
    """The settings of the steps from `step` to the next segment."""

    step: int
    recipe: str
    """The recipe as TOML, every default spelt out."""
    learned_from: str = ""
    """The source of the samples, as the end of a sentence; empty if not recorded."""
    data: str = ""
    """Identity of the data, where the task knows one."""
    devices: str = ""


def read_segments(output: Path) -> list[RunSegment]:
    """The recorded segments; of a run of an older version, which recorded none, the one its `recipe.toml` tells of."""
    path, found = output / SEGMENTS, list[RunSegment]()
    if not path.exists():
        try:
            load_recipe(output / "recipe.toml")
        except InputError:  # of another version, or gone
            return []
        return [RunSegment(0, (output / "recipe.toml").read_text(encoding="utf-8"))]
    kinds = {part.name: part.type for part in fields(RunSegment)}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            if not isinstance(values, dict) or any(type(values[name]) is not kind for name, kind in kinds.items()):
                raise ValueError("a line is no segment")
            found.append(RunSegment(**{name: values[name] for name in kinds}))
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}): expected it as the run wrote it, or another output") from error
    return found


def begin_segment(segments: Sequence[RunSegment], new: RunSegment) -> list[RunSegment]:
    """The segments of a run that goes on with `new`: steps from its first on are taken anew."""
    kept = [segment for segment in segments if segment.step < new.step]
    if not kept:
        return [new]
    last = kept[-1]
    if not last.learned_from and not data_changes(last, new):  # of an older version, and the same as far as known
        last = RunSegment(last.step, last.recipe, new.learned_from, new.data, new.devices)
    same = (last.learned_from, last.data, last.devices) == (new.learned_from, new.data, new.devices)
    if same and not recipe_changes(last, new):
        return [*kept[:-1], last]
    return [*kept[:-1], last, new]


def write_segments(output: Path, segments: Sequence[RunSegment]) -> None:
    with atomic_path(output / SEGMENTS) as aside:
        aside.write_text("".join(f"{json.dumps(asdict(segment))}\n" for segment in segments), encoding="utf-8")


def recipe_changes(before: RunSegment, after: RunSegment) -> dict[str, tuple[object, object]]:
    """Settings that differ, by key: what they were and what they are."""
    where = "a recorded segment"
    return changes(parse_recipe(before.recipe, where), parse_recipe(after.recipe, where))


def data_changes(before: RunSegment, after: RunSegment) -> list[str]:
    """Settings that say what is learned from and differ."""
    return [key for key in recipe_changes(before, after) if key.startswith(("data.", "dataset."))]


def recipe_of(segment: RunSegment) -> Recipe:
    return parse_recipe(segment.recipe, "a recorded segment")
