"""The cost of shortcuts, on disk and in tables: `nova bench presets` writes one row a variant."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nova_video.bench.rows import short
from nova_video.common.errors import InputError
from nova_video.io.files import atomic_path
from nova_worlds.judging.rates import PairedRates, Rate
from nova_worlds.presets.preset_outcome import Outcome

MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Score:
    """One score of a variant, in percent."""

    percent: float
    interval_95: tuple[float, float]
    """Wilson's."""
    of: int
    points: float = 0.0
    """Difference from the exact way, over the same sentences."""
    points_95: tuple[float, float] = (0.0, 0.0)
    """Interval of the paired differences (`Paired.interval`)."""

    @property
    def change(self) -> str:
        """The difference, plus or minus half its interval."""
        low, high = self.points_95
        return f"{self.points:+.1f} ± {(high - low) / 2:.1f}".replace("-", MINUS)


@dataclass(frozen=True)
class PresetRow:
    """One variant, measured. None: it could not be."""

    config: str
    """The model."""
    preset: str
    """The variant: a preset, or one part alone."""
    batch: int
    """Clips made at once."""
    compile: bool
    dtype: str
    device: str
    versions: dict[str, str]
    """With which it was made."""
    command: str
    num_clips: int
    num_pictures: int
    """Number of pictures of two objects, for `relation` and `both_objects`."""
    num_frames: int
    """Frames of a clip."""
    seed: int
    shortcuts: dict[str, Any] = field(default_factory=dict)
    """Fields of `Preset` that are not the exact way's."""
    sets: int | None = None
    diffusion_steps: int | None = None

    seconds: float | None = None
    """Median of a batch of clips, from prompt features to latents."""
    vae_seconds: float | None = None
    """Median of a batch, from latents to pixels on the device."""
    total_seconds: float | None = None
    seconds_per_clip: float | None = None
    """seconds / batch"""
    speedup: float | None = None
    """Over the exact way, from prompt features to latents."""
    distance: float | None = None
    """Root mean square of the difference from the exact clips' latents, relative to that of those."""
    scores: dict[str, Score] = field(default_factory=dict)
    error: str | None = None
    """Why it could not be measured."""

    @property
    def made(self) -> tuple[object, ...]:
        """How: rows can be compared if the exact ones of their runs share all of this."""
        asked = (self.num_clips, self.num_pictures, self.num_frames, self.seed, self.sets, self.diffusion_steps)
        return (self.config, self.preset, self.batch, self.compile, self.dtype, self.device, *asked)

    def line(self) -> str:
        """In a few words."""
        if self.error is not None:
            return f"{self.preset}: failed: {self.error}"
        time = f"{self.preset}: {milliseconds(self)} ms a clip"
        if self.preset == "exact":
            return ", ".join([time, *(f"{name} {score.percent:.1f}%" for name, score in self.scores.items())])
        worst = min(self.scores, key=lambda name: self.scores[name].points)
        return (
            f"{time}, {short(self.speedup)} times as fast, distance {short(self.distance)}, "
            f"at worst {worst} {self.scores[worst].change} points"
        )


def compare_outcomes(row: PresetRow, outcome: Outcome, exact: Outcome) -> PresetRow:
    """The row of what a variant gave, beside what the exact way gave."""
    scores = {}
    for name, flags in outcome.flags.items():
        rate, paired = Rate.of(flags), PairedRates.of(flags, exact.flags[name])
        scores[name] = Score(percent(rate.value), percents(rate.interval()), rate.total)
        if outcome is not exact:
            scores[name] = replace(scores[name], points=percent(paired.value), points_95=percents(paired.interval()))
    return replace(
        row,
        versions=outcome.versions,
        seconds=outcome.seconds,
        vae_seconds=outcome.vae_seconds,
        total_seconds=digits(outcome.seconds + outcome.vae_seconds),
        seconds_per_clip=digits(outcome.seconds / row.batch),
        speedup=digits(exact.seconds / outcome.seconds),
        distance=digits(outcome.distance),
        scores=scores,
    )


def percent(share: float) -> float:
    return round(100 * share, 2)


def percents(shares: tuple[float, float]) -> tuple[float, float]:
    return percent(shares[0]), percent(shares[1])


def digits(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")


# On disk --------------------------------------------------------------------------------------------------------------


def read_preset_rows(path: Path) -> list[PresetRow]:
    """All rows of a file; none if there is no such file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return [PresetRow(**value | {"scores": _scores(value["scores"])}) for value in values]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: expected a list of measured presets ({error})") from None


def _scores(values: Mapping[str, dict[str, Any]]) -> dict[str, Score]:
    pairs = ("interval_95", "points_95")
    return {name: Score(**value | {pair: tuple(value[pair]) for pair in pairs}) for name, value in values.items()}


def merge_rows(kept: Sequence[PresetRow], new: Sequence[PresetRow]) -> list[PresetRow]:
    """Puts new rows into those of a file, the exact one first.

    No old row stays if the exact one was made with other settings.
    """
    comparable = bool(kept) and kept[0].made == new[0].made
    return list({row.preset: row for row in [*(kept if comparable else []), *new]}.values())


def write_preset_rows(path: Path, rows: Sequence[PresetRow]) -> None:
    """In place of what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


# In tables ------------------------------------------------------------------------------------------------------------


def milliseconds(row: PresetRow) -> str:
    return short(None if row.seconds_per_clip is None else 1000 * row.seconds_per_clip)


def score_cell(row: PresetRow, name: str) -> str:
    """The exact way's percentage, and the others' difference from it."""
    score = row.scores.get(name)
    if score is None:
        return "-"
    return f"{score.percent:.1f}%" if row.preset == "exact" else score.change


def as_table(rows: Sequence[PresetRow]) -> list[tuple[str, ...]]:
    """Cells, headers first. Scores in points against the exact way, with half their 95% interval."""
    done = [row for row in rows if row.error is None]
    names = list(dict.fromkeys(name for row in done for name in row.scores))
    found = [
        (row.preset, milliseconds(row), short(row.speedup), short(row.distance), *(score_cell(row, n) for n in names))
        for row in done
    ]
    return [("variant", "ms a clip", "times as fast", "distance", *(name.replace("_", " ") for name in names)), *found]


def as_aligned(rows: Sequence[PresetRow]) -> list[str]:
    """The table in a terminal, and what failed."""
    table = as_table(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]) for cells in table]
    return [*lines, *(row.line() for row in rows if row.error is not None)]


def made_how(row: PresetRow) -> str:
    """The settings that all rows of a run share."""
    loop = "" if row.compile else ", plain loop"
    return (
        f"{row.num_clips} clips of {row.num_frames} frames in batches of {row.batch}, and {row.num_pictures} pictures "
        f"of two objects, by the model {row.config} ({row.dtype}{loop}, {row.device})"
    )
