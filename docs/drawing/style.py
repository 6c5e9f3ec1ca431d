"""How the pictures look: colours that colour-blind readers can tell apart, boxes and arrows, files that stay small.

Everything is drawn on white, so that a page with a dark theme shows it as well.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image, ImageFont

# The palette of Okabe and Ito, and what each colour stands for on every picture.
TEXT = "#CC79A7"  # text and motion tokens
TIME = "#0072B2"  # the temporal encoder and its features
MIXER = "#D55E00"
SPACE = "#009E73"  # the spatial encoder, tokens that are revealed
CHOSEN = "#E69F00"  # the set being made, and the denoiser
HIDDEN = "#C8CCD0"  # tokens not revealed
ABSENT = "#F4F5F6"  # pairs that do not attend
INK = "#24292F"
FAINT = "#6E7781"
FRAME_SHADES = ("#08519C", "#2171B5", "#4292C6", "#6BAED6", "#9ECAE1")  # blocks of frames, first to last
LIGHT = (TEXT, CHOSEN)  # dark letters are easier to read on these

Point = tuple[float, float]

DPI = 150
plt.rcParams.update(
    {
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "axes.linewidth": 0.7,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "figure.facecolor": "white",
        "mathtext.fontset": "dejavusans",
    }
)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG of at most 256 colours, which keeps drawings small, and close the figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.08)
    plt.close(figure)
    picture = Image.open(buffer).convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)


def save_photos(figure: Figure, path: Path) -> None:
    """Write a WebP, for figures made of frames, whose colours are too many for a palette, and close the figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.08)
    plt.close(figure)
    Image.open(buffer).convert("RGB").save(path, quality=88, method=6)


def save_animation(pictures: Sequence[Image.Image], durations: Sequence[int], path: Path, most_bytes: int) -> None:
    """Write an endless WebP, each picture for its milliseconds; of lower quality where it would be too large."""
    for quality in (85, 75, 60, 45, 30):
        pictures[0].save(
            path,
            save_all=True,
            append_images=pictures[1:],
            duration=list(durations),
            loop=0,
            quality=quality,
            method=4,
            allow_mixed=True,
        )
        if path.stat().st_size <= most_bytes:
            break


def font(size: int) -> ImageFont.FreeTypeFont:
    """The font of the figures, for pictures that are not drawn by matplotlib."""
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


def rgb(color: str) -> tuple[int, int, int]:
    """A colour of the palette for pictures that are not drawn by matplotlib."""
    red, green, blue = (round(255 * value) for value in to_rgb(color))
    return red, green, blue


def sheet(axes: Axes, width: float, height: float) -> None:
    """An empty drawing board, in units of its own, x to the right and y up."""
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")


def box(
    axes: Axes, centre: Point, size: Point, label: str, color: str, *, solid: bool = True, fontsize: float = 8.5
) -> None:
    """A rounded box; `solid` ones carry weights, the others are data."""
    (x, y), (width, height) = centre, size
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=color if solid else "white",
            edgecolor=color,
            linewidth=1.3,
        )
    )
    ink = "white" if solid and color not in LIGHT else INK
    axes.text(x, y, label, ha="center", va="center", color=ink, fontsize=fontsize)


def arrow(axes: Axes, start: Point, end: Point, color: str = INK, *, curve: str = "arc3", dashed: bool = False) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=9,
            connectionstyle=curve,
            color=color,
            linewidth=1.1,
            linestyle="--" if dashed else "-",
            shrinkA=0,
            shrinkB=0,
        )
    )
