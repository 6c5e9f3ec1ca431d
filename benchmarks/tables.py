"""The tables and plots of this folder, made from the rows in results/: `python benchmarks/tables.py [--check]`.

A page has places for tables, `<!-- begin NAME -->` to `<!-- end NAME -->`; what stands between is made anew.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import tyro

from nova_video.bench.configs import SIZES
from nova_video.bench.rows import PARTS, Row, read_rows, short
from nova_video.bench.serve import ServeRow, read_serve_rows
from nova_video.bench.train_rows import TrainRow, how, percent, read_train_rows
from nova_video.common.errors import InputError
from nova_video.io.files import atomic_path
from nova_video.sampling.presets import PRESETS
from nova_worlds.presets.preset_rows import PresetRow, as_table, made_how, read_preset_rows

FOLDER = Path(__file__).resolve().parent

# Seconds of the released implementation from prompt features to latents, run as its guide says on one H200 (torch 2.11,
# CUDA 13, float16, 64 sets of 25 steps, guidance 5), by configuration and batch.
RELEASED = {
    ("t2i-512-0.6b", 1): 3.57,
    ("t2i-1024-0.3b", 1): 4.36,
    ("t2i-1024-0.6b", 1): 4.59,
    ("t2i-1024-0.6b", 8): 18.4,
    ("t2i-1024-1.4b", 1): 6.52,
    ("t2v-480-0.6b", 1): 40.9,
}
RELEASED_VAE = {("t2v-480-0.6b", 1): 1.33}
RELEASED_DEVICE = "H200"
EMPTY = "Nothing is recorded yet."


class OnDevice(Protocol):
    @property
    def device(self) -> str: ...


class Made(OnDevice, Protocol):
    @property
    def versions(self) -> dict[str, str]: ...
    @property
    def command(self) -> str: ...
    @property
    def error(self) -> str | None: ...


D = TypeVar("D", bound=OnDevice)


def released_seconds(row: Row, times: Mapping[tuple[str, int], float] = RELEASED) -> float | None:
    """What the released implementation takes for a row's work on the row's device, where that was measured."""
    return None if row.changed or RELEASED_DEVICE not in row.device else times.get((row.config, row.batch))


def measured(rows: Sequence[Row]) -> list[Row]:
    """Without those that failed; known sizes first, then by batch and preset."""
    configs = [*SIZES, *dict.fromkeys(row.config for row in rows if row.config not in SIZES)]
    presets: list[str] = [*PRESETS]
    found = [row for row in rows if row.error is None and row.seconds is not None and row.preset in presets]
    return sorted(found, key=lambda row: (configs.index(row.config), row.batch, row.compile, presets.index(row.preset)))


def by_device(rows: Sequence[D]) -> dict[str, list[D]]:
    """Devices in order of their first row."""
    return {device: [row for row in rows if row.device == device] for device in dict.fromkeys(r.device for r in rows)}


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """Every table of the page, by name."""
    done = measured(rows)
    makers = {
        "speed": speed_table,
        "parts": parts_table,
        "latency": latency_table,
        "frames": frames_table,
        "tokens": tokens_table,
    }
    made = {
        name: "\n\n".join(
            f"{device}:\n\n{table}" for device, own in by_device(done).items() if (table := maker(own)) is not None
        )
        for name, maker in makers.items()
    }
    made["commands"] = commands(rows)
    return {name: text or EMPTY for name, text in made.items()}


def speed_table(rows: Sequence[Row]) -> str | None:
    """Seconds from prompt features to latents, beside the released implementation's and the floor."""
    own = [row for row in rows if not row.changed]
    columns = (
        "configuration", "preset", "batch", "released implementation, s", "s", "least to most", "calls", "times faster",
        "floor, s", "of the floor", "VAE, s", "in all, s",
    )  # fmt: skip
    return markdown(columns, [speed_cells(row) for row in own]) if own else None


def speed_cells(row: Row) -> list[str]:
    released = released_seconds(row)
    least, most = row.seconds_range or (None, None)
    faster = None if released is None or row.seconds is None else released / row.seconds
    return [
        row.config,
        preset_of(row),
        str(row.batch),
        short(released),
        f"**{short(row.seconds)}**",
        f"{short(least)} to {short(most)}",
        "-" if row.repeats is None else str(row.repeats),
        short(faster),
        short(row.floor_seconds),
        short(row.floor_ratio),
        short(row.vae_seconds),
        short(row.total_seconds),
    ]


def parts_table(rows: Sequence[Row]) -> str | None:
    """Where the time of one call goes, in seconds."""
    own = [row for row in rows if not row.changed and row.parts]
    columns = ("configuration", "preset", "batch", *PARTS)
    found = [
        [row.config, preset_of(row), str(row.batch), *(short((row.parts or {}).get(part)) for part in PARTS)]
        for row in own
    ]
    return markdown(columns, found) if own else None


def latency_table(rows: Sequence[Row]) -> str | None:
    """What one waits for, and memory."""
    own = [row for row in rows if not row.changed]
    columns = (
        "configuration", "preset", "batch", "frames/s", "first preview, s", "first frame, s", "first call, s",
        "GiB sampling", "GiB decoding",
    )  # fmt: skip
    found = [
        [
            row.config,
            preset_of(row),
            str(row.batch),
            *(
                short(value)
                for value in (
                    row.frames_per_second,
                    row.first_preview_seconds,
                    row.first_frame_seconds,
                    row.first_call_seconds,
                    row.peak_memory_gb,
                    row.vae_peak_memory_gb,
                )
            ),
        ]
        for row in own
    ]
    return markdown(columns, found) if own else None


def frames_table(rows: Sequence[Row]) -> str | None:
    """Seconds of clips of different lengths, and of each latent frame."""
    found = []
    for name, curve in sweeps(rows, "frames").items():
        for row in curve:
            each = short((row.seconds or 0) / (row.latent_frames or 1))
            found.append([name, str(row.frames), str(row.latent_frames), short(row.seconds), each])
    columns = ("configuration", "frames", "latent frames", "s", "s a latent frame")
    return markdown(columns, found) if found else None


def tokens_table(rows: Sequence[Row]) -> str | None:
    """Seconds of pictures of different sizes."""
    found = [
        [name, str(row.size), str(row.tokens), short(row.seconds), short(row.floor_seconds), short(row.floor_ratio)]
        for name, curve in sweeps(rows, "size").items()
        for row in curve
    ]
    columns = ("configuration", "size", "tokens", "s", "floor, s", "of the floor")
    return markdown(columns, found) if found else None


def sweeps(rows: Sequence[Row], what: str) -> dict[str, list[Row]]:
    """Rows that differ only in `what` ("frames" or "size"), at least two a configuration, the smallest work first."""
    curves: dict[str, list[Row]] = {}
    for row in measured(rows):
        if not {*row.changed} - {what}:
            name = ", ".join([row.config, preset_of(row)] + [f"batch {row.batch}"] * (row.batch > 1))
            curves.setdefault(name, []).append(row)
    ordered = {name: sorted(curve, key=lambda r: (r.frames or 0, r.tokens or 0)) for name, curve in curves.items()}
    return {name: curve for name, curve in ordered.items() if len(curve) > 1}


def commands(rows: Sequence[Row]) -> str:
    """How every row was made, with what; and what could not be measured."""
    return "\n".join(made_by(row, row.dtype) for row in rows)


def made_by(row: Made, how: str) -> str:
    """One line of a list: the command, and with what it was run."""
    versions = ", ".join(f"{name} {version}" for name, version in row.versions.items())
    failed = "" if row.error is None else f" Failed: {row.error}"
    return f"- `{row.command}` ({how}, {row.device}, {versions}){failed}"


def preset_of(row: Row) -> str:
    """The preset, and the precision where it is not what one gets unasked."""
    usual = "float32" if row.device.startswith("cpu") else "float16"
    preset = row.preset if row.compile else "plain loop" if row.preset == "exact" else f"{row.preset}, plain loop"
    return preset if row.dtype == usual else f"{preset}, {row.dtype}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, numbers to the right."""
    rules = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rules, *rows))


def filled(page: str, parts: Mapping[str, str]) -> str:
    """The page with every part in its place."""
    for name, text in parts.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise InputError(f"the page has no single place for the table {name}: expected {begin.strip()} ... {end}")
        before, rest = page.split(begin)
        page = f"{before}{begin}{text}\n{end}{rest.split(end)[1]}"
    return page


# Training and presets -------------------------------------------------------------------------------------------------

# Seconds of a step and GB of the released implementation on one H200 (torch 2.11, CUDA 13, bf16), by configuration and
# batch.
RELEASED_STEPS = {
    ("t2i-512-0.6b", 16): (0.27, 32),
    ("t2i-1024-0.6b", 8): (0.45, 58),
    ("t2v-480-0.6b", 3): (0.45, 59),
}


def train_table(rows: Sequence[TrainRow]) -> str:
    """Steps of every configuration, beside the released implementation's."""
    configs = [*SIZES, *dict.fromkeys(row.config for row in rows if row.config not in SIZES)]
    done = [row for row in rows if row.error is None and row.step_seconds is not None]
    columns = (
        "configuration", "batch", "how", "released implementation, s (GB)", "s a step", "least to most", "times faster",
        "samples/s", "TFLOP/s", "MFU", "GiB",
    )  # fmt: skip
    tables = []
    for device, own in by_device(done).items():
        ordered = sorted(own, key=lambda row: (configs.index(row.config), row.batch, row.processes, how(row)))
        tables.append(f"{device}:\n\n{markdown(columns, [train_cells(row) for row in ordered])}")
    return "\n\n".join(tables) or EMPTY


def train_commands(rows: Sequence[TrainRow]) -> str:
    """How every row was made, with what; and what could not be measured."""
    return "\n".join(made_by(row, row.precision) for row in rows) or EMPTY


def train_cells(row: TrainRow) -> list[str]:
    comparable = not row.changed and row.processes == 1 and RELEASED_DEVICE in row.device
    released = RELEASED_STEPS.get((row.config, row.batch)) if comparable else None
    least, most = row.step_seconds_range or (None, None)
    return [
        row.config,
        str(row.batch),
        how(row),
        "-" if released is None else f"{released[0]} ({released[1]})",
        f"**{short(row.step_seconds)}**",
        f"{short(least)} to {short(most)}",
        short(None if released is None or row.step_seconds is None else released[0] / row.step_seconds),
        short(row.samples_per_second),
        short(row.tflop_per_second),
        percent(row.mfu),
        short(row.peak_memory_gb),
    ]


def presets_table(rows: Sequence[PresetRow]) -> str:
    """The table of the page."""
    if not any(row.error is None for row in rows):
        return EMPTY
    first, *others = as_table(rows)
    failed = "".join(f"\n\n{row.line()}" for row in rows if row.error is not None)
    commands = ", ".join(f"`{command}`" for command in dict.fromkeys(row.command for row in rows))
    return f"{made_how(rows[0])}:\n\n{markdown(first, others)}{failed}\n\n{commands}"


# The command ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tables:
    """Write the tables into README.md, and the plots."""

    check: bool = False
    """Write nothing: fail if a table or a plot is not that of the rows."""
    rows: Path = FOLDER / "results" / "sample.json"
    """What `nova bench sample` wrote."""
    presets: Path = FOLDER / "results" / "presets.json"
    """What `nova bench presets` wrote."""
    training: Path = FOLDER / "results" / "train.json"
    """What `nova bench train` wrote."""
    serving: Path = FOLDER / "results" / "serve.json"
    """What `nova bench serve` wrote."""
    page: Path = FOLDER / "README.md"
    plots: Path = FOLDER / "plots"


def serve_table(rows: Sequence[ServeRow]) -> str:
    """Servers, by device, with the commands that repeat their rows."""
    parts = []
    for device, found in by_device([row for row in rows if row.error is None]).items():
        lines = [
            "| model | settings | clients | requests | frames | clips/s | frames/s | half done in, s | 95 % | 99 % "
            "| first preview, s | first frame, s | a set, s | cancel, s | at most |",
            "| --- | --- |" + " ---: |" * 13,
        ]
        for row in sorted(found, key=lambda row: (row.config, str(row.changed), row.clients)):
            numbers = (row.requests_per_second, row.frames_per_second, row.p50_seconds, row.p95_seconds)
            numbers += (row.p99_seconds, row.first_preview_seconds, row.first_frame_seconds, row.set_seconds)
            numbers += (row.cancel_seconds, row.cancel_seconds_most)
            changed = " ".join(f"{name}={value}" for name, value in row.changed.items()) or "its own"
            cells = [row.config, changed, str(row.clients), str(row.requests), str(row.frames), *map(short, numbers)]
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join([f"{device}:", "", *lines, "", *(f"    {row.command}" for row in found)]))
    return "\n\n".join(parts) or EMPTY


def main(args: Tables) -> int:
    from plots import PLOTS, is_current, write_plots  # which imports this module

    rows = read_rows(args.rows)
    page = args.page.read_text(encoding="utf-8")
    trained = read_train_rows(args.training)
    own = {
        "presets": presets_table(read_preset_rows(args.presets)),
        "training": train_table(trained),
        "training-commands": train_commands(trained),
        "serving": serve_table(read_serve_rows(args.serving)),
    }
    made = filled(page, tables(rows) | own)
    if args.check:
        plots = [args.plots / f"{name}.png" for name in PLOTS]
        stale = [path for path in plots if not is_current(path, rows)] + ([args.page] if made != page else [])
        for path in stale:
            print(f"{path} is not that of the rows: run python benchmarks/tables.py", file=sys.stderr)
        return 1 if stale else 0
    with atomic_path(args.page) as temporary:
        temporary.write_text(made, encoding="utf-8")
    for path in [args.page, *write_plots(rows, args.plots)]:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Tables, config=(tyro.conf.FlagCreatePairsOff,))))
