"""Clips that the world has not: objects that change what they do, and parts of long clips.

Legend: N clips, F frames.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from nova_worlds.rendering.clips import (
    BOUNCE_FRAMES,
    BOUNCE_PIXELS,
    CANVAS,
    GROW_RANGE,
    GROW_RATIO,
    MOVE_PIXELS,
    SIZES,
    SPAN,
    SPIN_DEGREES,
    ClipSpec,
    ObjectPath,
    object_path,
)
from nova_worlds.rendering.lexicon import MOTIONS
from nova_worlds.rendering.world import EmojiWorld, to_uint8

SPINS = (MOTIONS.index("spinning clockwise"), MOTIONS.index("spinning counterclockwise"))
RENDER_BATCH = 64  # clips at a time


def spins(spec: ClipSpec) -> Tensor:
    return (spec.motion == SPINS[0]) | (spec.motion == SPINS[1])


def steered_path(first: ClipSpec, then: ClipSpec) -> ObjectPath:
    """The path of objects that move as in `first` and then as in `then`: (N, F) of the frames of `then`."""
    begun = object_path(first)
    is_motion = {name: (then.motion == index)[:, None] for index, name in enumerate(MOTIONS)}  # each (N, 1)
    count = then.num_frames - first.num_frames
    time = torch.arange(1, count + 1, device=then.motion.device, dtype=torch.float32)  # (count,)

    def at_speed(values: tuple[float, float, float]) -> Tensor:
        return torch.tensor(values, device=time.device)[then.speed][:, None]  # (N, 1)

    def signed(ahead: str, back: str) -> Tensor:
        return is_motion[ahead].float() - is_motion[back].float()  # (N, 1)

    way = at_speed(MOVE_PIXELS) * time  # (N, count)
    x = begun.centre[:, -1:, 0] + signed("moving right", "moving left") * way
    y = begun.centre[:, -1:, 1] + signed("moving down", "moving up") * way
    # Bouncing: from the floor where there is height above, else falling from where it is.
    floor = begun.centre[:, -1:, 1] - begun.size[:, -1:] / 2 >= BOUNCE_PIXELS
    beat = torch.frac(time / at_speed(BOUNCE_FRAMES) + torch.where(floor, 0.0, 0.5))
    height = 4 * BOUNCE_PIXELS * beat * (1 - beat) - torch.where(floor, 0.0, BOUNCE_PIXELS)
    y = torch.where(is_motion["bouncing"], y - height, y)
    rate = at_speed(GROW_RATIO).log() / (SPAN - 1)
    size = begun.size[:, -1:] * (signed("growing", "shrinking") * rate * time).exp()
    turn = (at_speed(SPIN_DEGREES) * time).deg2rad()
    angle = begun.angle[:, -1:] + signed("spinning clockwise", "spinning counterclockwise") * turn
    return ObjectPath(
        torch.cat((begun.centre, torch.stack((x, y), dim=-1)), dim=1),
        torch.cat((begun.size, size), dim=1),
        torch.cat((begun.angle, angle), dim=1),
    )


def has_room(first: ClipSpec, then: ClipSpec, num_frames: int) -> Tensor:
    """True for objects that stay within the picture and the world's sizes for `num_frames` frames: (N,) bool."""
    path = steered_path(first, replace(then, num_frames=num_frames))
    low, high = (SIZES[end] * GROW_RANGE[end] for end in (0, 1))
    reach = path.size / 2 * torch.where(spins(first) | spins(then), math.sqrt(2), 1.0)[:, None]  # (N, F)
    slack = 1e-3
    inside = (path.centre - reach[..., None] >= -slack) & (path.centre + reach[..., None] <= CANVAS + slack)
    sized = (path.size >= low - slack) & (path.size <= high + slack)
    after = slice(first.num_frames, None)
    growth = (path.size[:, -1] / path.size[:, first.num_frames - 1]).log().abs()
    grows = growth <= math.log(GROW_RANGE[1] / GROW_RANGE[0])  # as far as one object of the world does
    return inside[:, after].all(dim=2).all(dim=1) & sized[:, after].all(dim=1) & grows


def render_path(world: EmojiWorld, spec: ClipSpec, path: ObjectPath) -> Tensor:
    """Objects of `spec` along a path on their backgrounds, (N, F, H, W, 3) uint8."""
    parts = []
    for row in range(0, len(spec), RENDER_BATCH):
        rows = slice(row, row + RENDER_BATCH)
        layer = world.place(spec.object[rows], ObjectPath(path.centre[rows], path.size[rows], path.angle[rows]))
        canvas = world.colors[spec.background[rows]][:, :, None, None, None]
        parts.append(to_uint8((layer[:, :3] + canvas * (1 - layer[:, 3:])) * 2 - 1))
    return torch.cat(parts)
