"""The benchmark of the emoji world: does a model show exactly what captions ask, for combinations it never saw?

First the judge is judged, on real renders and on the autoencoder's reconstructions of them; one that reads less than
97% of any of it right on the former is no judge. Then clips are generated from held-out combinations, told in the main
form, and pictures of two objects from held-out (object, relation, object).
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from nova_video.evaluation.benchmark import Progress
from nova_worlds.evaluation.world_benchmark import (
    GENERATED,
    JUDGE_CLIPS,
    REAL,
    RECONSTRUCTED,
    SHEET_CLIPS,
    EvaluatedPipeline,
    Origin,
    Sample,
    SampleSheet,
    SamplingSettings,
    as_frames,
    check_judge,
    describe,
    reconstruct,
)
from nova_worlds.judging.judge import Judge, Judgement
from nova_worlds.judging.rates import Rate
from nova_worlds.rendering.clips import SPAN, ClipSpec
from nova_worlds.rendering.lexicon import MOTIONS
from nova_worlds.rendering.world import EmojiWorld, Split, to_uint8

JUDGE_SCORES = ("background", "motion", "object", "relation")  # the scores that a judge must master on real renders

Maker = Callable[[ClipSpec, int], Tensor]
"""Makes the frames (N, F, H, W, 3) uint8 of a batch; the number is that of its first clip in the evaluation."""


@dataclass(frozen=True)
class EmojiSettings(SamplingSettings):
    """How to evaluate."""

    num_clips: int = 400
    num_pairs: int = 100
    """Pictures of two objects; 0 leaves them out."""
    num_frames: int = SPAN
    """Frames of a clip; 1 evaluates a model of images."""
    split: Split = "heldout"
    """Combinations never trained on, or those trained on."""

    def __post_init__(self) -> None:
        self.check({"num_clips": 1, "num_pairs": 0, "num_frames": 1})


@dataclass(frozen=True)
class SourceScores:
    """How often the clips of one source show what was asked."""

    rates: dict[str, Rate]
    """background, motion, object, object in top 5, all three; relation and both objects for pictures of two."""
    by_motion: dict[str, dict[str, Rate]]
    """For each motion asked for: motion and object."""


@dataclass(frozen=True)
class EmojiReport:
    """All that an evaluation found."""

    settings: EmojiSettings
    origin: Origin
    seconds: float
    """Time of generating alone."""
    sources: dict[str, SourceScores]
    """By REAL, RECONSTRUCTED (where there is an autoencoder) and GENERATED."""
    samples: list[Sample] = field(repr=False)

    def sheets(self) -> dict[str, SampleSheet]:
        return {"sheet": SampleSheet(self.samples)}

    def as_json(self) -> dict[str, Any]:
        """Everything but the samples."""
        return {
            "benchmark": "emoji",
            **asdict(self.origin),
            "settings": asdict(self.settings),
            "seconds": round(self.seconds, 2),
            "scores": {
                source: {
                    **{name: rate.as_json() for name, rate in scores.rates.items()},
                    "by_motion": {
                        motion: {name: rate.as_json() for name, rate in rates.items()}
                        for motion, rates in scores.by_motion.items()
                    },
                }
                for source, scores in self.sources.items()
            },
        }


def evaluate_emoji(
    pipe: EvaluatedPipeline,
    world: EmojiWorld,
    settings: EmojiSettings = EmojiSettings(),
    *,
    model: str = "",
    command: str = "",
    on_progress: Progress | None = None,
) -> EmojiReport:
    """Judge the judge, then the model. `model` and `command` are only recorded."""
    judge = Judge(world)
    clips, pairs = asked_specs(world, settings)

    def judged(source: str, make: Maker, count: int, pair_count: int) -> SourceScores:
        asked, asked_pairs = clips.select(slice(count)), pairs.select(slice(pair_count))
        total, done, parts = count + pair_count, 0, []
        for spec in (asked, asked_pairs):
            for at in range(0, len(spec), settings.batch_size):
                batch = spec.select(slice(at, at + settings.batch_size))
                parts.append(judge(make(batch, done), batch))
                done += len(batch)
                if on_progress is not None:
                    on_progress(source, done, total)
        seen = Judgement.join(parts)
        return score(asked, seen.select(slice(count)), asked_pairs, seen.select(slice(count, total)))

    def real(batch: ClipSpec, _: int) -> Tensor:
        return to_uint8(world.render(batch))

    def reconstructed(batch: ClipSpec, _: int) -> Tensor:
        return to_uint8(reconstruct(pipe.vae, world.render(batch)))

    samples: list[Sample] = []
    seconds = 0.0

    def generated(batch: ClipSpec, first: int) -> Tensor:
        nonlocal seconds
        start = time.perf_counter()
        frames = generate(pipe, world, batch, settings, first)
        seconds += time.perf_counter() - start
        wanted = min(len(batch), SHEET_CLIPS - len(samples))
        if wanted > 0 and not batch.has_pairs:
            shown = batch.select(slice(wanted))
            samples.extend(describe(world, frames[:wanted], shown, judge(frames[:wanted], shown)))
        return frames

    sources = {REAL: judged(REAL, real, len(clips), len(pairs))}
    check_judge(sources[REAL].rates, JUDGE_SCORES)
    asked_counts = (settings.num_clips, settings.num_pairs)
    if pipe.vae is not None:
        sources[RECONSTRUCTED] = judged(RECONSTRUCTED, reconstructed, *asked_counts)
    sources[GENERATED] = judged(GENERATED, generated, *asked_counts)
    return EmojiReport(
        settings=settings,
        origin=Origin.of(world, model, command),
        seconds=seconds,
        sources=sources,
        samples=samples,
    )


def asked_specs(world: EmojiWorld, settings: EmojiSettings) -> tuple[ClipSpec, ClipSpec]:
    """Draws clips, and pictures of two objects, enough of both to judge the judge.

    Drawn on the CPU, so that every device is asked the same.
    """
    home = world.to("cpu")
    generator = torch.Generator().manual_seed(settings.seed)
    count = max(settings.num_clips, JUDGE_CLIPS)
    pair_count = max(settings.num_pairs, JUDGE_CLIPS) if settings.num_pairs else 0
    images = settings.num_frames == 1
    clips = home.sample(count, generator, num_frames=settings.num_frames, split=settings.split, images=images)
    pairs = home.sample(pair_count, generator, split=settings.split, images=True, pairs=1.0)
    return clips.to(world.device), pairs.to(world.device)


def generate(pipe: EvaluatedPipeline, world: EmojiWorld, spec: ClipSpec, settings: EmojiSettings, first: int) -> Tensor:
    """Frames (N, F, H, W, 3) uint8 that the model makes from the captions of `spec`."""
    made = pipe(
        world.captions(spec),
        num_frames=spec.num_frames,
        **settings.call_options(),
        generator=settings.generators(range(first, first + len(spec))),
        output_type="np",
    )
    return as_frames(made, len(spec), spec.num_frames)


def score(asked: ClipSpec, seen: Judgement, asked_pairs: ClipSpec, seen_pairs: Judgement) -> SourceScores:
    """Compare what was asked with what was seen."""
    flags = clip_flags(asked, seen)
    by_motion = {}
    for index, name in enumerate(MOTIONS if asked.num_frames > 1 else ()):
        rows = asked.motion == index
        by_motion[name] = {"motion": Rate.of(flags["motion"][rows]), "object": Rate.of(flags["object"][rows])}
    if len(asked_pairs):
        flags |= pair_flags(asked_pairs, seen_pairs)
    return SourceScores({name: Rate.of(right) for name, right in flags.items()}, by_motion)


def clip_flags(asked: ClipSpec, seen: Judgement) -> dict[str, Tensor]:
    """Correctness of each clip by score, (N,) bool."""
    background, motion, thing = seen.background == asked.background, seen.motion == asked.motion, seen.rank == 0
    moves = {"motion": motion} if asked.num_frames > 1 else {}
    objects = {"object": thing, "object_top5": seen.rank < 5}
    return {"background": background, **moves, **objects, "all": background & motion & thing}


def pair_flags(asked: ClipSpec, seen: Judgement) -> dict[str, Tensor]:
    """Correctness of each picture of two objects by score, (N,) bool."""
    both = (seen.rank == 0) & (seen.second == asked.second)
    return {"relation": seen.relation == asked.relation, "both_objects": both}
