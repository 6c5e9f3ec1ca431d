"""The benchmark beyond one clip. Does a model continue given frames, follow a change, fill in holes?

The parts are in `parts.py`. For each the judge is judged first, on answers made of real renders and in the same frames;
then on the autoencoder's reconstructions of them, with what is given in its place; then the model is asked.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from nova_video.common.errors import InputError
from nova_video.evaluation.benchmark import Progress
from nova_worlds.evaluation.editing_parts import PARTS, Case, Part, PartName, Slices
from nova_worlds.evaluation.world_benchmark import (
    GENERATED,
    JUDGE_CLIPS,
    REAL,
    RECONSTRUCTED,
    SHEET_CLIPS,
    EvaluatedPipeline,
    LongSettings,
    Origin,
    Sample,
    SampleSheet,
    SamplingSettings,
    check_judge,
    reconstruct,
)
from nova_worlds.judging.judge import Judge
from nova_worlds.judging.rates import Rate
from nova_worlds.rendering.world import EmojiWorld, Split, to_uint8

KEPT_SCORE = "given_kept"  # the score of pixels that were given and must come back as they were

Maker = Callable[[Case, int], Tensor]
"""Makes the frames (N, F, H, W, 3) uint8 of a batch; the number is that of its first case."""


@dataclass(frozen=True)
class EditingSettings(SamplingSettings):
    """How to evaluate."""

    parts: tuple[PartName, ...] = tuple(PARTS)
    num_clips: int = 400
    """Number of clips in each part."""
    split: Split = "heldout"
    """Combinations never trained on, or those trained on."""
    long: LongSettings = field(default_factory=LongSettings)

    def __post_init__(self) -> None:
        self.check({"num_clips": 1})
        if not self.parts or not set(self.parts) <= set(PARTS):
            raise InputError(f"parts is {self.parts}: expected some of {', '.join(PARTS)}")


@dataclass(frozen=True)
class PartReport:
    """The result of one part."""

    title: str
    slices: Slices
    """The frames each score is judged on: from the first to before the last."""
    rates: dict[str, dict[str, Rate]]
    """By source (REAL, RECONSTRUCTED where there is an autoencoder, GENERATED) and score."""
    groups: dict[str, dict[str, dict[str, Rate]]]
    """Rates of the generated clips, by table, row and score."""
    seconds: float
    """Time of generating alone."""
    sheet: SampleSheet = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """Everything but the sheet."""
        return {
            "what": self.title,
            "judged_frames": {name: [first, last - 1] for name, (first, last) in self.slices.items()},
            "seconds": round(self.seconds, 2),
            "scores": {
                source: {name: rate.as_json() for name, rate in rates.items()} for source, rates in self.rates.items()
            },
            **{
                table.replace(" ", "_"): {
                    row: {name: rate.as_json() for name, rate in rates.items()} for row, rates in rows.items()
                }
                for table, rows in self.groups.items()
            },
        }


@dataclass(frozen=True)
class EditingReport:
    """All that an evaluation found."""

    settings: EditingSettings
    origin: Origin
    parts: dict[PartName, PartReport]

    def sheets(self) -> dict[str, SampleSheet]:
        return {name: part.sheet for name, part in self.parts.items()}

    def as_json(self) -> dict[str, Any]:
        return {
            "benchmark": "editing",
            **asdict(self.origin),
            "settings": asdict(self.settings),
            "parts": {name: part.as_json() for name, part in self.parts.items()},
        }


def evaluate_editing(
    pipe: EvaluatedPipeline,
    world: EmojiWorld,
    settings: EditingSettings = EditingSettings(),
    *,
    model: str = "",
    command: str = "",
    on_progress: Progress | None = None,
) -> EditingReport:
    """Judge the judge, then the model, in every part. `model` and `command` are only recorded."""
    judge = Judge(world)
    reports = {name: evaluate_part(name, pipe, world, judge, settings, on_progress) for name in settings.parts}
    return EditingReport(settings, Origin.of(world, model, command), reports)


def evaluate_part(
    name: PartName,
    pipe: EvaluatedPipeline,
    world: EmojiWorld,
    judge: Judge,
    settings: EditingSettings,
    on_progress: Progress | None = None,
) -> PartReport:
    """One part, from real renders to what the model makes."""
    part = PARTS[name]
    case = asked_cases(part, world, settings)
    samples: list[Sample] = []
    seconds = 0.0

    def judged(source: str, make: Maker, count: int) -> dict[str, Tensor]:
        """Every score's flags (count,)."""
        flags: list[dict[str, Tensor]] = []
        for at in range(0, count, settings.batch_size):
            batch = case.select(slice(at, min(at + settings.batch_size, count)))
            frames = make(batch, at)
            verdict = part.judge(judge, batch, frames)
            kept = {KEPT_SCORE: part.kept(world, batch, frames)} if part.given_frames else {}
            flags.append(verdict.flags | kept)
            if source == GENERATED and (wanted := SHEET_CLIPS - len(samples)) > 0:
                samples.extend(part.samples(world, batch, frames, verdict)[:wanted])
            if on_progress is not None:
                on_progress(f"{name}: {source}", at + len(batch), count)
        return {score: torch.cat([batch[score] for batch in flags]) for score in flags[0]}

    def reconstructed(batch: Case, _: int) -> Tensor:
        clips = part.real(world, batch).permute(0, 4, 1, 2, 3).float() / 127.5 - 1  # (N, 3, F, H, W)
        return part.put_given(world, batch, to_uint8(reconstruct(pipe.vae, clips)))

    def generated(batch: Case, first: int) -> Tensor:
        nonlocal seconds
        start = time.perf_counter()
        frames = part.generate(pipe, world, batch, settings, settings.long, first)
        seconds += time.perf_counter() - start
        return frames

    def answers(batch: Case, _: int) -> Tensor:
        return part.put_given(world, batch, part.real(world, batch))

    flags = {REAL: judged(REAL, answers, len(case))}
    check_judge(rates_of(flags[REAL]), part.judged, f"real renders for '{name}'")
    if pipe.vae is not None:
        flags[RECONSTRUCTED] = judged(RECONSTRUCTED, reconstructed, settings.num_clips)
    flags[GENERATED] = judged(GENERATED, generated, settings.num_clips)
    tables = part.groups(world, case.select(slice(settings.num_clips)))
    return PartReport(
        title=part.title,
        slices=part.slices,
        rates={source: rates_of(by_score) for source, by_score in flags.items()},
        groups={
            table: {row: rates_of(flags[GENERATED], chosen) for row, chosen in rows.items()}
            for table, rows in tables.items()
        },
        seconds=seconds,
        sheet=SampleSheet(samples, part.sheet_frames),
    )


def asked_cases(part: Part, world: EmojiWorld, settings: EditingSettings) -> Case:
    """Draws the cases on the CPU, so that they are equal on every device.

    There are enough of them to judge the judge.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    return part.ask(world.to("cpu"), max(settings.num_clips, JUDGE_CLIPS), generator, settings.split).to(world.device)


def rates_of(flags: dict[str, Tensor], rows: Tensor | None = None) -> dict[str, Rate]:
    """How often each score was right, of all cases or of `rows` (N,) bool."""
    return {name: Rate.of(right if rows is None else right[rows]) for name, right in flags.items()}
