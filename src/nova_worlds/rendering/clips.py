"""The contents of clips as numbers: `ClipSpec`, a batch of clips, and the path of each object.

The paths are plain functions of the frame number, so a clip has any length: movers turn round at the edge, growing and
shrinking swing back. Places and phases are chosen so that the first `SPAN` frames show the named motion and nothing
else: a mover starts far enough from the edge, a grower small enough, and a bouncer meets the floor at least once.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from nova_worlds.rendering.lexicon import MOTIONS

CANVAS = 128  # pixels, height and width of a clip
SPAN = 17  # frames of a usual clip, at FPS
FPS = 8
SIZES = (46.0, 74.0)  # side of an object's bounding square in pixels
PAIR_SIZES = (44.0, 56.0)  # the same where two objects share a picture

# Per speed: slowly, plain, quickly. The fastest mover crosses the whole room of the largest object in one SPAN.
MOVE_PIXELS = (1.25, 2.25, 3.375)  # a frame
GROW_RATIO = (1.3, 1.55, 1.85)  # size after SPAN frames over size at the first
SPIN_DEGREES = (4.5, 7.5, 11.25)  # a frame
BOUNCE_FRAMES = (12.0, 9.0, 7.0)  # from floor to floor

GROW_RANGE = (0.75, 1.4)  # of the clip's size: where growing and shrinking turn round
SPIN_START = 45.0  # degrees: spins start upright, at most this far to either side
BOUNCE_PIXELS = 36.0  # height of a bounce
PAIR_OFFSET = 12.0  # pixels: of two objects, each is at most this far from the middle across their axis


@dataclass(frozen=True, eq=False)
class ClipSpec:
    """A batch of N clips of the same length. All tensors are of shape (N,) unless noted, on one device."""

    num_frames: int
    has_pairs: bool
    """True if any clip may show a second object. It is known without a transfer from the device."""
    object: Tensor
    """Index into the world's names."""
    background: Tensor
    """Index into words.COLORS."""
    motion: Tensor
    """Index into words.MOTIONS."""
    speed: Tensor
    """Index into words.SPEEDS."""
    size: Tensor
    """Side of the object's bounding square in pixels, before it grows or shrinks."""
    place: Tensor
    """(N, 2) x, y in [0, 1): where in the room it has."""
    phase: Tensor
    """In [0, 1): how far into its motion it starts."""
    second: Tensor
    """The other object of a picture of two, else -1."""
    relation: Tensor
    """Index into words.RELATIONS (`object` is `relation` `second`), else -1."""
    second_size: Tensor
    second_place: Tensor
    """(N, 2)."""

    def __len__(self) -> int:
        return self.object.shape[0]

    def select(self, index: Tensor | slice) -> "ClipSpec":
        """The clips of `index`, in that order."""
        return self._with({name: tensor[index] for name, tensor in self.tensors().items()})

    def put(self, index: Tensor, clips: "ClipSpec") -> "ClipSpec":
        """With `clips` in the places of `index`."""
        return self._with({name: v.index_copy(0, index, getattr(clips, name)) for name, v in self.tensors().items()})

    def to(self, device: torch.device | str) -> "ClipSpec":
        return self._with({name: tensor.to(device) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    def _with(self, tensors: dict[str, Any]) -> "ClipSpec":
        return replace(self, **tensors)


@dataclass(frozen=True, eq=False)
class ObjectPath:
    """Where objects are, frame by frame: centre (N, F, 2) and size (N, F) in pixels, angle (N, F) in radians,
    clockwise on the screen."""

    centre: Tensor
    size: Tensor
    angle: Tensor


def object_path(spec: ClipSpec) -> ObjectPath:
    """The path of every clip's (first) object."""
    device = spec.object.device
    time = torch.arange(spec.num_frames, device=device, dtype=torch.float32)  # (F,)
    is_motion = {name: (spec.motion == index)[:, None] for index, name in enumerate(MOTIONS)}  # each (N, 1)
    growing, shrinking = is_motion["growing"], is_motion["shrinking"]
    clockwise, counterclockwise = is_motion["spinning clockwise"], is_motion["spinning counterclockwise"]
    size, phase = spec.size[:, None], spec.phase[:, None]  # (N, 1)

    # How far the object reaches from its centre at most: everything stays inside the picture.
    reach = 0.5 * size
    reach = torch.where(growing | shrinking, reach * GROW_RANGE[1], reach)
    reach = torch.where(clockwise | counterclockwise, reach * math.sqrt(2), reach)
    room = CANVAS - 2 * reach  # (N, 1)
    centre = reach + spec.place * room  # (N, 2)
    x, y = (centre[:, axis, None].expand(-1, spec.num_frames) for axis in (0, 1))  # (N, F)

    # Movers: a straight line that turns round at the edge, started where SPAN frames fit.
    step = _per_speed(MOVE_PIXELS, spec)  # (N, 1)
    start = phase * (room - step * (SPAN - 1))
    ahead = reach + _swing(start + step * time, room)  # left or top to right or bottom
    back = reach + _swing(room - start - step * time, room)
    x = torch.where(is_motion["moving right"], ahead, torch.where(is_motion["moving left"], back, x))
    y = torch.where(is_motion["moving down"], ahead, torch.where(is_motion["moving up"], back, y))

    # Bouncing: parabolas that meet the floor every few frames.
    beat = torch.frac(phase + time / _per_speed(BOUNCE_FRAMES, spec))  # (N, F)
    floor = reach + BOUNCE_PIXELS + spec.place[:, 1:] * (room - BOUNCE_PIXELS)
    y = torch.where(is_motion["bouncing"], floor - 4 * BOUNCE_PIXELS * beat * (1 - beat), y)

    # Growing and shrinking: an even rate of the logarithm of the size.
    low, high = (math.log(bound) for bound in GROW_RANGE)
    rate = _per_speed(GROW_RATIO, spec).log() / (SPAN - 1)  # (N, 1)
    start = phase * (high - low - rate * (SPAN - 1))
    larger = low + _swing(start + rate * time, high - low)
    smaller = low + _swing(high - low - start - rate * time, high - low)
    zoom = torch.where(growing, larger, torch.where(shrinking, smaller, torch.zeros_like(larger)))

    turn = SPIN_START * (2 * phase - 1) + _per_speed(SPIN_DEGREES, spec) * time  # (N, F), degrees
    degrees = torch.where(clockwise, turn, torch.where(counterclockwise, -turn, torch.zeros_like(turn)))
    return ObjectPath(torch.stack((x, y), dim=-1), size * zoom.exp(), degrees.deg2rad())


def pair_paths(spec: ClipSpec) -> tuple[ObjectPath, ObjectPath]:
    """The paths of both objects in pictures of two, apart along the axis of their relation.

    Each object has one half of the picture; along the other axis they are about level.
    """
    beside = (spec.relation == 0)[:, None]  # (N, 1): next to each other, else one above the other
    paths = []
    for size, place, side in ((spec.size, spec.place, 0.0), (spec.second_size, spec.second_place, 1.0)):
        reach = 0.5 * size[:, None]
        room = CANVAS / 2 - 2 * reach
        along = side * CANVAS / 2 + reach + place[:, :1] * room  # (N, 1)
        across = CANVAS / 2 + (2 * place[:, 1:] - 1) * PAIR_OFFSET
        centre = torch.where(beside, torch.cat((along, across), 1), torch.cat((across, along), 1))  # (N, 2)
        upright = torch.zeros(len(spec), spec.num_frames, device=size.device)
        paths.append(ObjectPath(centre[:, None].expand(*upright.shape, 2), size[:, None].expand_as(upright), upright))
    return paths[0], paths[1]


def _per_speed(values: tuple[float, float, float], spec: ClipSpec) -> Tensor:
    return torch.tensor(values, device=spec.speed.device)[spec.speed][:, None]  # (N, 1)


def _swing(distance: Tensor, room: Tensor | float) -> Tensor:
    """There and back in [0, room]: the same as `distance` while that is inside, turning round at either end."""
    return room - (torch.remainder(distance, 2 * room) - room).abs()
