"""The training of a shipped model, from the logs beside its weights: did it read its captions, and when?"""

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from drawing.style import CHOSEN, FAINT, MIXER, SPACE, TEXT, TIME

LOGS = ("autoencoder.jsonl", "emoji-image.jsonl", "emoji-video.jsonl")  # in the order of training
LOSSES = (
    ("held_out_loss", "its own caption", SPACE),
    ("held_out_loss_wrong_object", "another object", MIXER),
    ("held_out_loss_wrong_motion", "another motion", TIME),
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
    """The autoencoder, the scores over both stages, and what the transformer makes of wrong captions in each stage."""
    autoencoder, image, video = (folder / name for name in LOGS)
    figure, ((top_left, top_right), (low_left, low_right)) = plt.subplots(2, 2, figsize=(8.8, 5.6))
    top_left.plot(*read_curve(autoencoder, "psnr"), color=SPACE, marker="o", markersize=3)
    top_left.set(title="Autoencoder: held-out clips", ylabel="PSNR, dB")
    _draw_scores(top_right, (image, video))
    for axes, log, title in (
        (low_left, image, "Stage one, images: loss on held-out ones"),
        (low_right, video, "Stage two, clips: loss on held-out ones"),
    ):
        for key, label, color in LOSSES:
            seconds, values = read_curve(log, key)
            if seconds:
                axes.plot(seconds, values, color=color, marker="o", markersize=2.5, label=label)
        axes.set(title=title, ylabel="loss")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8, title="with", title_fontsize=8)
    for axes in figure.axes:
        axes.set(xlabel="seconds of training")
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(w_pad=2.5, h_pad=1.5)
    return figure


def _draw_scores(axes: Axes, logs: Sequence[Path]) -> None:
    """Scores during training, the stages one after the other."""
    starts = [0.0]
    for log in logs:
        starts.append(starts[-1] + max(read_curve(log, "loss")[0]))
    for key, label, color in SCORES:
        seconds: list[float] = []
        values: list[float] = []
        for start, log in zip(starts, logs, strict=False):
            curve = read_curve(log, key)
            seconds += [start + second for second in curve[0]]
            values += curve[1]
        axes.plot(seconds, values, color=color, marker="o", markersize=3, label=label)
    axes.axvline(starts[1], color=FAINT, linewidth=0.8, linestyle="--")
    axes.text(starts[1] - 12, 4, "stage one", ha="right", fontsize=8, color=FAINT)
    axes.text(starts[1] + 12, 4, "stage two", ha="left", fontsize=8, color=FAINT)
    axes.set(title="Scores on held-out combinations", ylabel="% right", ylim=(0, 103))
    axes.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1.0, 0.38))
