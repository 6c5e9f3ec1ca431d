"""The benchmark of the emoji world: does a model show exactly what captions ask, for combinations it never saw?

First the judge is judged, on real renders and on the autoencoder's reconstructions of them; one that reads less than
97% of any of it right on the former is no judge. Then clips are generated from held-out combinations, told in the main
form, and pictures of two objects from held-out (object, relation, object).
"""

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import diffusers
import numpy as np
import torch
from torch import Tensor

import nova_video
from nova_video.data.clips import CANVAS, SPAN, ClipSpec
from nova_video.data.words import COLORS, MOTIONS
from nova_video.data.world import EmojiWorld, Split, to_uint8
from nova_video.errors import InputError
from nova_video.evaluation.judge import Judge, Judgement
from nova_video.evaluation.rates import Rate

JUDGED = ("background", "motion", "object", "relation")  # the scores that a judge must master on real renders
JUDGE_AT_LEAST = 0.97
JUDGE_CLIPS = 200  # real renders that the judge is judged on, at least
SHEET_CLIPS = 24  # generated clips kept to look at
REAL, RECONSTRUCTED, GENERATED = "real renders", "autoencoder", "generated"

Progress = Callable[[str, int, int], None]
"""(what is being judged, clips done, clips in all)."""


Maker = Callable[[ClipSpec, int], Tensor]
"""Makes the frames (N, F, H, W, 3) uint8 of a batch; the number is that of its first clip in the evaluation."""


class Generator(Protocol):
    """What is evaluated: `NovaPipeline`, or a stand-in for it."""

    vae: Any

    def __call__(
        self,
        prompt: list[str],
        *,
        num_frames: int,
        num_inference_steps: int | None,
        num_diffusion_steps: int | None,
        guidance_scale: float | None,
        motion_flow: float | None,
        generator: list[torch.Generator],
        output_type: str,
    ) -> Any: ...


@dataclass(frozen=True)
class EmojiSettings:
    """How to evaluate."""

    num_clips: int = 400
    num_pairs: int = 100
    """Pictures of two objects; 0 leaves them out."""
    num_frames: int = SPAN
    """Of a clip; 1 evaluates a model of images."""
    split: Split = "heldout"
    """Combinations never trained on, or those trained on."""
    seed: int = 0
    """Which combinations, and the models' random numbers: clip i has a generator of seed + i."""
    batch_size: int = 25
    num_inference_steps: int | None = None
    """None in this and the next three: the model's own."""
    num_diffusion_steps: int | None = None
    guidance_scale: float | None = None
    motion_flow: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("num_clips", 1), ("num_pairs", 0), ("num_frames", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}: expected a whole number of at least {least}")


@dataclass(frozen=True)
class SourceScores:
    """How often the clips of one source show what was asked."""

    rates: dict[str, Rate]
    """background, motion, object, object in top 5, all three; relation and both objects for pictures of two."""
    by_motion: dict[str, dict[str, Rate]]
    """For each motion asked for: motion and object."""


@dataclass(frozen=True)
class Sample:
    """A generated clip to look at."""

    caption: str
    seen: str
    right: bool
    frames: np.ndarray
    """(F, H, W, 3) uint8."""


@dataclass(frozen=True)
class EmojiReport:
    """All that an evaluation found."""

    settings: EmojiSettings
    world: str
    model: str
    command: str
    device: str
    versions: dict[str, str]
    seconds: float
    """Time of generating alone."""
    sources: dict[str, SourceScores]
    """By REAL, RECONSTRUCTED (where there is an autoencoder) and GENERATED."""
    samples: list[Sample] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """Everything but the samples."""
        return {
            "benchmark": "emoji",
            "world": self.world,
            "model": self.model,
            "command": self.command,
            "device": self.device,
            "versions": self.versions,
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
    pipe: Generator,
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
    check_judge(sources[REAL])
    asked_counts = (settings.num_clips, settings.num_pairs)
    if pipe.vae is not None:
        sources[RECONSTRUCTED] = judged(RECONSTRUCTED, reconstructed, *asked_counts)
    sources[GENERATED] = judged(GENERATED, generated, *asked_counts)
    return EmojiReport(
        settings=settings,
        world=f"{world.info.set} ({len(world)} objects), version {world.info.version}",
        model=model,
        command=command,
        device=device_name(world.device),
        versions={
            "nova_video": nova_video.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        seconds=seconds,
        sources=sources,
        samples=samples,
    )


def asked_specs(world: EmojiWorld, settings: EmojiSettings) -> tuple[ClipSpec, ClipSpec]:
    """What is asked for: clips, and pictures of two objects; enough of both to judge the judge, if any.

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


def generate(pipe: Generator, world: EmojiWorld, spec: ClipSpec, settings: EmojiSettings, first: int) -> Tensor:
    """Frames (N, F, H, W, 3) uint8 that the model makes from the captions of `spec`."""
    made = pipe(
        world.captions(spec),
        num_frames=spec.num_frames,
        num_inference_steps=settings.num_inference_steps,
        num_diffusion_steps=settings.num_diffusion_steps,
        guidance_scale=settings.guidance_scale,
        motion_flow=settings.motion_flow,
        generator=[torch.Generator().manual_seed(settings.seed + first + row) for row in range(len(spec))],
        output_type="np",
    )
    frames = np.stack(made.images)[:, None] if spec.num_frames == 1 else np.stack(made.frames)
    expected = (len(spec), spec.num_frames, CANVAS, CANVAS, 3)
    if frames.shape != expected:
        raise InputError(
            f"the model makes clips of shape {frames.shape}: expected {expected}, those of the emoji world"
        )
    return torch.from_numpy((frames * 255).round().astype(np.uint8))


@torch.no_grad()
def reconstruct(vae: Any, clips: Tensor) -> Tensor:
    """Clips (N, 3, F, H, W) through the autoencoder and back."""
    latents = vae.encode(clips.to(vae.device, vae.dtype)).latent_dist.mode()
    decoded: Tensor = vae.decode(latents).sample
    return decoded.to(clips.device).float()[:, :, : clips.shape[2]]


def score(asked: ClipSpec, seen: Judgement, asked_pairs: ClipSpec, seen_pairs: Judgement) -> SourceScores:
    """Compare what was asked with what was seen."""
    moves = asked.num_frames > 1
    background = seen.background == asked.background
    motion = seen.motion == asked.motion
    thing = seen.rank == 0
    rates = {"background": Rate.of(background)}
    if moves:
        rates["motion"] = Rate.of(motion)
    rates["object"] = Rate.of(thing)
    rates["object_top5"] = Rate.of(seen.rank < 5)
    rates["all"] = Rate.of(background & motion & thing)
    by_motion = {}
    for index, name in enumerate(MOTIONS if moves else ()):
        rows = asked.motion == index
        by_motion[name] = {"motion": Rate.of(motion[rows]), "object": Rate.of(thing[rows])}
    if len(asked_pairs):
        both = (seen_pairs.rank == 0) & (seen_pairs.second == asked_pairs.second)
        rates["relation"] = Rate.of(seen_pairs.relation == asked_pairs.relation)
        rates["both_objects"] = Rate.of(both)
    return SourceScores(rates, by_motion)


def check_judge(real: SourceScores) -> None:
    """A judge that misreads real renders is refused."""
    for name, rate in real.rates.items():
        if name in JUDGED and rate.value < JUDGE_AT_LEAST:
            raise InputError(
                f"the judge reads only {100 * rate.value:.1f}% of {name} right on {rate.total} real renders of this "
                f"world: expected at least {100 * JUDGE_AT_LEAST:.0f}%, so it cannot judge a model"
            )


def describe(world: EmojiWorld, frames: Tensor, asked: ClipSpec, seen: Judgement) -> list[Sample]:
    """Clips with what was asked and what was seen, in words."""
    samples = []
    for row, caption in enumerate(world.captions(asked)):
        motion, thing = int(seen.motion[row]), int(seen.object[row])
        said = [
            world.names[thing] if thing >= 0 else "no object",
            COLORS[int(seen.background[row])],
        ]
        if asked.num_frames > 1:
            said.insert(1, MOTIONS[motion] if motion >= 0 else "no such motion")
        right = bool(
            (seen.rank[row] == 0)
            & (seen.background[row] == asked.background[row])
            & (seen.motion[row] == asked.motion[row])
        )
        samples.append(Sample(caption, ", ".join(said), right, frames[row].cpu().numpy()))
    return samples


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
