"""Diagrams of the network: how the parts follow each other over three frames, and the denoiser's block.

Numbers (depth, width) come from the checkpoint's configuration, the little grids from a real order of revelation.
"""

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from drawing.requests import Revelation
from drawing.style import CHOSEN, FAINT, HIDDEN, INK, MIXER, SPACE, TEXT, TIME, Point, arrow, box, sheet
from nova_video.model import NOVATransformer3DModel
from nova_video.model.config import parse_arch

FRAMES = 3


def draw_overview(model: NOVATransformer3DModel, stride: int, revelation: Revelation) -> Figure:
    """Three latent frames from left to right; within each, from top to bottom, the steps that make it.

    `stride` is the autoencoder's, in pixel frames of a latent frame.
    """
    config = model.config
    (time_depth, width), (space_depth, _) = (parse_arch(name, "vit") for name in config.arch[:2])
    mlp_depth, _ = parse_arch(config.arch[2], "mlp")
    figure, axes = plt.subplots(figsize=(8.8, 7.4))
    sheet(axes, 17.6, 14.8)
    columns = [5.6 + 4.6 * frame for frame in range(FRAMES)]
    middle, span = (columns[0] + columns[-1]) / 2, columns[-1] - columns[0] + 3.6

    # In time.
    box(axes, (1.7, 13.9), (3.0, 1.0), "text, motion score,\nframes per second", TEXT, solid=False, fontsize=8)
    arrow(axes, (1.7, 13.4), (1.7, 12.55), TEXT)
    box(axes, (1.7, 12.0), (3.0, 1.1), "embedded\nas tokens", TEXT)
    for frame, x in enumerate(columns):
        label = "BOS tokens" if frame == 0 else f"latents {frame - 1}"
        box(axes, (x, 13.9), (2.6, 0.8), label, TIME, solid=False)
        arrow(axes, (x, 13.5), (x, 12.55), TIME)
    arrow(axes, (3.2, 12.0), (columns[0] - 1.8, 12.0), TEXT)
    label = f"temporal encoder: {time_depth} blocks, width {width}, causal frame by frame"
    box(axes, (middle, 12.0), (span, 1.1), label, TIME, fontsize=9)

    # In space.
    mixed = model.video_encoder.mixer is not None
    for frame, x in enumerate(columns):
        arrow(axes, (x, 11.45), (x, 10.15 if mixed and frame else 8.65), TIME)
        axes.text(x - 0.15, 11.1, f"$c_{frame}$", ha="right", va="center", fontsize=10)
        if mixed and frame:
            box(axes, (x, 9.8), (2.0, 0.7), "mixer", MIXER)
            arrow(axes, (x, 9.45), (x, 8.65), MIXER)
    if mixed:
        axes.plot([columns[0], columns[-1] - 1.0 - 0.8], [10.55, 10.55], color=MIXER, linewidth=1.1, zorder=0)
        for x in columns[1:]:
            axes.plot([x - 1.8, x - 1.8], [10.55, 9.8], color=MIXER, linewidth=1.1)
            arrow(axes, (x - 1.8, 9.8), (x - 1.0, 9.8), MIXER)
        note = "$c_0$, scaled and shifted\nby each later frame's $c_f$"
        axes.text(1.7, 10.2, note, ha="center", va="center", fontsize=8)
    sets = len(revelation.sizes)
    for frame, x in enumerate(columns):
        box(axes, (x, 8.1), (3.4, 1.1), f"spatial encoder\n{space_depth} blocks", SPACE)
        arrow(axes, (x, 7.55), (x, 6.65), SPACE)
        axes.text(x - 0.15, 7.1, "$z$", ha="right", va="center", fontsize=10)
        box(axes, (x, 6.1), (3.4, 1.1), f"denoiser, per token\n{mlp_depth} blocks", CHOSEN)
        arrow(axes, (x, 5.55), (x, 4.95), CHOSEN)
        done = (sets // 3, 2 * sets // 3, sets - 2)[frame]
        _token_grid(axes, (x, 3.75), 2.3, revelation, min(done, sets - 1))
        # The set that was made goes back into the frame, for the next set.
        axes.plot([x + 1.2, x + 2.0, x + 2.0], [3.75, 3.75, 8.1], color=SPACE, linewidth=1.1)
        arrow(axes, (x + 2.0, 8.1), (x + 1.7, 8.1), SPACE)
    axes.text(1.7, 8.1, "in space:\nset by set,\nin random order", ha="center", va="center", fontsize=9)
    note = "the frame's tokens:\nrevealed (green),\nset in hand (amber),\nhidden (grey)"
    axes.text(1.7, 3.75, note, ha="center", va="center", fontsize=8)
    axes.text(1.7, 6.1, "each token of\nthe set by itself,\nstep by step", ha="center", va="center", fontsize=9)

    # To pixels, and on to the next frame.
    for frame, x in enumerate(columns):
        arrow(axes, (x, 2.5), (x, 1.85), INK)
        axes.text(x + 0.15, 2.2, f"latents {frame}", ha="left", va="center", fontsize=8)
        if frame + 1 < FRAMES:
            side = x + 2.3
            axes.plot([x + 1.75, side, side], [2.2, 2.2, 13.9], color=TIME, linewidth=1.1, linestyle=(0, (4, 2)))
            arrow(axes, (side, 13.9), (columns[frame + 1] - 1.3, 13.9), TIME)
    box(axes, (middle, 1.3), (span, 1.1), "autoencoder's decoder, causal", FAINT, fontsize=9)
    for frame, x in enumerate(columns):
        arrow(axes, (x, 0.75), (x, 0.4), FAINT)
        first = stride * (frame - 1) + 1
        label = "pixel frame 0" if frame == 0 else f"pixel frames {first} to {first + stride - 1}"
        axes.text(x, 0.3, label, ha="center", va="top", fontsize=8)
    axes.text(1.7, 1.3, "pixels", ha="center", va="center", fontsize=9)
    return figure


def _token_grid(axes: Axes, centre: Point, side: float, revelation: Revelation, sets: int) -> None:
    """The frame's tokens after `sets` sets, with the next one in hand."""
    visible, chosen = (set(ids.tolist()) for ids in revelation.moment(sets))
    cell = side / max(revelation.rows, revelation.columns)
    left, top = centre[0] - cell * revelation.columns / 2, centre[1] + cell * revelation.rows / 2
    for token in range(revelation.rows * revelation.columns):
        row, column = divmod(token, revelation.columns)
        color = SPACE if token in visible else CHOSEN if token in chosen else HIDDEN
        corner = (left + column * cell, top - (row + 1) * cell)
        axes.add_patch(Rectangle(corner, cell, cell, facecolor=color, edgecolor="white", linewidth=0.7))


def draw_denoiser(model: NOVATransformer3DModel) -> Figure:
    """Left: one token's way through the denoiser; right: inside a block."""
    depth, width = parse_arch(model.config.arch[2], "mlp")
    values = model.patch_size**2 * model.config.image_dim
    figure, axes = plt.subplots(figsize=(8.8, 4.7))
    sheet(axes, 17.6, 9.4)

    box(axes, (1.7, 8.6), (3.0, 1.0), f"noisy token\n{values} values", CHOSEN, solid=False)
    box(axes, (5.3, 8.6), (3.3, 1.0), f"feature $z$\n{model.width} wide", SPACE, solid=False)
    box(axes, (8.9, 8.6), (3.3, 1.0), "timestep $t$", FAINT, solid=False)
    box(axes, (1.7, 6.9), (3.0, 0.9), "Linear", CHOSEN)
    box(axes, (5.3, 6.9), (3.3, 0.9), "Linear, SiLU, Linear", SPACE, fontsize=8)
    box(axes, (8.9, 6.9), (3.3, 0.9), "sinusoids, then\nLinear, SiLU, Linear", FAINT, fontsize=7.5)
    for x, color in ((1.7, CHOSEN), (5.3, SPACE), (8.9, FAINT)):
        arrow(axes, (x, 8.1), (x, 7.37), color)
    for x, y, label in (
        (1.7, 4.6, f"{depth} blocks, {width} wide"),
        (1.7, 2.9, "LN, scale and shift"),
        (1.7, 1.55, "Linear"),
    ):
        box(axes, (x, y), (3.0, 0.9), label, CHOSEN)
    arrow(axes, (1.7, 6.45), (1.7, 5.07), CHOSEN)
    arrow(axes, (1.7, 4.15), (1.7, 3.37), CHOSEN)
    arrow(axes, (1.7, 2.45), (1.7, 2.02), CHOSEN)
    arrow(axes, (1.7, 1.1), (1.7, 0.72), CHOSEN)
    axes.text(1.7, 0.6, f"prediction, {values} values", ha="center", va="top", fontsize=8.5)

    axes.text(7.1, 5.6, "$u$ = sum of both", ha="center", va="center", fontsize=9)
    axes.plot([5.3, 5.3], [6.45, 5.6], color=SPACE, linewidth=1.1)
    axes.plot([8.9, 8.9], [6.45, 5.6], color=FAINT, linewidth=1.1)
    axes.plot([5.3, 5.6], [5.6, 5.6], color=SPACE, linewidth=1.1)
    axes.plot([8.9, 8.6], [5.6, 5.6], color=FAINT, linewidth=1.1)
    axes.plot([7.1, 7.1, 7.1], [5.3, 4.6, 2.9], color=INK, linewidth=1.1)
    arrow(axes, (7.1, 4.6), (3.2, 4.6))
    arrow(axes, (7.1, 2.9), (3.2, 2.9))
    axes.text(5.2, 4.72, "scale, shift, gate", ha="center", va="bottom", fontsize=8)
    axes.text(5.2, 3.02, "scale, shift", ha="center", va="bottom", fontsize=8)

    # Inside a block.
    x = 14.5
    axes.add_patch(Rectangle((11.0, 0.2), 6.4, 8.9, facecolor="#FFF8EB", edgecolor=CHOSEN, linewidth=0.9))
    axes.text(11.25, 8.75, "inside a block, $s, b, g$ = Linear(SiLU($u$))", ha="left", va="center", fontsize=8)
    steps = ("layer norm", r"$\times\,(1 + s) + b$", "Linear, SiLU, Linear", "layer norm", r"$\times\, g$", "+")
    heights = (7.1, 5.95, 4.8, 3.65, 2.5, 1.35)
    arrow(axes, (x, 8.45), (x, heights[0] + 0.37), CHOSEN)
    axes.text(x + 0.2, 8.2, "token", va="center", fontsize=8)
    for index, (label, y) in enumerate(zip(steps, heights, strict=True)):
        size = (0.7, 0.7) if label == "+" else (3.4, 0.7)
        box(axes, (x, y), size, label, CHOSEN, solid=label not in (steps[1], steps[4], "+"))
        if index + 1 < len(steps):
            arrow(axes, (x, y - 0.35), (x, heights[index + 1] + 0.37), CHOSEN)
    arrow(axes, (x, 1.0), (x, 0.35), CHOSEN)
    axes.plot([x, x + 2.4, x + 2.4], [7.95, 7.95, 1.35], color=CHOSEN, linewidth=1.1)
    arrow(axes, (x + 2.4, 1.35), (x + 0.37, 1.35), CHOSEN)
    for y, label in ((5.95, "$s, b$"), (2.5, "$g$")):
        arrow(axes, (x - 2.45, y), (x - 1.72, y))
        axes.text(x - 2.6, y, label, ha="right", va="center", fontsize=9)
    return figure
