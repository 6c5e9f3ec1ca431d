"""The training of a shipped model, from the logs beside its weights: did it read its captions, and when?"""

import json
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from drawing.style import CHOSEN, FAINT, MIXER, SPACE, TEXT, TIME

AUTOENCODER = "autoencoder.jsonl"
STAGES = (  # of the transformer, in the order of training
    ("emoji-image.jsonl", "Stage one", "pictures"),
    ("emoji-video.jsonl", "Stage two", "clips"),
    ("emoji-beyond.jsonl", "Stage three", "clips"),
)
LOSSES = (
    ("held_out_loss", "with its own caption", SPACE),
    ("held_out_loss_wrong_object", "with another object", MIXER),
    ("held_out_loss_wrong_motion", "with another motion", TIME),
)
SCORES = (
    ("score_background", "background", FAINT),
    ("score_motion", "motion", TIME),
    ("score_object", "object", MIXER),
    ("score_relation", "relation of two", TEXT),
    ("score_both_objects", "both of two", CHOSEN),
)

Curve = tuple[list[float], list[float]]
"""Seconds, values."""


def read_curve(log: Path, key: str) -> Curve:
    """One of the numbers that a training run logged."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if key in row]
    return [row["seconds"] for row in rows], [row[key] for row in rows]


def draw_curves(folder: Path) -> Figure:
    """The autoencoder, the scores over all stages, and what the transformer makes of wrong captions in each stage."""
    figure = plt.figure(figsize=(9.6, 5.8))
    grid = figure.add_gridspec(2, 6)
    first = figure.add_subplot(grid[0, :2])
    first.plot(*read_curve(folder / AUTOENCODER, "psnr"), color=SPACE, marker="o", markersize=3)
    first.set(title="Autoencoder: held-out clips", ylabel="PSNR, dB")
    _draw_scores(figure.add_subplot(grid[0, 2:]), folder)
    shared: Axes | None = None
    for index, (log, name, content) in enumerate(STAGES):
        axes = figure.add_subplot(grid[1, 2 * index : 2 * index + 2], sharey=shared)
        for key, label, color in LOSSES:
            seconds, values = read_curve(folder / log, key)
            if seconds:
                axes.plot(seconds, values, color=color, marker="o", markersize=2.5, label=label)
        axes.set_title(f"{name}: loss on held-out {content}")
        if shared is None:
            shared = axes
            axes.set(ylabel="loss")
        axes.legend(frameon=False, fontsize=8, loc="lower left")
    assert shared is not None
    shared.set_ylim(bottom=0)
    for axes in figure.axes:
        axes.set(xlabel="seconds of training")
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(w_pad=1.5, h_pad=1.5)
    return figure


def _draw_scores(axes: Axes, folder: Path) -> None:
    """Scores during training, the stages one after the other."""
    starts = [0.0]
    for log, *_ in STAGES:
        starts.append(starts[-1] + max(read_curve(folder / log, "loss")[0]))
    for key, label, color in SCORES:
        seconds: list[float] = []
        values: list[float] = []
        for start, (log, *_) in zip(starts, STAGES, strict=False):
            curve = read_curve(folder / log, key)
            seconds += [start + second for second in curve[0]]
            values += curve[1]
        axes.plot(seconds, values, color=color, marker="o", markersize=3, label=label)
    for start, (_, name, _) in zip(starts, STAGES, strict=False):
        if start:
            axes.axvline(start, color=FAINT, linewidth=0.8, linestyle="--")
        axes.text(start + 12, 4, name, fontsize=8, color=FAINT)
    axes.set(title="Scores on held-out combinations", ylabel="% right", ylim=(0, 103))
    axes.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1.0, 0.38))
