"""The judge of the emoji world: sees frames, says background, motion, object and relation. No learned parts.

It must also judge clips that went through an autoencoder, so every measure shrugs off haloes and specks: the object is
what differs clearly from the border's median, specks are averaged away, and boxes leave out the outermost 2% of the
object's mass on every side.

N clips, F frames, K objects of the world; pictures are (H, W), x to the right, y down, angles clockwise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from nova_worlds.rendering.clips import CANVAS, SPAN, ClipSpec, ObjectPath
from nova_worlds.rendering.lexicon import MOTIONS, STILL
from nova_worlds.rendering.world import EmojiWorld, to_uint8

RING = 2  # pixels: the border whose median is the background
THRESHOLD = 36 / 255  # an object differs from the background by this in some channel
SPECK = 0.5  # share of a pixel's 3x3 neighbourhood that must be object
MIN_AREA = 60  # pixels: less is no object
TRIM = 0.02  # of the mass left out at every side of a box

# Evidence of a motion is in units of the least that the world shows of it in SPAN frames, so kinds can be compared.
MOVE_UNIT = 20.0  # pixels
GROW_UNIT = math.log(1.3)
SPIN_UNIT = math.radians(72)
BOUNCE_UNIT = 48.0  # pixels up and down beyond where it got to
MOVES = 0.5  # evidence from which a motion counts
STANDS = 0.35  # evidence up to which an object stands still
HALF = 0.2  # of a steady motion: what each half of the clip must show

RINGS, RAYS = 12, 96  # the polar pictures that turns are read from
FREQUENCIES = 24  # of them around the circle
MAX_RATE = 16  # degrees a frame
LAGS = (1, 2, 4)  # frames between the pictures compared

CROP = 32  # pixels, side of the pictures that objects are compared in
CROP_MARGIN = 1.1  # of the box
TEMPLATE_SIZE = 64.0  # pixels at which objects are drawn for comparison
SPIN_STEP = 15  # degrees: spinning objects are compared at every multiple
LOOKS = 3  # frames, evenly spread, that an object is recognised in
SPLIT_SHARE = 0.08  # of the mass: what each of two objects has at least
GPU_CLIPS, CPU_CLIPS = 64, 4  # at a time: a CPU is quicker in small pieces


@dataclass(frozen=True, eq=False)
class Judgement:
    """The judge's findings in N clips. All (N,) int64."""

    background: Tensor
    """Index into words.COLORS."""
    motion: Tensor
    """Index into words.MOTIONS, -1 for none of them."""
    object: Tensor
    """Index into the world's names, -1 for nothing there; of two objects, the one seen where the asked one matches."""
    rank: Tensor
    """How many objects of the world match better than the asked one: 0 if recognised."""
    relation: Tensor
    """Index into words.RELATIONS, of the named object to the other; -1 for none, or one object."""
    second: Tensor
    """The other of two objects, else -1."""

    def select(self, rows: slice) -> "Judgement":
        return Judgement(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @classmethod
    def join(cls, parts: Sequence["Judgement"]) -> "Judgement":
        return cls(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)})


@dataclass(frozen=True, eq=False)
class Track:
    """The object through the clips."""

    background: Tensor
    """(N, F, 3) in [0, 1]."""
    signal: Tensor
    """(N, F, 3, H, W) difference from the background."""
    mass: Tensor
    """(N, F, H, W) 1 where the object is."""
    area: Tensor
    """(N, F) pixels."""
    centre: Tensor
    """(N, F, 2) centroid in pixels, x and y."""


class Judge:
    """Judges clips of a world: holds every object's picture on every background."""

    def __init__(self, world: EmojiWorld) -> None:
        self.world = world
        self.templates = _templates(world)  # (B, K, P)

    def __call__(self, frames: Tensor, asked: ClipSpec) -> Judgement:
        """Judge frames (N, F, H, W, 3) uint8. What was asked decides where to look: for two objects in the halves of
        the picture, for spinning ones at every angle."""
        parts = []
        chunk = CPU_CLIPS if self.world.device.type == "cpu" else GPU_CLIPS
        for at in range(0, len(asked), chunk):
            part = slice(at, at + chunk)
            parts.append(self._judge(frames[part].to(self.world.device), asked.select(part)))
        return Judgement.join(parts)

    def _judge(self, frames: Tensor, asked: ClipSpec) -> Judgement:
        track = track_object(frames)
        background = nearest_color(track.background, self.world.colors)
        templates = self.templates[background]  # (N, K, P)
        looks = torch.linspace(0, track.mass.shape[1] - 1, LOOKS).round().long().unique()
        matches = self._matches(track, asked, templates, looks).mean(dim=1)  # (N, K)
        empty = track.area.amin(dim=1) < MIN_AREA
        found = torch.where(empty, -1, matches.argmax(dim=1))
        better = (matches > matches.gather(1, asked.object[:, None])).sum(dim=1)
        seen = Judgement(
            background=background,
            motion=torch.where(empty, -1, name_motion(track)),
            object=found,
            rank=torch.where(empty, len(self.world), better),
            relation=torch.full_like(found, -1),
            second=torch.full_like(found, -1),
        )
        return self._look_at_pairs(track, asked, templates, seen) if asked.has_pairs else seen

    def identify(self, frames: Tensor, asked: ClipSpec) -> tuple[Tensor, Tensor]:
        """How well every frame of (N, F, H, W, 3) uint8 matches the asked object, (N, F) cosines, and whether that one
        matches best, (N, F) bool."""
        track = track_object(frames.to(self.world.device))
        templates = self.templates[nearest_color(track.background, self.world.colors)]
        matches = self._matches(track, asked, templates, torch.arange(frames.shape[1]))
        own = matches.gather(2, asked.object[:, None, None].expand(-1, matches.shape[1], 1))  # (N, F, 1)
        there = track.area >= MIN_AREA
        return own[..., 0] * there, (matches <= own).all(dim=2) & there

    def _matches(self, track: Track, asked: ClipSpec, templates: Tensor, looks: Tensor) -> Tensor:
        """How well every object matches in the frames `looks` (L,): (N, L, K) cosines, of the best angle for spins."""
        looks = looks.to(track.mass.device)
        signal, mass = track.signal[:, looks], track.mass[:, looks]  # (N, L, 3, H, W), (N, L, H, W)
        matches = torch.einsum("nlp,nkp->nlk", _pictures(signal, mass), templates)
        spins = asked.motion >= MOTIONS.index("spinning clockwise")
        spins &= asked.motion <= MOTIONS.index("spinning counterclockwise")
        turned = spins.nonzero().flatten()
        if len(turned):
            for degrees in range(SPIN_STEP, 360, SPIN_STEP):
                pictures = _pictures(signal[turned], mass[turned], math.radians(degrees))
                at_angle = torch.einsum("nlp,nkp->nlk", pictures, templates[turned])
                matches[turned] = matches[turned].maximum(at_angle)
        return matches

    def _look_at_pairs(self, track: Track, asked: ClipSpec, templates: Tensor, seen: Judgement) -> Judgement:
        """Split pictures of two objects where they part, and recognise the halves."""
        paired = asked.second >= 0
        signal, mass = track.signal[:, :1], track.mass[:, :1]
        axis, halves = split_mass(mass[:, 0])  # (N,), (N, 2, H, W): left or upper, right or lower
        signals = signal.expand(-1, 2, -1, -1, -1)
        matches = torch.einsum("nlp,nkp->nlk", _pictures(signals, halves), templates)  # (N, 2, K)
        rows = torch.arange(len(asked), device=matches.device)
        other = asked.second.clamp(min=0)
        straight = matches[rows, 0, asked.object] + matches[rows, 1, other]
        crossed = matches[rows, 1, asked.object] + matches[rows, 0, other]
        place = (crossed > straight).long()  # the half that the asked object matches
        own = matches[rows, place]  # (N, K)
        split = paired & (axis >= 0)
        better = (own > own.gather(1, asked.object[:, None])).sum(dim=1)
        return Judgement(
            background=seen.background,
            motion=seen.motion,
            object=torch.where(split, own.argmax(dim=1), torch.where(paired, -1, seen.object)),
            rank=torch.where(split, better, torch.where(paired, len(self.world), seen.rank)),
            relation=torch.where(split & (place == 0), axis, seen.relation),
            second=torch.where(split, matches[rows, 1 - place].argmax(dim=1), seen.second),
        )


def track_object(frames: Tensor) -> Track:
    """Tell the object from the background in frames (N, F, H, W, 3) uint8."""
    clips = frames.permute(0, 1, 4, 2, 3).float() / 255  # (N, F, 3, H, W)
    edges = (clips[..., :RING, :], clips[..., -RING:, :], clips[..., :RING], clips[..., -RING:])
    border = torch.cat([edge.flatten(3) for edge in edges], dim=3)  # (N, F, 3, pixels)
    background = border.median(dim=3).values  # (N, F, 3)
    signal = clips - background[..., None, None]
    differs = (signal.abs().amax(dim=2) > THRESHOLD).float()  # (N, F, H, W)
    mass = differs * (F.avg_pool2d(differs, 3, stride=1, padding=1) > SPECK)
    area = mass.sum(dim=(2, 3))
    weight = mass / area.clamp(min=1)[..., None, None]
    pixel = torch.arange(mass.shape[-1], device=mass.device) + 0.5
    centre = torch.stack((weight.sum(dim=2) @ pixel, weight.sum(dim=3) @ pixel), dim=-1)  # (N, F, 2)
    return Track(background, signal, mass, area, centre)


def nearest_color(background: Tensor, colors: Tensor) -> Tensor:
    """(N, F, 3) and the palette -> (N,) index of the color nearest to the clips' median background."""
    return torch.cdist(background.median(dim=1).values, colors).argmin(dim=1)


def name_motion(track: Track) -> Tensor:
    """(N,) index into MOTIONS: the motion with most evidence, STILL where there is none, else -1."""
    N, frames = track.area.shape
    if frames == 1:
        return torch.full((N,), STILL, device=track.area.device)
    if frames > SPAN:  # later frames may have turned round
        early = {f.name: getattr(track, f.name)[:, :SPAN] for f in fields(track)}
        return name_motion(Track(**early))
    x, y = track.centre.unbind(dim=-1)  # (N, F)
    scale = track.area.clamp(min=1).log() / 2
    span = (SPAN - 1) / (frames - 1)  # evidence is that of SPAN frames
    right, down, grows = (_steady(path) * span for path in (x, y, scale))
    clockwise = turn_rate(track) * (SPAN - 1)
    signed = {
        "moving right": right / MOVE_UNIT,
        "moving left": -right / MOVE_UNIT,
        "moving down": down / MOVE_UNIT,
        "moving up": -down / MOVE_UNIT,
        "growing": grows / GROW_UNIT,
        "shrinking": -grows / GROW_UNIT,
        "spinning clockwise": clockwise / SPIN_UNIT,
        "spinning counterclockwise": -clockwise / SPIN_UNIT,
        "bouncing": _detour(y) * span / BOUNCE_UNIT,
    }
    moving = [name for name in MOTIONS if name in signed]  # all but STILL
    evidence, winner = torch.stack([signed[name] for name in moving]).max(dim=0)
    motion = torch.tensor([MOTIONS.index(name) for name in moving], device=winner.device)[winner]
    restless = torch.stack(
        (
            _extent(x) / MOVE_UNIT,
            _extent(y) / MOVE_UNIT,
            _extent(scale) / GROW_UNIT,
            clockwise.abs() / SPIN_UNIT,
        )
    ).amax(dim=0)
    return torch.where(evidence >= MOVES, motion, torch.where(restless <= STANDS, STILL, -1))


def turn_rate(track: Track) -> Tensor:
    """The rate of turning of each object, (N,) radians a frame, clockwise.

    It is the rate at which the object, in polar coordinates around its centre, agrees best with itself some frames
    later. Every candidate rate is tried at all lags together.
    """
    N, frames = track.area.shape
    device = track.area.device
    angles = torch.arange(RAYS, device=device) * (2 * math.pi / RAYS)
    radii = (torch.arange(RINGS, device=device) + 0.5) / RINGS
    reach = 1.5 * (track.area / math.pi).sqrt()[..., None, None] * radii[:, None]  # (N, F, RINGS, 1)
    points = torch.stack((reach * angles.cos(), reach * angles.sin()), dim=-1) + track.centre[:, :, None, None]
    polar = _look_up(track.signal, points)  # (N, F, 3, RINGS, RAYS)
    waves = torch.fft.rfft(polar * radii[:, None].sqrt(), dim=-1)[..., 1 : FREQUENCIES + 1]
    rates = torch.deg2rad(torch.arange(-MAX_RATE, MAX_RATE + 0.5, 0.5, device=device))
    order = torch.arange(1, FREQUENCIES + 1, device=device)
    agreement = torch.zeros(N, len(rates), device=device)
    for lag in LAGS:
        if lag < frames:
            cross = (waves[:, :-lag].conj() * waves[:, lag:]).sum(dim=(1, 2, 3)) / (frames - lag)  # (N, FREQUENCIES)
            phases = torch.exp(1j * lag * rates[:, None] * order)  # (rates, FREQUENCIES)
            agreement += (cross @ phases.T).real
    return rates[agreement.argmax(dim=1)]


def split_mass(mass: Tensor) -> tuple[Tensor, Tensor]:
    """Part two objects (N, H, W) where there is least between them.

    The axis they are apart in (0 for x, 1 for y, -1 for one object), and the mass of both, the left or upper one first
    (N, 2, H, W).
    """
    side = mass.shape[-1]
    low, high = side * 3 // 10, side * 7 // 10
    pixel = torch.arange(side, device=mass.device)
    total = mass.sum(dim=(1, 2)).clamp(min=1)
    candidates = []
    for along in (1, 2):  # sums over y leave x, and the other way round
        profile = F.avg_pool1d(mass.sum(dim=along)[:, None], 5, stride=1, padding=2)[:, 0]  # (N, side)
        valley, where = profile[:, low:high].min(dim=1)
        first = (pixel < where[:, None] + low).float()  # (N, side)
        first = first[:, None, :] if along == 1 else first[:, :, None]
        halves = torch.stack((mass * first, mass * (1 - first)), dim=1)
        share = halves.sum(dim=(2, 3)).amin(dim=1) / total
        depth = valley * side / total  # 0: nothing in between
        candidates.append((torch.where(share >= SPLIT_SHARE, depth, torch.inf), halves))
    (depth_x, halves_x), (depth_y, halves_y) = candidates
    axis = torch.where(depth_x <= depth_y, 0, 1)
    clear = torch.minimum(depth_x, depth_y) < 0.5
    return torch.where(clear, axis, -1), torch.where((axis == 0)[:, None, None, None], halves_x, halves_y)


def _templates(world: EmojiWorld) -> Tensor:
    """(B, K, P) pictures of every object, upright, on every background."""
    count = len(world)
    path = ObjectPath(
        centre=torch.full((count, 1, 2), CANVAS / 2, device=world.device),
        size=torch.full((count, 1), TEMPLATE_SIZE, device=world.device),
        angle=torch.zeros(count, 1, device=world.device),
    )
    layer = world.place(torch.arange(count, device=world.device), path)  # (K, 4, 1, H, W)
    templates = []
    for color in world.colors:
        clips = layer[:, :3] + color.view(3, 1, 1, 1) * (1 - layer[:, 3:])
        track = track_object(to_uint8(clips * 2 - 1))
        templates.append(_pictures(track.signal, track.mass)[:, 0])
    return torch.stack(templates)


def _pictures(signal: Tensor, mass: Tensor, turned: float = 0.0) -> Tensor:
    """Objects cut out for comparison: signal (N, L, 3, H, W) and mass (N, L, H, W) -> (N, L, P) of length 1.

    With `turned`, of the object turned back by this angle.
    """
    side = mass.shape[-1]
    middle = torch.tensor([side / 2, side / 2], device=mass.device)
    if turned:
        half = torch.arange(0.5, side, 2, device=mass.device)  # every other pixel will do for a box
        grid = torch.stack(torch.meshgrid(half, half, indexing="xy"), dim=-1)  # (H/2, W/2, 2)
        upright = _look_up(
            mass[:, :, None], (_turn(grid - middle, turned) + middle).expand(*mass.shape[:2], -1, -1, -1)
        )
        box_centre, box_side = _box(upright[:, :, 0])
        box_centre, box_side = 2 * box_centre, 2 * box_side
    else:
        box_centre, box_side = _box(mass)
    # Twice as fine as wanted, then averaged, so that nothing aliases.
    steps = (torch.arange(2 * CROP, device=mass.device) + 0.5) / (2 * CROP) - 0.5
    offsets = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1)  # (2 CROP, 2 CROP, 2)
    points = box_centre[:, :, None, None] + offsets * (CROP_MARGIN * box_side)[:, :, None, None, None]
    fine = _look_up(signal, _turn(points - middle, turned) + middle)  # (N, L, 3, 2 CROP, 2 CROP)
    pictures = F.avg_pool2d(fine.flatten(0, 1), 2).unflatten(0, mass.shape[:2]).flatten(2)
    return F.normalize(pictures, dim=-1)


def _box(mass: Tensor) -> tuple[Tensor, Tensor]:
    """The square around an object's mass (N, L, H, W) without its outermost TRIM: centre (N, L, 2) and side (N, L)."""
    total = mass.sum(dim=(2, 3)).clamp(min=1)[..., None]
    bounds = []
    for along in (2, 3):
        share = mass.sum(dim=along).cumsum(dim=-1) / total  # (N, L, pixels)
        # A pixel counts in part: where the share crosses the bound within it.
        low = 1 + (share < TRIM).sum(dim=-1) - _find_crossing(share, TRIM)
        high = 1 + (share < 1 - TRIM).sum(dim=-1) - _find_crossing(share, 1 - TRIM)
        bounds.append((low, high))
    (left, right), (top, bottom) = bounds
    side = torch.maximum(right - left, bottom - top).clamp(min=4)
    return torch.stack(((left + right) / 2, (top + bottom) / 2), dim=-1), side


def _find_crossing(share: Tensor, bound: float) -> Tensor:
    """The part of the pixel in which the growing `share` crosses the bound that lies beyond it."""
    index = (share < bound).sum(dim=-1, keepdim=True).clamp(max=share.shape[-1] - 1)
    after = share.gather(-1, index)
    before = torch.where(index > 0, share.gather(-1, (index - 1).clamp(min=0)), 0)
    return ((after - bound) / (after - before).clamp(min=1e-6)).clamp(0, 1)[..., 0]


def _look_up(values: Tensor, points: Tensor) -> Tensor:
    """values (N, L, C, H, W) at points (N, L, h, w, 2) in pixels, 0 outside -> (N, L, C, h, w)."""
    grid = points * (2 / values.shape[-1]) - 1
    found = F.grid_sample(values.flatten(0, 1), grid.flatten(0, 1), padding_mode="zeros", align_corners=False)
    return found.unflatten(0, values.shape[:2])


def _turn(points: Tensor, angle: float) -> Tensor:
    """points (..., 2) turned clockwise around the origin."""
    x, y = points.unbind(dim=-1)
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.stack((cos * x - sin * y, sin * x + cos * y), dim=-1)


def _steady(path: Tensor) -> Tensor:
    """(N, F) -> (N,) how far a path got, by its line of best fit; nothing if either half took little part in it."""
    frames = path.shape[1]
    time = torch.arange(frames, device=path.device) - (frames - 1) / 2
    way = (path @ time) / time.square().sum() * (frames - 1)
    middle = path[:, frames // 2]
    least = HALF * way.abs()
    halves = (middle - path[:, 0], path[:, -1] - middle)
    both = torch.stack([half * way.sign() >= least for half in halves]).all(dim=0)
    return way * both


def _detour(path: Tensor) -> Tensor:
    """(N, F) -> (N,) the length of a path beyond where it got to, jitter of single frames aside."""
    if path.shape[1] >= 3:
        path = path.unfold(1, 3, 1).median(dim=2).values
    return path.diff(dim=1).abs().sum(dim=1) - (path[:, -1] - path[:, 0]).abs()


def _extent(path: Tensor) -> Tensor:
    return path.amax(dim=1) - path.amin(dim=1)
