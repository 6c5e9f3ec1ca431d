"""Drift as a drawing: every measure against time, a line for every source. Needs the extra `docs`."""

import textwrap
from pathlib import Path

from matplotlib.figure import Figure

from nova_video.io.files import atomic_path
from nova_worlds.evaluation.drift import MEASURES, WINDOW, DriftReport
from nova_worlds.evaluation.world_benchmark import REAL, RECONSTRUCTED
from nova_worlds.rendering.clips import FPS

# The palette of Okabe and Ito, which colour-blind readers can tell apart; what is real in gray.
COLORS = ("#D55E00", "#000000", "#0072B2", "#009E73", "#E69F00", "#CC79A7")
GRAYS = {REAL: ("#8C959F", ":"), RECONSTRUCTED: ("#8C959F", "--")}
COLUMNS = 4


def draw_drift(report: DriftReport) -> Figure:
    rows = -(-len(MEASURES) // COLUMNS)
    figure = Figure(figsize=(3.2 * COLUMNS, 2.7 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    colors = iter(COLORS)
    styles = {name: GRAYS.get(name) or (next(colors), "-") for name in report.sources}
    for axis, (name, meaning) in zip(axes, MEASURES.items(), strict=False):
        for source, drift in report.sources.items():
            color, line = styles[source]
            mean = drift.curves[name].mean
            time = [(window + 0.5) * WINDOW / FPS for window in range(len(mean))]
            axis.plot(time, mean, color=color, linestyle=line, linewidth=1.4, label=source)
        axis.set_title(name, fontsize=10)
        axis.set_ylabel(textwrap.fill(meaning, 36), fontsize=7)
        axis.set_xlabel("seconds", fontsize=8)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(MEASURES) :]:
        axis.axis("off")
    handles, labels = axes[0].get_legend_handles_labels()
    axes[-1].legend(handles, labels, loc="center", fontsize=9, frameon=False)  # in the place left over
    return figure


def write_plot(report: DriftReport, path: Path) -> None:
    """A png, whole or not at all."""
    with atomic_path(path) as temporary:
        draw_drift(report).savefig(temporary, format="png", dpi=130)
