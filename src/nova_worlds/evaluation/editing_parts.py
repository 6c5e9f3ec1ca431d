"""The parts of the benchmark beyond one clip: given frames, tasks, right answers, verdicts.

Everything is drawn from held-out combinations of the emoji world and given as real renders. Each part also knows the
answer, frames as a perfect model would return them: what the judge is judged on, in the very frames it looks at.

Legend: N cases, F frames, G of them given.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from nova_worlds.evaluation.paths import SPINS, has_room, render_path, spins, steered_path
from nova_worlds.evaluation.world_benchmark import (
    EvaluatedPipeline,
    LongSettings,
    Sample,
    SamplingSettings,
    fill,
    in_words,
)
from nova_worlds.judging.judge import Judge, Judgement
from nova_worlds.rendering.clips import (
    CANVAS,
    FPS,
    SPAN,
    ClipSpec,
)
from nova_worlds.rendering.lexicon import COLORS, MOTIONS, PLAIN, SPEEDS, STILL
from nova_worlds.rendering.world import EmojiWorld, Split, to_uint8

NUM_GIVEN = 9  # real frames that a clip begins with
LONG = 65  # frames that it is carried on to
SETTLE = (
    16  # first frame that the judge looks at after a change: with it, the new sentence has had 8 frames, one second
)
LAST_STEERED = SETTLE + 15  # before which it looks: 15 frames show every motion, and need less room than a whole SPAN
NUM_STEERED = SETTLE + SPAN
TRIES = 64  # beginnings drawn for each clip until one leaves room for the change
HOLE = (16, 112)  # pixels: from where to where the hole in a picture is, both ways

Slices = dict[str, tuple[int, int]]
"""Which frames each score is judged on: from the first to before the last."""


@dataclass(frozen=True, eq=False)
class Case:
    """N cases of one part."""

    given: ClipSpec
    """The contents of the given frames."""
    asked: ClipSpec
    """The contents that the sentence names."""
    hole: Tensor
    """(N,) index into the part's holes, -1 where frames are given whole."""

    def __len__(self) -> int:
        return len(self.asked)

    def select(self, rows: slice | Tensor) -> "Case":
        return Case(self.given.select(rows), self.asked.select(rows), self.hole[rows])

    def to(self, device: torch.device) -> "Case":
        return Case(self.given.to(device), self.asked.to(device), self.hole.to(device))


@dataclass(frozen=True, eq=False)
class Verdict:
    """The judge's verdict on N cases."""

    flags: dict[str, Tensor]
    """By score, each (N,) bool."""
    seen: list[str]
    """In words."""


class Part(ABC):
    """One way of going beyond a clip."""

    title: str
    """The task in one line."""
    num_frames: int
    given_frames: int
    judged: tuple[str, ...] = ("background", "motion", "object")
    """The scores that a judge must master on real renders."""
    slices: Slices
    holes: Tensor | None = None
    """(holes, H, W) bool: True is filled in."""
    sheet_frames: int = 6

    @abstractmethod
    def ask(self, world: EmojiWorld, count: int, generator: torch.Generator, split: Split) -> Case:
        """Draw cases, on the CPU."""

    @abstractmethod
    def real(self, world: EmojiWorld, case: Case) -> Tensor:
        """The answer (N, F, H, W, 3) uint8, in the frames that are judged."""

    @abstractmethod
    def prompts(self, world: EmojiWorld, case: Case) -> list[str] | list[list[tuple[float, str]]]:
        """Sentences or timelines of them."""

    @abstractmethod
    def judge(self, judge: Judge, case: Case, frames: Tensor) -> Verdict:
        """Look at frames (N, F, H, W, 3) uint8."""

    def given(self, world: EmojiWorld, case: Case) -> Tensor:
        """(N, G, H, W, 3) uint8."""
        return to_uint8(world.render(replace(case.given, num_frames=self.given_frames)))

    def generate(
        self,
        pipe: EvaluatedPipeline,
        world: EmojiWorld,
        case: Case,
        sampling: SamplingSettings,
        long: LongSettings,
        first: int,
    ) -> Tensor:
        """Frames that a model makes of the cases, (N, F, H, W, 3) uint8. `first` is the number of the first case."""
        prompts = self.prompts(world, case)
        given = self.given(world, case) if self.given_frames else None
        frames = torch.empty(len(case), self.num_frames, CANVAS, CANVAS, 3, dtype=torch.uint8)
        for index in case.hole.unique().tolist():  # a call has one mask for all
            rows = (case.hole == index).nonzero().flatten()
            frames[rows.cpu()] = fill(
                pipe,
                [prompts[row] for row in rows.tolist()],
                sampling,
                long,
                [first + row for row in rows.tolist()],
                self.num_frames,
                None if given is None else given[rows],
                None if self.holes is None else self.holes[index],
            )
        return frames

    def known(self, case: Case) -> Tensor:
        """Which pixels of the frames were given: (N, G, H, W, 1) bool."""
        if self.holes is None:
            holes = torch.zeros(len(case), CANVAS, CANVAS, dtype=torch.bool, device=case.hole.device)
        else:
            holes = self.holes.to(case.hole.device)[case.hole]
        return ~holes[:, None, :, :, None].expand(-1, self.given_frames, -1, -1, -1)

    def put_given(self, world: EmojiWorld, case: Case, frames: Tensor) -> Tensor:
        """Frames (N, F, H, W, 3) with the pixels that were given in their place."""
        if not self.given_frames:
            return frames
        start = torch.where(self.known(case), self.given(world, case), frames[:, : self.given_frames])
        return torch.cat((start, frames[:, self.given_frames :]), dim=1)

    def kept(self, world: EmojiWorld, case: Case, frames: Tensor) -> Tensor:
        """True for each case in which every given pixel came back unchanged: (N,) bool."""
        same = frames[:, : self.given_frames].to(world.device) == self.given(world, case)
        return (same | ~self.known(case)).flatten(1).all(dim=1)

    def groups(self, world: EmojiWorld, case: Case) -> dict[str, dict[str, Tensor]]:
        """Tables of parts of the cases: by title and row, (N,) bool."""
        return {}

    def samples(self, world: EmojiWorld, case: Case, frames: Tensor, verdict: Verdict) -> list[Sample]:
        """The cases to look at."""
        captions, right = world.captions(case.asked), verdict.flags["all"].tolist()
        told = zip(captions, verdict.seen, right, frames.cpu().numpy(), strict=True)
        return [Sample(*sample, given=self.given_frames) for sample in told]


class Continue(Part):
    """Real frames are carried on."""

    given_frames = NUM_GIVEN
    sheet_frames = 9

    def __init__(self, num_frames: int = SPAN) -> None:
        self.num_frames = num_frames
        self.title = f"{NUM_GIVEN} real frames carried on to {num_frames}"
        last = (max(NUM_GIVEN, num_frames - SPAN), num_frames)
        self.slices = {"background": last, "object": last}
        if num_frames <= SPAN:
            # Bouncing is not always told in fewer than 12 frames; given frames that then freeze are told from all.
            self.slices |= {"motion": (4, SPAN), "motion_new": (NUM_GIVEN - 1, SPAN)}
        else:
            self.judged = ("background", "object")

    def ask(self, world: EmojiWorld, count: int, generator: torch.Generator, split: Split) -> Case:
        asked = world.sample(count, generator, num_frames=self.num_frames, split=split)
        return Case(replace(asked, num_frames=NUM_GIVEN), asked, torch.full((count,), -1))

    def real(self, world: EmojiWorld, case: Case) -> Tensor:
        return to_uint8(world.render(case.asked))

    def prompts(self, world: EmojiWorld, case: Case) -> list[str]:
        return world.captions(case.asked)

    def judge(self, judge: Judge, case: Case, frames: Tensor) -> Verdict:
        return judge_clips(judge, case.asked, case.asked, frames, self.slices)

    def groups(self, world: EmojiWorld, case: Case) -> dict[str, dict[str, Tensor]]:
        return {"by motion": by_motion(case.asked)}


class Steer(Part):
    """The sentence changes: the same object on the same background does something else.

    With `room`, the change is one that there is room for: an object that did the new motion from the last given frame
    on as the world does it, at the speed asked for, would stay within the picture and the world's sizes as long as the
    judge looks.
    """

    num_frames = NUM_STEERED
    sheet_frames = 9

    def __init__(self, room: bool = True, given: bool = True) -> None:
        self.room = room
        self.given_frames = NUM_GIVEN if given else 0
        start = f"{NUM_GIVEN} real frames" if given else "a sentence from the start"
        where = "that there is room for" if room else "wherever the object is"
        self.title = f"{start}, then a change of motion {where}"
        self.slices = dict.fromkeys(("background", "motion", "object"), (SETTLE, LAST_STEERED))
        self.slices["motion_17"] = (SETTLE, NUM_STEERED)
        if room:
            self.slices["motion_at_once"] = (NUM_GIVEN, NUM_GIVEN + SPAN)

    def ask(self, world: EmojiWorld, count: int, generator: torch.Generator, split: Split) -> Case:
        asked = world.sample(count, generator, num_frames=NUM_STEERED, split=split)
        given = self._beginnings(world, asked, generator)
        while self.room and not (fits := has_room(given, asked, LAST_STEERED)).all():
            rows = (~fits).nonzero().flatten()
            retried = asked.select(rows.repeat(TRIES))
            retried = replace(retried, speed=_speeds(retried.motion, generator))
            starts = self._beginnings(world, retried, generator)
            good = has_room(starts, retried, LAST_STEERED).view(TRIES, len(rows))
            pick = good.float().argmax(dim=0) * len(rows) + torch.arange(len(rows))  # the first with room, if any
            given, asked = given.put(rows, starts.select(pick)), asked.put(rows, retried.select(pick))
        return Case(given, asked, torch.full((count,), -1))

    def _beginnings(self, world: EmojiWorld, asked: ClipSpec, generator: torch.Generator) -> ClipSpec:
        """Clips of the same objects on the same backgrounds that do something else."""
        first = world.sample(len(asked), generator, num_frames=NUM_GIVEN)
        other = (asked.motion + torch.randint(1, len(MOTIONS), asked.motion.shape, generator=generator)) % len(MOTIONS)
        return replace(
            first,
            object=asked.object,
            background=asked.background,
            motion=other,
            speed=_speeds(other, generator),
        )

    def real(self, world: EmojiWorld, case: Case) -> Tensor:
        if self.room:
            return render_path(world, case.asked, steered_path(case.given, case.asked))
        plain = world.render(replace(case.asked, num_frames=SPAN))  # there is no clip that changes without room
        return to_uint8(torch.cat((plain[:, :, :1].expand(-1, -1, SETTLE, -1, -1), plain), dim=2))

    def prompts(self, world: EmojiWorld, case: Case) -> list[list[tuple[float, str]]]:
        first, second = world.captions(case.given), world.captions(case.asked)
        return [[(0.0, a), (NUM_GIVEN / FPS, b)] for a, b in zip(first, second, strict=True)]

    def judge(self, judge: Judge, case: Case, frames: Tensor) -> Verdict:
        # An object that spun may be at any angle, as one that spins.
        turned = replace(case.asked, motion=torch.where(spins(case.given), SPINS[0], case.asked.motion))
        return judge_clips(judge, case.asked, turned, frames, self.slices)

    def groups(self, world: EmojiWorld, case: Case) -> dict[str, dict[str, Tensor]]:
        tables = {"by motion": by_motion(case.asked), "by first motion": by_motion(case.given)}
        tables["by speed"] = {name or "plain": case.asked.speed == index for index, name in enumerate(SPEEDS)}
        if self.given_frames and not self.room:
            fits = has_room(case.given, case.asked, LAST_STEERED)
            tables["by room"] = {"there is room": fits, "there is none": ~fits}
        return tables

    def samples(self, world: EmojiWorld, case: Case, frames: Tensor, verdict: Verdict) -> list[Sample]:
        first = world.captions(case.given)
        samples = super().samples(world, case, frames, verdict)
        return [replace(s, caption=f"{a}; then {s.caption}") for a, s in zip(first, samples, strict=True)]


class Inpaint(Part):
    """A hole over the object of a real picture, to be filled with another object."""

    title = "a hole over the object of a real picture, filled with another one"
    num_frames = given_frames = 1

    def __init__(self) -> None:
        self.judged = ("background", "object")
        self.slices = dict.fromkeys(self.judged, (0, 1))
        self.holes = torch.zeros(1, CANVAS, CANVAS, dtype=torch.bool)
        self.holes[:, HOLE[0] : HOLE[1], HOLE[0] : HOLE[1]] = True

    def ask(self, world: EmojiWorld, count: int, generator: torch.Generator, split: Split) -> Case:
        asked = _within_hole(world.sample(count, generator, split=split, images=True))
        given = _within_hole(world.sample(count, generator, split=split, images=True))
        other = _others(len(world), [asked.object], generator)
        given = replace(given, object=other, background=asked.background)
        return Case(given, asked, torch.zeros(count, dtype=torch.long))

    def real(self, world: EmojiWorld, case: Case) -> Tensor:
        return to_uint8(world.render(case.asked))

    def prompts(self, world: EmojiWorld, case: Case) -> list[str]:
        return world.captions(case.asked)

    def judge(self, judge: Judge, case: Case, frames: Tensor) -> Verdict:
        seen = judge(frames, case.asked)
        thing, background = seen.rank == 0, seen.background == case.asked.background
        flags = {"background": background, "object": thing, "object_top5": seen.rank < 5, "all": background & thing}
        flags["old_object"] = seen.object == case.given.object
        return Verdict(flags, in_words(judge.world, seen, moves=False))

    def samples(self, world: EmojiWorld, case: Case, frames: Tensor, verdict: Verdict) -> list[Sample]:
        given = self.given(world, case)
        holed = torch.where(self.known(case), given, torch.tensor([200, 200, 200], dtype=torch.uint8).to(given.device))
        shown = torch.cat((given, holed, frames.to(given.device)), dim=1)
        samples = super().samples(world, case, shown, verdict)
        return [replace(sample, given=2) for sample in samples]


class InpaintEmpty(Inpaint):
    """A hole in a picture of a background alone: nothing tells where an object was."""

    title = "a hole in a picture of a background alone, filled with an object"

    def given(self, world: EmojiWorld, case: Case) -> Tensor:
        plain = to_uint8(world.colors[case.given.background][:, :, None, None, None] * 2 - 1)  # (N, 1, 1, 1, 3)
        return plain.expand(-1, -1, CANVAS, CANVAS, -1)

    def judge(self, judge: Judge, case: Case, frames: Tensor) -> Verdict:
        verdict = super().judge(judge, case, frames)
        del verdict.flags["old_object"]
        return verdict


class InpaintPair(Inpaint):
    """A hole in place of one of two objects, to be filled with a third object."""

    title = "one half of a real picture of two objects, filled with a third one"

    def __init__(self) -> None:
        self.judged = ("background", "object", "other_object", "relation")
        self.slices = dict.fromkeys(self.judged, (0, 1))
        self.holes = torch.zeros(4, CANVAS, CANVAS, dtype=torch.bool)  # left, right, upper, lower: 2 relation + side
        half = CANVAS // 2
        for hole, rows, columns in zip(
            self.holes,
            (slice(None), slice(None), slice(half), slice(half, None)),
            (slice(half), slice(half, None), slice(None), slice(None)),
            strict=True,
        ):
            hole[rows, columns] = True

    def ask(self, world: EmojiWorld, count: int, generator: torch.Generator, split: Split) -> Case:
        asked = world.sample(count, generator, split=split, images=True, pairs=1.0)
        side = torch.arange(count) % 2  # which of the two is replaced
        other = _others(len(world), [asked.object, asked.second], generator)
        given = replace(
            asked,
            object=torch.where(side == 0, other, asked.object),
            second=torch.where(side == 1, other, asked.second),
        )
        return Case(given, asked, 2 * asked.relation + side)

    def judge(self, judge: Judge, case: Case, frames: Tensor) -> Verdict:
        seen, asked = judge(frames, case.asked), case.asked
        first, second, side = seen.rank == 0, seen.second == asked.second, case.hole % 2
        flags = {
            "background": seen.background == asked.background,
            "object": torch.where(side == 0, first, second),
            "other_object": torch.where(side == 0, second, first),
            "relation": seen.relation == asked.relation,
        }
        flags["all"] = torch.stack(list(flags.values())).all(dim=0)
        names = [*judge.world.names, "nothing"]
        told = zip(seen.object.tolist(), seen.second.tolist(), seen.background.tolist(), strict=True)
        return Verdict(flags, [f"{names[a]} and {names[b]}, {COLORS[color]}" for a, b, color in told])


PartName = Literal[
    "continue", "continue-long", "steer", "steer-anywhere", "steer-alone", "inpaint", "inpaint-empty", "inpaint-pair"
]
PARTS: dict[PartName, Part] = {
    "continue": Continue(),
    "continue-long": Continue(LONG),
    "steer": Steer(),
    "steer-anywhere": Steer(room=False),
    "steer-alone": Steer(room=False, given=False),
    "inpaint": Inpaint(),
    "inpaint-empty": InpaintEmpty(),
    "inpaint-pair": InpaintPair(),
}


# Judging --------------------------------------------------------------------------------------------------------------


def judge_clips(judge: Judge, asked: ClipSpec, turned: ClipSpec, frames: Tensor, slices: Slices) -> Verdict:
    """Background, motion and object of clips, each in its frames; `turned` tells the judge what to look for."""
    seen: dict[tuple[int, int], Judgement] = {}
    for first, last in slices.values():
        if (first, last) not in seen:
            seen[first, last] = judge(frames[:, first:last], replace(turned, num_frames=last - first))
    thing = seen[slices["object"]]
    flags = {"background": seen[slices["background"]].background == asked.background}
    if "motion" in slices:
        thing = replace(thing, motion=seen[slices["motion"]].motion)
        flags["motion"] = thing.motion == asked.motion
    for name in slices:
        if name.startswith("motion_"):  # the same, seen in other frames
            flags[name] = seen[slices[name]].motion == asked.motion
    flags["object"] = thing.rank == 0
    flags["all"] = flags["background"] & flags["object"] & flags.get("motion", flags["object"])
    return Verdict(flags, in_words(judge.world, thing, "motion" in slices))


def by_motion(spec: ClipSpec) -> dict[str, Tensor]:
    return {name: spec.motion == index for index, name in enumerate(MOTIONS)}


# Draws ----------------------------------------------------------------------------------------------------------------


def _speeds(motion: Tensor, generator: torch.Generator) -> Tensor:
    """Draws speeds as the world does: a quarter slow, half normal, a quarter quick."""
    fast = torch.rand(motion.shape, generator=generator)
    return torch.where(motion == STILL, PLAIN, 1 + (fast >= 0.75).long() - (fast < 0.25).long())


def _others(count: int, taken: list[Tensor], generator: torch.Generator) -> Tensor:
    """Numbers below `count` that are none of those in `taken`, each (N,)."""
    weights = torch.ones(len(taken[0]), count)
    for numbers in taken:
        weights.scatter_(1, numbers[:, None], 0)
    return torch.multinomial(weights, 1, generator=generator)[:, 0]


def _within_hole(spec: ClipSpec) -> ClipSpec:
    """Still objects moved to where the hole hides them whole."""
    low, high = HOLE
    size = spec.size[:, None]
    return replace(spec, place=(low + spec.place * (high - low - size)) / (CANVAS - size))
