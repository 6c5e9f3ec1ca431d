"""A world of shapes that code draws, for tests and for training without a download.

Its format is that of the real art.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from nova_worlds.rendering.prepare import WorldPicture, write_world
from nova_worlds.rendering.world import EmojiWorld

SIDE = 256
OVERSAMPLE = 4
RIM_COLOR = (35, 35, 60)
SPOT_COLOR = (245, 240, 215)
SPOT_RADIUS = 0.17
SCORE_CLIPS = 2
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Shape:
    """A filled outline with a dark rim, and a light spot off its middle that shows how it is turned."""

    outline: Points
    """In [-1, 1], y down."""
    color: tuple[int, int, int]
    spot: tuple[float, float]
    hole: float = 0.0
    """Radius of a hole in the middle."""


def prepare_shapes(output: Path, score_clips: int = SCORE_CLIPS) -> EmojiWorld:
    """Prepare a world of ten shapes in `output`."""
    pictures = [WorldPicture(name, "shapes", "", draw(shape)) for name, shape in _shapes().items()]
    return write_world(pictures, output, "shapes", "shapes drawn by nova-video, Apache-2.0", score_clips)


def draw(shape: Shape) -> Image.Image:
    """The shape on a clear ground, SIDE pixels wide; drawn larger and reduced, for smooth edges."""
    side = SIDE * OVERSAMPLE
    image = Image.new("RGBA", (side, side))
    brush = ImageDraw.Draw(image)

    def pixels(points: Points, scale: float = 1.0) -> Points:
        return [((x * scale + 1) / 2 * side, (y * scale + 1) / 2 * side) for x, y in points]

    brush.polygon(pixels(shape.outline), fill=shape.color)
    brush.line([*pixels(shape.outline, 0.97), pixels(shape.outline, 0.97)[0]], fill=RIM_COLOR, width=side // 24)
    if shape.hole > 0:
        brush.polygon(pixels(_circle(shape.hole + 0.06)), fill=RIM_COLOR)
        brush.polygon(pixels(_circle(shape.hole)), fill=(0, 0, 0, 0))
    brush.polygon(pixels([(shape.spot[0] + x, shape.spot[1] + y) for x, y in _circle(SPOT_RADIUS)]), fill=SPOT_COLOR)
    return image.convert("RGBa").resize((SIDE, SIDE), Image.Resampling.BOX).convert("RGBA")


def _shapes() -> dict[str, Shape]:
    return {
        "circle": Shape(_circle(0.95), (215, 60, 45), (-0.35, -0.45)),
        "square": Shape([(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)], (40, 90, 220), (-0.5, -0.55)),
        "triangle": Shape([(0, -0.9), (0.95, 0.8), (-0.95, 0.8)], (60, 170, 75), (-0.45, 0.5)),
        "star": Shape(_star(5, 0.98, 0.45), (250, 205, 40), (0, -0.5)),
        "heart": Shape(_heart(), (240, 110, 165), (0.4, -0.35)),
        "cross": Shape(_cross(0.33), (20, 125, 125), (0.65, 0)),
        "ring": Shape(_circle(0.95), (240, 140, 40), (0, -0.68), hole=0.42),
        "crescent": Shape(_crescent(), (145, 85, 205), (-0.72, 0.05)),
        "arrow": Shape(_arrow(), (60, 205, 215), (0.5, 0)),
        "diamond": Shape([(0, -0.95), (0.6, 0), (0, 0.95), (-0.6, 0)], (130, 85, 45), (0, 0.45)),
    }


def _circle(radius: float, count: int = 96) -> Points:
    return _star(count // 2, radius, radius)


def _star(tips: int, outer: float, inner: float) -> Points:
    """Corners in turn on two circles, the first straight up."""
    corners = []
    for corner in range(2 * tips):
        angle = math.pi * corner / tips - math.pi / 2
        radius = inner if corner % 2 else outer
        corners.append((radius * math.cos(angle), radius * math.sin(angle)))
    return corners


def _heart(count: int = 96) -> Points:
    angles = [2 * math.pi * step / count for step in range(count)]
    curve = [
        (16 * math.sin(a) ** 3, 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a))
        for a in angles
    ]
    return [(x / 17.5, -(y + 2.5) / 17.5) for x, y in curve]


def _cross(arm: float) -> Points:
    far = 0.95
    quarter = [(-arm, -far), (arm, -far), (arm, -arm)]
    turns = [quarter]
    for _ in range(3):
        turns.append([(-y, x) for x, y in turns[-1]])
    return [point for turn in turns for point in turn]


def _crescent(count: int = 48) -> Points:
    """Between a circle and a smaller one moved right, open to the right."""
    outer_angles = [math.radians(50 + 260 * step / count) for step in range(count)]
    inner_angles = [math.radians(290 - 220 * step / count) for step in range(count)]
    outer = [(0.95 * math.cos(a), 0.95 * math.sin(a)) for a in outer_angles]
    inner = [(0.33 + 0.78 * math.cos(a), 0.78 * math.sin(a)) for a in inner_angles]
    return outer + inner


def _arrow() -> Points:
    return [(-0.95, -0.28), (0.1, -0.28), (0.1, -0.8), (0.95, 0), (0.1, 0.8), (0.1, 0.28), (-0.95, 0.28)]
