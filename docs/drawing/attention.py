"""The two attention schemes: the temporal encoder's block-causal mask, and the spatial encoder's random sets.

Masks, sizes and orders are the model's own; the functions here only arrange and colour them.
Legend: L tokens of a frame, Lc condition tokens of a frame, V revealed tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from drawing.style import ABSENT, CHOSEN, FAINT, FRAME_SHADES, HIDDEN, INK, SPACE, TEXT, TIME
from nova_video.model.attention import block_causal_mask

Array = np.ndarray


# In time ------------------------------------------------------------------------------------------------------------


def temporal_mask(condition_tokens: int, frame_tokens: int, num_frames: int) -> Array:
    """(N, N) bool: the mask that training hands to the temporal encoder."""
    return block_causal_mask(condition_tokens, frame_tokens, num_frames, torch.device("cpu")).numpy()


def draw_temporal_mask(mask: Array, condition_tokens: int, frame_tokens: int) -> Figure:
    """Rows attend to columns. A cell is coloured by what it reads; the first block is text, motion and frame 0."""
    count = len(mask)
    num_frames = (count - condition_tokens) // frame_tokens
    block = np.concatenate([np.zeros(condition_tokens, int), 1 + np.arange(num_frames).repeat(frame_tokens)])
    shades = [FRAME_SHADES[min(frame, len(FRAME_SHADES) - 1)] for frame in range(num_frames)]
    cells = np.where(mask, 1 + block, 0)  # 0: not attended to

    figure, axes = plt.subplots(figsize=(7.0, 6.0))
    axes.imshow(cells, cmap=ListedColormap([ABSENT, TEXT, *shades]), vmin=0, vmax=num_frames + 1)
    starts = [0, *(condition_tokens + frame * frame_tokens for frame in range(num_frames))]
    middles = [(a + b - 1) / 2 for a, b in zip(starts, [*starts[1:], count], strict=True)]
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="white", linewidth=1.6)
        axes.axvline(start - 0.5, color="white", linewidth=1.6)
    columns = [f"frame {frame}\n{frame_tokens} tokens" for frame in range(num_frames)]
    axes.set_xticks(middles, [f"text and motion\n{condition_tokens} tokens", *columns], fontsize=7.5)
    inputs = ["BOS", *(f"latents {frame}" for frame in range(num_frames - 1))]
    axes.set_yticks(
        middles,
        ["text and motion", *(f"frame {frame}  (reads {given})" for frame, given in enumerate(inputs))],
    )
    axes.tick_params(length=0)
    axes.set_title("The temporal encoder: each row attends to the coloured columns", pad=10)
    axes.spines[:].set_visible(False)

    step = num_frames // 2  # one row of blocks: what sampling computes in one step
    top = condition_tokens + step * frame_tokens
    outline = Rectangle((-0.5, top - 0.5), top + frame_tokens, frame_tokens, fill=False, edgecolor=CHOSEN)
    outline.set(linewidth=2.6, zorder=5, clip_on=False)
    axes.add_patch(outline)
    note = f"step {step} of sampling:\nonly these rows,\nthe columns of\nearlier steps\nfrom the cache"
    axes.annotate(
        note,
        xy=(top + frame_tokens - 0.5, top + frame_tokens / 2 - 0.5),
        xytext=(count + 3, top + frame_tokens / 2 - 0.5),
        arrowprops={"arrowstyle": "-", "color": CHOSEN, "linewidth": 1.6},
        va="center",
        fontsize=8.5,
        annotation_clip=False,
    )
    return figure


# In space -----------------------------------------------------------------------------------------------------------


def set_of_token(order: Array, sizes: Sequence[int]) -> Array:
    """(L,) the set, from 0, in which each token of a frame is revealed."""
    sets = np.empty(len(order), int)
    sets[order] = np.arange(len(sizes)).repeat(sizes)
    return sets


def draw_sets(order: Array, sizes: Sequence[int], rows: int, columns: int, asked: int) -> Figure:
    """One frame's order of revelation, and by set (of `asked` sets) how many tokens it has and how many stay hidden."""
    sets = set_of_token(order, sizes).reshape(rows, columns)
    figure = plt.figure(figsize=(8.6, 3.7))
    panels = figure.add_gridspec(2, 2, width_ratios=(1, 1.3), wspace=0.24, hspace=0.3)
    grid = figure.add_subplot(panels[:, 0])
    bars = figure.add_subplot(panels[1, 1])
    curve = figure.add_subplot(panels[0, 1], sharex=bars)

    last = max(len(sizes) - 1, 1)
    grid.imshow(sets, cmap="cividis", vmin=0, vmax=last)
    for row, column in np.ndindex(sets.shape) if max(sets.shape) <= 12 else ():
        shown = int(sets[row, column])
        color = "white" if shown < 0.55 * last else INK
        grid.text(column, row, str(shown + 1), ha="center", va="center", fontsize=8.5, color=color)
    _cell_lines(grid, rows, columns)
    grid.set(title=f"The set in which each of {rows * columns} tokens appears", xticks=[], yticks=[])

    numbers = np.arange(1, len(sizes) + 1)
    colors = plt.get_cmap("cividis")((numbers - 1) / last)
    bars.bar(numbers, sizes, color=colors, edgecolor=INK, linewidth=0.5)
    for number, size in zip(numbers, sizes, strict=True) if len(sizes) <= 32 else ():
        bars.text(number, size + 0.03 * max(sizes), str(size), ha="center", va="bottom", fontsize=8)
    bars.set(xlabel="set", ylabel="tokens of the set", xlim=(-0.7, len(sizes) + 0.7), ylim=(0, 1.2 * max(sizes)))
    bars.set_xticks(numbers if len(sizes) <= 32 else numbers[:: len(sizes) // 8])

    hidden = sum(sizes) - np.concatenate([[0], np.cumsum(sizes)])
    curve.plot(np.arange(len(hidden)), hidden, color=SPACE, marker="o", markersize=3.5, linewidth=1.4)
    curve.set(ylabel="still hidden", ylim=(0, 1.1 * sum(sizes)))
    curve.tick_params(labelbottom=False)
    left_out = asked - len(sizes)
    empty = f" ({left_out} of them empty, left out)" if left_out else ""
    curve.set_title(f"Cosine schedule for {asked} sets{empty}")
    for axes in (bars, curve):
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels([bars, curve])
    return figure


def spatial_masks(condition_tokens: int, num_tokens: int, visible_ids: Array) -> tuple[Array, Array]:
    """(Lc + L, Lc + L) bool twice: who attends to whom in the encoder's first and in its second half.

    Tokens stand in raster order behind the condition. In the first half those not revealed are not there at all.
    """
    present = np.zeros(condition_tokens + num_tokens, bool)
    present[:condition_tokens] = True
    present[condition_tokens + visible_ids] = True
    return np.outer(present, present), np.ones((len(present), len(present)), bool)


def draw_spatial_attention(
    moments: Sequence[tuple[Array, Array]], condition_tokens: int, rows: int, columns: int
) -> Figure:
    """A column for each moment (V revealed ids, S ids of the set in hand): the frame, then both halves' attention."""
    num_tokens = rows * columns
    figure, panels = plt.subplots(
        3, len(moments), figsize=(2.75 * len(moments) + 0.6, 8.2), height_ratios=(0.8, 1, 1), squeeze=False
    )
    colors = ListedColormap([ABSENT, TIME, SPACE, HIDDEN, CHOSEN])
    for (frame, first, second), (visible, chosen) in zip(panels.T, moments, strict=True):
        kind = np.full(num_tokens, 3)  # mask tokens; 1 is the condition, 2 revealed, 4 the set in hand
        kind[visible], kind[chosen] = 2, 4
        frame.imshow(kind.reshape(rows, columns), cmap=colors, vmin=0, vmax=4)
        _cell_lines(frame, rows, columns)
        frame.set_title(f"{len(visible)} revealed, {len(chosen)} to come next")
        kinds = np.concatenate([np.ones(condition_tokens, int), kind])
        for axes, mask in zip((first, second), spatial_masks(condition_tokens, num_tokens, visible), strict=True):
            axes.imshow(np.where(mask, kinds, 0), cmap=colors, vmin=0, vmax=4, interpolation="nearest")
            axes.axhline(condition_tokens - 0.5, color="white", linewidth=1)
            axes.axvline(condition_tokens - 0.5, color="white", linewidth=1)
        for axes in (frame, first, second):
            axes.set_xticks([])
            axes.set_yticks([])
    count = condition_tokens + num_tokens
    size = f"{count} x {count} tokens"
    labels = ("the frame", f"first half of the blocks\n{size}", f"second half of the blocks\n{size}")
    for axes, label in zip(panels[:, 0], labels, strict=True):
        axes.set_ylabel(label, labelpad=8)
    named = {
        "condition (the temporal encoder's)": TIME,
        "revealed": SPACE,
        "set in hand (mask tokens)": CHOSEN,
        "later sets (mask tokens)": HIDDEN,
        "not attended to": ABSENT,
    }
    handles = [Rectangle((0, 0), 1, 1, facecolor=color, edgecolor=FAINT, linewidth=0.5) for color in named.values()]
    figure.align_ylabels(panels[:, 0])
    figure.tight_layout(h_pad=1.0, rect=(0, 0.055, 1, 1))
    figure.legend(handles, list(named), loc="lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _cell_lines(axes: Axes, rows: int, columns: int) -> None:
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
