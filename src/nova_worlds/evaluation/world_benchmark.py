"""The common part of the benchmarks: sampling, clips in the form of the judge, the record of a run.

A benchmark judges the judge first, on real renders: one that reads less than 97% of anything right there is no judge.
"""

import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nova_video.common.errors import InputError
from nova_video.evaluation.benchmark import package_versions
from nova_worlds.judging.judge import Judgement
from nova_worlds.judging.rates import Rate
from nova_worlds.rendering.clips import CANVAS, ClipSpec
from nova_worlds.rendering.lexicon import COLORS, MOTIONS
from nova_worlds.rendering.world import EmojiWorld

JUDGE_AT_LEAST = 0.97
JUDGE_CLIPS = 200  # real renders that the judge is judged on, at least
SHEET_CLIPS = 24  # generated clips kept to look at
REAL, RECONSTRUCTED, GENERATED = "real renders", "autoencoder", "generated"
DECODED_FRAMES = 2176  # through the autoencoder at a time


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How a benchmark has its clips made."""

    seed: int = 0
    """Which combinations, and the models' random numbers: clip i has a generator of seed + i."""
    batch_size: int = 25
    sets: int | None = None
    """None in this and the next three: the model's own."""
    diffusion_steps: int | None = None
    guidance_scale: float | None = None
    motion_flow: float | None = None
    preset: str | None = None
    """This and the next setting are those of a pipeline's call."""
    compile: bool | None = None

    def check(self, least: dict[str, int]) -> None:
        """Each of the named settings is at least so much, the size of a batch 1."""
        for name, bound in {**least, "batch_size": 1}.items():
            if getattr(self, name) < bound:
                raise InputError(f"{name} is {getattr(self, name)}: expected a whole number of at least {bound}")

    def call_options(self) -> dict[str, Any]:
        """The arguments of a pipeline's call."""
        names = {part.name for part in fields(SamplingSettings)} - {"seed", "batch_size"}
        return {name: getattr(self, name) for name in names}

    def generators(self, numbers: Iterable[int]) -> list[torch.Generator]:
        """One generator for each clip number, from the seed and the number."""
        return [torch.Generator().manual_seed(self.seed + number) for number in numbers]


@dataclass(frozen=True)
class LongSettings:
    """Settings of a long clip. Their names are those of a pipeline's call, which explains them."""

    context_frames: int | None = None
    """None in this and the next two: the model's own."""
    sink_frames: int | None = None
    reanchor_frames: int | None = None
    history_noise: float = 0.0
    hold_statistics: float = 0.0


class EvaluatedPipeline(Protocol):
    """The evaluated pipeline: `NovaPipeline`, or a stand-in for it."""

    vae: Any

    def __call__(self, prompt: list[Any], **options: Any) -> Any: ...


@dataclass(frozen=True)
class Origin:
    """The origin of a report's numbers."""

    world: str
    model: str
    command: str
    device: str
    versions: dict[str, str]

    @classmethod
    def of(cls, world: EmojiWorld, model: str, command: str) -> "Origin":
        device = world.device
        gpu = device.type == "cuda"
        return cls(
            world=f"{world.info.set} ({len(world)} objects), version {world.info.version}",
            model=model,
            command=command,
            device=torch.cuda.get_device_name(device) if gpu else f"{device.type} ({platform.machine()})",
            versions=package_versions(),
        )


@dataclass(frozen=True)
class Sample:
    """A generated clip to look at."""

    caption: str
    seen: str
    right: bool
    frames: np.ndarray
    """(F, H, W, 3) uint8."""
    given: int = 0
    """So many frames, from the first on, were given to the model."""


@dataclass(frozen=True)
class SampleSheet:
    """Samples to look at together."""

    samples: list[Sample]
    frames: int = 6
    """Shown of each, evenly spread."""


class Report(Protocol):
    """The result of a benchmark."""

    def as_json(self) -> dict[str, Any]: ...

    def sheets(self) -> dict[str, SampleSheet]:
        """By name."""


def fill(
    pipe: EvaluatedPipeline,
    prompts: Sequence[Any],
    sampling: SamplingSettings,
    long: LongSettings,
    numbers: Sequence[int],
    num_frames: int,
    given: Tensor | None = None,
    hole: Tensor | None = None,
) -> Tensor:
    """Frames (N, F, H, W, 3) uint8 that a model makes of prompts or timelines of them.

    `numbers`: those of the clips in the evaluation, which seed them. `given` (N, G, H, W, 3) uint8 are the first frames
    of the clips, `hole` (H, W) bool is what is filled in of them.
    """
    made = pipe(
        list(prompts),
        video=None if given is None else given.cpu().numpy(),
        mask_image=None if hole is None else hole.cpu().numpy(),
        num_frames=num_frames,
        **sampling.call_options(),
        **asdict(long),
        generator=sampling.generators(numbers),
        output_type="np",
    )
    return as_frames(made, len(prompts), num_frames)


def as_frames(made: Any, count: int, num_frames: int) -> Tensor:
    """Frames of a pipeline with output_type "np" -> (N, F, CANVAS, CANVAS, 3) uint8."""
    frames = np.stack(made.images)[:, None] if num_frames == 1 else np.stack(made.frames)
    expected = (count, num_frames, CANVAS, CANVAS, 3)
    if frames.shape != expected:
        raise InputError(
            f"the model makes clips of shape {frames.shape}: expected {expected}, those of the emoji world"
        )
    return torch.from_numpy((frames * 255).round().astype(np.uint8))


@torch.no_grad()
def reconstruct(vae: Any, clips: Tensor) -> Tensor:
    """Clips (N, 3, F, H, W) through the autoencoder and back."""
    parts = []
    for part in clips.split(max(1, DECODED_FRAMES // clips.shape[2])):
        latents = vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mode()
        parts.append(vae.decode(latents).sample.to(clips.device).float()[:, :, : clips.shape[2]])
    return torch.cat(parts)


def check_judge(rates: dict[str, Rate], judged: Sequence[str], what: str = "real renders of this world") -> None:
    """A judge that misreads real renders is refused."""
    for name, rate in rates.items():
        if name in judged and rate.value < JUDGE_AT_LEAST:
            raise InputError(
                f"the judge reads only {100 * rate.value:.1f}% of {name} right on {rate.total} {what}: "
                f"expected at least {100 * JUDGE_AT_LEAST:.0f}%, so it cannot judge a model"
            )


def in_words(world: EmojiWorld, seen: Judgement, moves: bool) -> list[str]:
    """The judge's findings in words, for each clip: "whale, moving left, blue"."""
    said = []
    for thing, motion, color in zip(seen.object.tolist(), seen.motion.tolist(), seen.background.tolist(), strict=True):
        words = [world.names[thing] if thing >= 0 else "no object", COLORS[color]]
        if moves:
            words.insert(1, MOTIONS[motion] if motion >= 0 else "no such motion")
        said.append(", ".join(words))
    return said


def describe(world: EmojiWorld, frames: Tensor, asked: ClipSpec, seen: Judgement) -> list[Sample]:
    """Clips with what was asked and what was seen, in words."""
    right = (seen.rank == 0) & (seen.background == asked.background) & (seen.motion == asked.motion)
    told = zip(
        world.captions(asked),
        in_words(world, seen, asked.num_frames > 1),
        right.tolist(),
        frames.cpu().numpy(),
        strict=True,
    )
    return [Sample(*sample) for sample in told]
