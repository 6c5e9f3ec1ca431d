"""The measurements on disk: a JSON list of rows, one for each kind of run.

A new run replaces the row of its kind, unless only the new run failed.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from nova_video.common.errors import InputError
from nova_video.io.files import atomic_path


@dataclass(frozen=True)
class Row:
    """One configuration, measured. All seconds are of a whole batch; None: not measured, or not known here."""

    config: str
    preset: str
    batch: int
    compile: bool
    """False: the plain loop."""
    dtype: str
    device: str
    versions: dict[str, str]
    command: str
    """The command as typed in the repository's root."""
    changed: dict[str, Any] = field(default_factory=dict)
    """Settings that are not the configuration's own, by flag."""

    frames: int | None = None
    size: str | None = None
    """WIDTHxHEIGHT in pixels."""
    tokens: int | None = None
    """Tokens of a latent frame."""
    latent_frames: int | None = None
    sets: int | None = None
    diffusion_steps: int | None = None
    guidance: float | None = None
    repeats: int | None = None

    seconds: float | None = None
    """Median, from prompt features to latents."""
    seconds_range: tuple[float, float] | None = None
    """Least and most."""
    vae_seconds: float | None = None
    """Median, from latents to pixels on the device."""
    vae_seconds_range: tuple[float, float] | None = None
    total_seconds: float | None = None
    """Median of both together."""
    parts: dict[str, float] | None = None
    """Where the time of one more call went: text, temporal, spatial, denoiser, vae and else."""
    first_call_seconds: float | None = None
    """The first call of the process, to pixels, whatever is compiled for it included."""
    first_preview_seconds: float | None = None
    """Median until a stream shows its first latent frame."""
    first_frame_seconds: float | None = None
    """Median until it hands out its first final frame."""
    frames_per_second: float | None = None
    peak_memory_gb: float | None = None
    """GiB on the device while sampling, weights included."""
    vae_peak_memory_gb: float | None = None
    """GiB while decoding."""
    tflop: float | None = None
    """10^12 operations from prompt features to latents, as the exact preset needs them."""
    floor_flops_seconds: float | None = None
    floor_bytes_seconds: float | None = None
    floor_seconds: float | None = None
    """The larger of both; None: the device's rates are not known."""
    floor_ratio: float | None = None
    """seconds / floor_seconds"""
    finite: bool | None = None
    """No latent is infinite or NaN."""
    error: str | None = None
    """Why it could not be measured."""

    @property
    def kind(self) -> tuple[Any, ...]:
        """Rows of one kind replace each other."""
        changed = json.dumps(self.changed, sort_keys=True)
        return self.config, self.preset, self.batch, self.compile, self.dtype, self.device, changed


class RecordedRow(Protocol):
    """A dataclass that stands in a file of its like."""

    @property
    def kind(self) -> tuple[Any, ...]: ...

    @property
    def error(self) -> str | None: ...


R = TypeVar("R", bound=RecordedRow)


def read_rows(path: Path) -> list[Row]:
    """Reads the rows that `nova bench sample` wrote."""
    return read_records(path, Row)


def read_records(path: Path, record: type[R]) -> list[R]:
    """All rows of a file; none if there is no such file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return [record(**value) for value in values]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: expected a list of measured rows ({error})") from None


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


def record_row(path: Path, row: R) -> None:
    """Put a row where the one of its kind was, or at the end. What was measured stays where the new run failed."""
    rows = read_records(path, type(row))
    kinds = [other.kind for other in rows]
    if row.kind not in kinds:
        rows.append(row)
    elif row.error is None or rows[kinds.index(row.kind)].error is not None:
        rows[kinds.index(row.kind)] = row
    write_rows(path, rows)


# In a terminal --------------------------------------------------------------------------------------------------------

PARTS = ("text", "temporal", "spatial", "denoiser", "vae", "else")


def cells(row: Row) -> dict[str, str]:
    """A row as one prints it, by column."""
    spread = "-" if row.seconds_range is None else "{}-{}".format(*(short(value) for value in row.seconds_range))
    changed = " ".join(f"{name}={value}" for name, value in row.changed.items())
    return {
        "config": " ".join(part for part in (row.config, changed) if part),
        "preset": row.preset if row.compile else f"{row.preset}, plain",
        "batch": str(row.batch),
        "seconds": short(row.seconds),
        "spread": spread,
        "vae": short(row.vae_seconds),
        "total": short(row.total_seconds),
        **{f"in {part}": short((row.parts or {}).get(part)) for part in PARTS},
        "GiB": f"{short(row.peak_memory_gb)}/{short(row.vae_peak_memory_gb)}",
        "frames/s": short(row.frames_per_second),
        "preview": short(row.first_preview_seconds),
        "1st frame": short(row.first_frame_seconds),
        "1st call": short(row.first_call_seconds),
        "floor": short(row.floor_seconds),
        "ratio": short(row.floor_ratio),
    }


def as_lines(row: Row) -> list[str]:
    """A header and the row under it; or what went wrong."""
    shown = cells(row)
    if row.error is not None:
        return [f"{shown['config']}, batch {row.batch}, {shown['preset']}: failed: {row.error}"]
    widths = [max(len(name), len(cell)) for name, cell in shown.items()]
    return [
        "  ".join(text.rjust(width) if column > 1 else text.ljust(width) for column, (text, width) in enumerate(line))
        for line in (zip(shown, widths, strict=True), zip(shown.values(), widths, strict=True))
    ]


def short(value: float | None) -> str:
    """Three digits of a number."""
    if value is None:
        return "-"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
