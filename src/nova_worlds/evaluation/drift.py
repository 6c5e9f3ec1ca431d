"""Drift: how long clips change in time, with each of the remedies and without.

Clips much longer than any that was trained on are generated from sentences of the emoji world, and measured second by
second: how sharp the object is, what colour it and the background have, whether it is still the object asked for, how
much moves. The same measures of real renders, and of the autoencoder's reconstructions of them, are what to compare to.

Legend: N clips, F frames, W windows of a second.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nova_video.evaluation.benchmark import Progress
from nova_video.io.motion import flow_magnitudes
from nova_worlds.evaluation.paths import render_path
from nova_worlds.evaluation.world_benchmark import (
    JUDGE_CLIPS,
    REAL,
    RECONSTRUCTED,
    EvaluatedPipeline,
    LongSettings,
    Origin,
    Sample,
    SampleSheet,
    SamplingSettings,
    check_judge,
    fill,
    in_words,
    reconstruct,
)
from nova_worlds.judging.judge import MIN_AREA, Judge, track_object
from nova_worlds.judging.rates import Rate
from nova_worlds.rendering.clips import FPS, SPAN, ClipSpec, ObjectPath, object_path
from nova_worlds.rendering.world import EmojiWorld, Split, to_uint8

WINDOW = FPS  # frames that are averaged: a second
ENDS = 2  # windows at the start and at the end that are compared
IDENTITY_FRAMES = slice(2, None, 4)  # frames that the object is recognised in, one by one
FLOW_EVERY = 3  # pairs of frames: one in so many is measured
MEASURED_FRAMES, CPU_FRAMES = 4352, 272  # at a time, on a GPU and on a CPU
SHEET_CLIPS = 4  # of every source
SHEET_FRAMES = 11

PLAIN, ALL_FRAMES, TOGETHER = "no remedy", "all frames read", "all remedies"

MEASURES: dict[str, str] = {
    "sharpness": "mean Laplacian of the object, levels of 255",
    "colour": "distance of the background from what was asked for, levels of 255",
    "saturation": "of the object, levels of 255",
    "size": "of the object, side of a square of its area, pixels",
    "identity": "cosine with the picture of the object asked for",
    "recognised": "share of frames in which that object matches best",
    "motion": "mean optical flow, pixels a frame",
}


@dataclass(frozen=True)
class DriftSettings(SamplingSettings):
    """How to measure."""

    num_clips: int = 64
    num_frames: int = 257
    split: Split = "heldout"
    """Combinations never trained on, or those trained on."""
    context_frames: int = 33
    """Longest clip that the model is shown, where it is not shown all."""
    sink_frames: int | None = None
    """None: the model's own."""
    history_noise: float = 0.1
    """This and the next two: what is tried, each by itself and then all together."""
    reanchor_frames: int = 32
    hold_statistics: float = 0.5

    def __post_init__(self) -> None:
        self.check({"num_clips": 1, "num_frames": 2 * ENDS * WINDOW, "context_frames": 1, "reanchor_frames": 1})

    def variants(self) -> dict[str, LongSettings]:
        """The settings to compare, by name."""
        plain = LongSettings(context_frames=self.context_frames, sink_frames=self.sink_frames, reanchor_frames=0)
        return {
            PLAIN: plain,
            ALL_FRAMES: replace(plain, context_frames=self.num_frames),
            "history noise": replace(plain, history_noise=self.history_noise),
            "re-anchoring": replace(plain, reanchor_frames=self.reanchor_frames),
            "statistics held": replace(plain, hold_statistics=self.hold_statistics),
            TOGETHER: replace(
                plain,
                history_noise=self.history_noise,
                reanchor_frames=self.reanchor_frames,
                hold_statistics=self.hold_statistics,
            ),
        }


@dataclass(frozen=True)
class Curve:
    """One measure of one source in time."""

    mean: list[float]
    """(W,) over the clips."""
    deviation: list[float]
    """(W,) of the clips."""
    start: float
    """Mean of the first ENDS windows."""
    end: float
    """Mean of the last ENDS windows."""
    error: float
    """Standard error of the change from start to end."""

    @classmethod
    def of(cls, values: Tensor) -> "Curve":
        """From (N, W) values."""
        values = values.double()
        start, end = values[:, :ENDS].mean(dim=1), values[:, -ENDS:].mean(dim=1)
        error = (end - start).std(correction=0) / len(values) ** 0.5
        return cls(
            mean=values.mean(dim=0).tolist(),
            deviation=values.std(dim=0, correction=0).tolist(),
            start=start.mean().item(),
            end=end.mean().item(),
            error=error.item(),
        )

    def as_json(self) -> dict[str, Any]:
        rounded = {name: [round(v, 4) for v in getattr(self, name)] for name in ("mean", "deviation")}
        return {name: round(getattr(self, name), 4) for name in ("start", "end", "error")} | rounded


@dataclass(frozen=True)
class SourceDrift:
    """How the clips of one source change."""

    long: LongSettings | None
    """The settings that a model made them with; None if no model did."""
    curves: dict[str, Curve]
    """By measure."""
    ends: dict[str, Rate]
    """Object and background on the last SPAN frames, as the judge sees them."""
    seconds: float
    """Time of making them."""

    def as_json(self) -> dict[str, Any]:
        return {
            "made_with": None if self.long is None else asdict(self.long),
            "seconds": round(self.seconds, 2),
            "last_frames": {name: rate.as_json() for name, rate in self.ends.items()},
            **{name: curve.as_json() for name, curve in self.curves.items()},
        }


@dataclass(frozen=True)
class DriftReport:
    """All that was measured."""

    settings: DriftSettings
    origin: Origin
    sources: dict[str, SourceDrift]
    """Real renders, reconstructions where there is an autoencoder, then every variant."""
    samples: dict[str, list[Sample]] = field(repr=False)
    """The first clips of every source."""

    def sheets(self) -> dict[str, SampleSheet]:
        """Each clip as every source shows it."""
        clips = zip(*self.samples.values(), strict=True)
        return {"sheet": SampleSheet([sample for clip in clips for sample in clip], SHEET_FRAMES)}

    def as_json(self) -> dict[str, Any]:
        """Everything but the samples."""
        windows = self.settings.num_frames // WINDOW
        return {
            "benchmark": "drift",
            **asdict(self.origin),
            "settings": asdict(self.settings),
            "measures": MEASURES,
            "time": [round((window + 0.5) * WINDOW / FPS, 3) for window in range(windows)],
            "sources": {name: source.as_json() for name, source in self.sources.items()},
        }


Maker = Callable[[ClipSpec, int], Tensor]
"""Makes the frames (N, F, H, W, 3) uint8 of a batch; the number is that of its first clip."""


def evaluate_drift(
    pipe: EvaluatedPipeline,
    world: EmojiWorld,
    settings: DriftSettings = DriftSettings(),
    *,
    model: str = "",
    command: str = "",
    on_progress: Progress | None = None,
) -> DriftReport:
    """Measure real clips, then what the model makes with every variant. `model` and `command` are only recorded."""
    flow_magnitudes(np.zeros((2, 16, 16, 3), np.uint8))  # raises now without OpenCV
    judge = Judge(world)
    generator = torch.Generator().manual_seed(settings.seed)
    asked = world.to("cpu").sample(
        max(settings.num_clips, JUDGE_CLIPS), generator, num_frames=settings.num_frames, split=settings.split
    )
    asked = asked.to(world.device)
    check_judge(at_the_end(judge, asked, last_frames(world, asked)), ("object", "background"), "real renders' ends")
    asked = asked.select(slice(settings.num_clips))
    samples: dict[str, list[Sample]] = {}

    def followed(name: str, make: Maker, long: LongSettings | None = None) -> SourceDrift:
        values: list[dict[str, Tensor]] = []
        ends: list[Tensor] = []
        seconds = 0.0
        for at in range(0, len(asked), settings.batch_size):
            batch = asked.select(slice(at, at + settings.batch_size))
            start = time.perf_counter()
            frames = make(batch, at)
            seconds += time.perf_counter() - start
            values.append(measure(judge, frames, batch))
            ends.append(frames[:, -SPAN:])
            if at < SHEET_CLIPS:
                samples.setdefault(name, []).extend(
                    _samples(judge, name, batch.select(slice(SHEET_CLIPS - at)), frames)
                )
            if on_progress is not None:
                on_progress(name, at + len(batch), len(asked))
        curves = {measured: Curve.of(torch.cat([part[measured] for part in values])) for measured in MEASURES}
        return SourceDrift(long, curves, at_the_end(judge, asked, torch.cat(ends)), seconds)

    def real(batch: ClipSpec, _: int) -> Tensor:
        return to_uint8(world.render(batch))

    def reconstructed(batch: ClipSpec, _: int) -> Tensor:
        return to_uint8(reconstruct(pipe.vae, world.render(batch)))

    sources = {REAL: followed(REAL, real)}
    if pipe.vae is not None:
        sources[RECONSTRUCTED] = followed(RECONSTRUCTED, reconstructed)
    for name, long in settings.variants().items():

        def generated(batch: ClipSpec, first: int, long: LongSettings = long) -> Tensor:
            numbers = range(first, first + len(batch))
            return fill(pipe, world.captions(batch), settings, long, numbers, settings.num_frames)

        sources[name] = followed(name, generated, long)
    return DriftReport(settings, Origin.of(world, model, command), sources, samples)


# Measures -------------------------------------------------------------------------------------------------------------


def measure(judge: Judge, frames: Tensor, asked: ClipSpec) -> dict[str, Tensor]:
    """Every measure of frames (N, F, H, W, 3) uint8, averaged over windows: each (N, W)."""
    device, count = judge.world.device, frames.shape[1]
    size = max(1, (CPU_FRAMES if device.type == "cpu" else MEASURED_FRAMES) // count)
    parts = []
    for at in range(0, len(frames), size):
        rows = slice(at, at + size)
        parts.append(_looks(judge, frames[rows].to(device), asked.select(rows)))
    values = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    with ThreadPoolExecutor() as pool:  # OpenCV lets go of the interpreter
        flows = pool.map(lambda clip: flow_magnitudes(clip, FLOW_EVERY), frames.cpu().numpy())
    values["motion"] = torch.tensor(list(flows))
    at_frames = torch.arange(count)
    identified = at_frames[IDENTITY_FRAMES]
    seen_at = {"identity": identified, "recognised": identified, "motion": at_frames[:-1:FLOW_EVERY]}
    return {name: windows(values[name], seen_at.get(name, at_frames), count // WINDOW) for name in MEASURES}


def _looks(judge: Judge, frames: Tensor, asked: ClipSpec) -> dict[str, Tensor]:
    """Measurements of single frames, each (N, number of frames)."""
    track = track_object(frames)
    area = track.area.clamp(min=MIN_AREA)  # (N, F)
    colors = frames.permute(0, 1, 4, 2, 3).float()  # (N, F, 3, H, W)
    gray = colors.mean(dim=2)
    edges = gray.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    padded = F.pad(gray.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
    laplacian = F.conv2d(padded, edges)[:, 0].unflatten(0, gray.shape[:2]).abs()  # (N, F, H, W)
    vividness = colors.amax(dim=2) - colors.amin(dim=2)
    off = track.background - judge.world.colors[asked.background][:, None]  # (N, F, 3)
    identity, recognised = judge.identify(frames[:, IDENTITY_FRAMES], asked)
    return {
        "sharpness": (laplacian * track.mass).sum(dim=(2, 3)) / area,
        "colour": 255 * off.square().mean(dim=2).sqrt(),
        "saturation": (vividness * track.mass).sum(dim=(2, 3)) / area,
        "size": track.area.sqrt(),
        "identity": identity,
        "recognised": recognised.float(),
    }


def windows(values: Tensor, frames: Tensor, count: int) -> Tensor:
    """(N, M) values seen at `frames` (M,) -> (N, W), averaged over each of the first `count` windows."""
    window = frames // WINDOW
    return torch.stack([values[:, window == index].double().mean(dim=1) for index in range(count)], dim=1)


def at_the_end(judge: Judge, asked: ClipSpec, last: Tensor) -> dict[str, Rate]:
    """The judge's rates for the last SPAN frames (N, SPAN, H, W, 3)."""
    seen = judge(last, replace(asked, num_frames=last.shape[1]))
    return {"object": Rate.of(seen.rank == 0), "background": Rate.of(seen.background == asked.background)}


def last_frames(world: EmojiWorld, asked: ClipSpec) -> Tensor:
    """Real renders of the last SPAN frames alone, (N, SPAN, H, W, 3) uint8."""
    path, last = object_path(asked), slice(-SPAN, None)
    return render_path(world, asked, ObjectPath(path.centre[:, last], path.size[:, last], path.angle[:, last]))


def _samples(judge: Judge, name: str, asked: ClipSpec, frames: Tensor) -> list[Sample]:
    """Clips with what was asked and what is seen at their end."""
    frames = frames[: len(asked)]
    seen = judge(frames[:, -SPAN:], replace(asked, num_frames=SPAN))
    right = (seen.rank == 0) & (seen.background == asked.background)
    captions = [f"{name}: {caption}" for caption in judge.world.captions(asked)]
    said = [f"{words} at the end" for words in in_words(judge.world, seen, moves=False)]
    return [Sample(*s) for s in zip(captions, said, right.tolist(), frames.cpu().numpy(), strict=True)]
