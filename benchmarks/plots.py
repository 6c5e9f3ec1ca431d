"""Measured rows as drawings: time against the floor, against frames and against tokens. Needs the extra `docs`.

Each file says which rows it was drawn from, so that a stale one can be told: pixels differ between versions of
matplotlib.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from PIL import Image
from tables import measured, preset_of, released_seconds, sweeps

from nova_video.bench.rows import Row
from nova_video.io.files import atomic_path

# The palette of Okabe and Ito, which colour-blind readers can tell apart; what is not ours in gray.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
GRAY = "#8C959F"
ROWS_KEY = "Rows"  # of the PNG's text


def digest(rows: Sequence[Row]) -> str:
    """Of all that a plot depends on."""
    values = json.dumps([asdict(row) for row in measured(rows)], sort_keys=True)
    return hashlib.sha256(values.encode()).hexdigest()[:16]


def is_current(path: Path, rows: Sequence[Row]) -> bool:
    if not path.is_file():
        return False
    with Image.open(path) as picture:
        return picture.info.get(ROWS_KEY) == digest(rows)


def write_plots(rows: Sequence[Row], folder: Path) -> list[Path]:
    """A PNG for each plot, of the device that most rows are of."""
    folder.mkdir(parents=True, exist_ok=True)
    done = measured(rows)
    devices = [row.device for row in done]
    device = max(dict.fromkeys(devices), key=devices.count, default="")
    own = [row for row in done if row.device == device]
    paths = []
    for name, draw in PLOTS.items():
        figure = Figure(figsize=(7.5, 4.2), layout="constrained")
        axes = figure.subplots()
        draw(axes, own)
        axes.set_title(f"{axes.get_title()}, {device}" if own else "nothing is recorded yet", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        paths.append(folder / f"{name}.png")
        with atomic_path(paths[-1]) as temporary:
            figure.savefig(temporary, format="png", dpi=130, metadata={ROWS_KEY: digest(rows)})
    return paths


def draw_floor(axes: Axes, rows: Sequence[Row]) -> None:
    """Seconds of every configuration: ours by preset, the released implementation's, and the floor."""
    own = [row for row in rows if not row.changed]
    works = list(dict.fromkeys((row.config, row.batch) for row in own))
    presets = list(dict.fromkeys(preset_of(row) for row in own))
    for row in own:
        assert row.seconds is not None
        place = works.index((row.config, row.batch))
        label = preset_of(row)
        axes.plot(row.seconds, place, "o", color=COLORS[presets.index(label) % len(COLORS)], label=label, zorder=3)
        for value, marker, name in (
            (released_seconds(row), "s", "released implementation"),
            (row.floor_seconds, "|", "floor"),
        ):
            if value is not None:
                axes.plot(value, place, marker, color=GRAY, markersize=9 if marker == "|" else 6, label=name)
        if row.floor_seconds is not None:
            axes.plot([row.floor_seconds, row.seconds], [place, place], color=GRAY, linewidth=0.7, zorder=1)
    axes.set_yticks(range(len(works)), [name + (f", batch {batch}" if batch > 1 else "") for name, batch in works])
    axes.invert_yaxis()
    axes.set_xscale("log")
    plain_numbers(axes.xaxis)
    axes.set_xlabel("seconds from prompt features to latents")
    axes.set_title("Time against the floor")
    legend(axes)


def draw_frames(axes: Axes, rows: Sequence[Row]) -> None:
    """Seconds against latent frames, and the straight line through them."""
    for color, (name, curve) in zip(COLORS, sweeps(rows, "frames").items(), strict=False):
        frames, seconds = np.array([(row.latent_frames, row.seconds) for row in curve], dtype=float).T
        axes.plot(frames, seconds, "o", color=color, label=name)
        slope, start = np.polyfit(frames, seconds, 1)
        line = slope * frames + start
        off = np.abs(line / seconds - 1).max()
        label = f"{slope:.3g} s a latent frame {start:+.2g} s, at most {off:.1%} off"
        axes.plot(frames, line, "-", color=color, linewidth=1, label=label)
    axes.set(xlabel="latent frames (four frames each, after the first)", ylabel="seconds", title="Time against frames")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    legend(axes)


def draw_tokens(axes: Axes, rows: Sequence[Row]) -> None:
    """Seconds against the tokens of a frame, and the floor."""
    for color, (name, curve) in zip(COLORS, sweeps(rows, "size").items(), strict=False):
        points = np.array([(row.tokens, row.seconds, row.floor_seconds) for row in curve], dtype=float)  # None: NaN
        tokens, seconds, floor = points.T
        axes.plot(tokens, seconds, "o-", color=color, label=name)
        if np.isfinite(floor).any():
            axes.plot(tokens, floor, ":", color=color, label=f"{name}, floor")
    axes.set(xlabel="tokens of a picture", ylabel="seconds", title="Time against tokens")
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_numbers(axes.xaxis)
    plain_numbers(axes.yaxis)
    legend(axes)


def plain_numbers(axis: Axis) -> None:
    """1, 2, 5, 10 on a logarithmic axis, in place of powers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def legend(axes: Axes) -> None:
    """Each label once."""
    handles, labels = axes.get_legend_handles_labels()
    if once := dict(zip(labels, handles, strict=True)):
        axes.legend(once.values(), once.keys(), fontsize=8, frameon=False)


PLOTS: dict[str, Callable[[Axes, Sequence[Row]], None]] = {
    "floor": draw_floor,
    "frames": draw_frames,
    "tokens": draw_tokens,
}
