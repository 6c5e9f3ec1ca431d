"""The judge and the benchmark on drawn shapes: right clips are recognised, also blurred ones; wrong clips are not."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from nova_video.common.errors import InputError
from nova_worlds.evaluation.emoji import EmojiReport, EmojiSettings, asked_specs, evaluate_emoji
from nova_worlds.evaluation.report import contact_sheet, print_report, write_report
from nova_worlds.evaluation.world_benchmark import GENERATED, REAL, RECONSTRUCTED, Origin, Sample
from nova_worlds.judging.judge import Judge
from nova_worlds.judging.rates import Rate
from nova_worlds.rendering.captions import parse_caption
from nova_worlds.rendering.clips import CANVAS, SPAN, ClipSpec
from nova_worlds.rendering.lexicon import COLORS, MOTIONS, RELATIONS, SPEEDS, STILL
from nova_worlds.rendering.shapes import prepare_shapes
from nova_worlds.rendering.world import EmojiWorld, to_uint8

LEFT, RIGHT = MOTIONS.index("moving left"), MOTIONS.index("moving right")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> EmojiWorld:
    return prepare_shapes(tmp_path_factory.mktemp("worlds") / "shapes", score_clips=1)


@pytest.fixture(scope="module")
def judge(world: EmojiWorld) -> Judge:
    return Judge(world)


@pytest.fixture(scope="module")
def clips(world: EmojiWorld) -> tuple[ClipSpec, Tensor]:
    """Six clips of every motion, and their frames (N, F, H, W, 3) uint8."""
    spec = world.sample(60, torch.Generator().manual_seed(0))
    motion = torch.arange(60) % len(MOTIONS)
    spec = replace(spec, motion=motion, speed=torch.where(motion == STILL, 1, torch.arange(60) // len(MOTIONS) % 3))
    return spec, to_uint8(world.render(spec))


def share(flags: Tensor) -> float:
    return flags.float().mean().item()


def test_real_clips(judge: Judge, clips: tuple[ClipSpec, Tensor]) -> None:
    spec, frames = clips
    seen = judge(frames, spec)
    assert share(seen.background == spec.background) == 1
    assert share(seen.motion == spec.motion) == 1
    assert share(seen.object == spec.object) >= 0.99
    assert share((seen.rank == 0) == (seen.object == spec.object)) == 1
    assert (seen.relation == -1).all()


def test_blurred_and_noisy_clips(world: EmojiWorld, judge: Judge, clips: tuple[ClipSpec, Tensor]) -> None:
    """What an autoencoder of 28 dB does: haloes around objects, blotches in flat places."""
    spec, frames = clips[0].select(slice(40)), clips[1][:40]
    real = frames.permute(0, 1, 4, 2, 3).flatten(0, 1).float() / 255  # (N * F, 3, H, W)
    blotches = torch.randn(len(real), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    blurred = F.avg_pool2d(F.pad(real, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    poor = (blurred + 0.055 * F.interpolate(blotches, size=CANVAS, mode="bilinear")).clamp(0, 1)
    decibels = -10 * (poor - real).square().mean().log10()
    assert 27 < decibels < 29
    seen = judge((poor * 255).round().to(torch.uint8).permute(0, 2, 3, 1).unflatten(0, frames.shape[:2]), spec)
    assert share(seen.background == spec.background) == 1
    assert share(seen.motion == spec.motion) >= 0.97
    assert share(seen.object == spec.object) >= 0.97


def test_reversed_clips_show_the_opposite(judge: Judge, clips: tuple[ClipSpec, Tensor]) -> None:
    spec, frames = clips
    seen = judge(frames.flip(1), spec)
    opposite = torch.tensor([0, 2, 1, 4, 3, 6, 5, 8, 7, 9])
    assert torch.equal(seen.motion, opposite[spec.motion])


def test_frozen_clips_stand_still(judge: Judge, clips: tuple[ClipSpec, Tensor]) -> None:
    spec, frames = clips
    seen = judge(frames[:, 8:9].expand_as(frames), spec)
    assert (seen.motion == STILL).all()


def test_half_a_motion_is_none(judge: Judge, clips: tuple[ClipSpec, Tensor]) -> None:
    """There and back again, or a jump between two places, is not moving left (or growing, ...) and not standing."""
    spec, frames = clips
    steady = ((spec.motion > STILL) & (spec.motion < MOTIONS.index("spinning clockwise"))).nonzero().flatten()
    spec, frames = spec.select(steady), frames[steady]
    back = torch.cat((frames[:, ::2], frames[:, ::2].flip(1)[:, 1:]), dim=1)
    assert back.shape[1] == SPAN
    jump = torch.cat((frames[:, :1].expand(-1, 8, -1, -1, -1), frames[:, -1:].expand(-1, 9, -1, -1, -1)), dim=1)
    for wrong in (back, jump):
        seen = judge(wrong, spec)
        assert share(seen.motion == spec.motion) == 0
        assert share(seen.motion == STILL) <= 0.05


def test_wrong_colours_and_objects(world: EmojiWorld, judge: Judge, clips: tuple[ClipSpec, Tensor]) -> None:
    spec, frames = clips
    asked = replace(spec, object=(spec.object + 1) % len(world), background=(spec.background + 1) % len(COLORS))
    seen = judge(frames, asked)
    assert share(seen.background == asked.background) == 0
    assert share(seen.rank == 0) == 0
    assert torch.equal(seen.background, spec.background)
    assert share(seen.object == spec.object) >= 0.99


def test_nothing_is_recognised_in_nothing(judge: Judge, clips: tuple[ClipSpec, Tensor]) -> None:
    spec, frames = clips
    empty = frames[:, :, :1, :1].expand_as(frames)
    seen = judge(empty, spec)
    assert (seen.object == -1).all()
    assert (seen.motion == -1).all()
    assert (seen.rank > 0).all()


def test_an_object_that_changes_is_not_recognised_throughout(world: EmojiWorld, judge: Judge) -> None:
    """An object must be itself to the end, not only at first."""
    spec = world.sample(20, torch.Generator().manual_seed(2))
    spec = replace(spec, motion=torch.full_like(spec.motion, STILL), background=torch.zeros_like(spec.background))
    other = replace(spec, object=(spec.object + 1) % len(world))
    frames = torch.cat((to_uint8(world.render(spec))[:, :4], to_uint8(world.render(other))[:, 4:]), dim=1)
    assert share(judge(frames, spec).rank == 0) == 0


def test_longer_clips_are_judged_by_how_they_begin(world: EmojiWorld, judge: Judge) -> None:
    spec = world.sample(40, torch.Generator().manual_seed(3), num_frames=33)
    seen = judge(to_uint8(world.render(spec)), spec)
    assert share(seen.motion == spec.motion) >= 0.97
    assert share(seen.object == spec.object) >= 0.97


def test_pairs(world: EmojiWorld, judge: Judge) -> None:
    spec = world.sample(100, torch.Generator().manual_seed(4), images=True, pairs=0.7)
    frames = to_uint8(world.render(spec))
    seen = judge(frames, spec)
    paired = spec.second >= 0
    assert 50 < paired.sum() < 90
    assert share(seen.relation == spec.relation) >= 0.98
    assert share(seen.second == spec.second) >= 0.98
    assert share(seen.rank == 0) >= 0.98
    swapped = replace(spec, object=torch.where(paired, spec.second, spec.object), second=spec.object)
    other_way = to_uint8(world.render(replace(swapped, second=torch.where(paired, spec.object, -1))))
    assert share(judge(other_way, spec).relation[paired] == spec.relation[paired]) <= 0.02
    turned = judge(frames.transpose(2, 3), spec)  # beside becomes above
    assert share(turned.relation[paired] == spec.relation[paired]) <= 0.02
    alone = judge(to_uint8(world.render(replace(spec, has_pairs=False))), spec)
    assert share(alone.relation == -1) >= 0.98


# The benchmark


class Painter:
    """Stands in for a pipeline: renders what the prompts say, after `change` has had its way with it."""

    def __init__(self, world: EmojiWorld, change: Callable[[ClipSpec], ClipSpec] = lambda spec: spec) -> None:
        self.world, self.change = world, change
        self.vae: Any = None
        self.calls: list[tuple[list[str], list[int]]] = []

    def __call__(
        self,
        prompt: list[str],
        *,
        num_frames: int,
        sets: int | None,
        diffusion_steps: int | None,
        guidance_scale: float | None,
        motion_flow: float | None,
        preset: str | None,
        compile: bool | None,
        generator: list[torch.Generator],
        output_type: str,
    ) -> SimpleNamespace:
        assert output_type == "np"
        self.calls.append((prompt, [g.initial_seed() for g in generator]))
        scenes = [parse_caption(caption, self.world.names) for caption in prompt]
        assert all(scenes)
        paired = scenes[0].second is not None
        blank = self.world.sample(
            len(prompt), generator[0], num_frames=num_frames, images=num_frames == 1, pairs=float(paired)
        )
        spec = replace(
            blank,
            object=torch.tensor([self.world.names.index(scene.object) for scene in scenes]),
            background=torch.tensor([COLORS.index(scene.background) for scene in scenes]),
            motion=torch.tensor([MOTIONS.index(scene.motion or MOTIONS[STILL]) for scene in scenes]),
            speed=torch.tensor([SPEEDS.index(scene.speed) for scene in scenes]),
        )
        if paired:
            spec = replace(
                spec,
                second=torch.tensor([self.world.names.index(scene.second) for scene in scenes]),
                relation=torch.tensor([RELATIONS.index(scene.relation) for scene in scenes]),
            )
        frames = (self.world.render(self.change(spec)).permute(0, 2, 3, 4, 1).numpy() + 1) / 2
        return SimpleNamespace(images=list(frames[:, 0]), frames=list(frames))


class Flipping:
    """Stands in for an autoencoder that mirrors left and right."""

    device, dtype = torch.device("cpu"), torch.float32

    def encode(self, clips: Tensor) -> SimpleNamespace:
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: clips.flip(4)))

    def decode(self, latents: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=latents)


SETTINGS = EmojiSettings(num_clips=20, num_pairs=5, batch_size=8)


@pytest.fixture(autouse=True)
def few_real_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nova_worlds.evaluation.emoji.JUDGE_CLIPS", 25)


def percent(report: EmojiReport, source: str) -> dict[str, float]:
    return {name: round(100 * rate.value) for name, rate in report.sources[source].rates.items()}


def test_a_perfect_model_scores_full_marks(world: EmojiWorld, tmp_path: Path) -> None:
    painter = Painter(world)
    steps: list[tuple[str, int, int]] = []
    report = evaluate_emoji(
        painter, world, SETTINGS, model="painter", command="nova evaluate", on_progress=lambda *s: steps.append(s)
    )
    assert set(percent(report, GENERATED).values()) == {100}
    assert report.sources[GENERATED].rates["motion"] == Rate(20, 20)
    assert report.sources[GENERATED].rates["relation"] == Rate(5, 5)
    assert report.sources[REAL].rates["motion"].total == 25
    assert RECONSTRUCTED not in report.sources
    prompts = [prompt for call in painter.calls for prompt in call[0]]
    assert [seed for call in painter.calls for seed in call[1]] == list(range(25))
    assert [len(call[0]) for call in painter.calls] == [8, 8, 4, 5]
    assert all(" on a" in prompt for prompt in prompts)
    assert steps[-1] == (GENERATED, 25, 25)
    assert steps[0] == (REAL, 8, 50)

    write_report(report, tmp_path / "report")
    content = json.loads((tmp_path / "report" / "scores.json").read_text())
    assert content["scores"]["generated"]["motion"] == {
        "percent": 100.0,
        "right": 20,
        "of": 20,
        "interval_95": [83.89, 100.0],
    }
    assert content["settings"]["num_clips"] == 20
    assert content["model"] == "painter"
    assert content["command"] == "nova evaluate"
    assert set(content["versions"]) == {"nova_video", "torch", "diffusers", "python"}
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["scores.json", "sheet.png"]
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_report(report, console)
    text = console.export_text()
    assert "painter on shapes (10 objects)" in text
    assert "100.0 (83.9-100.0)" in text
    assert "spinning counterclockwise" in text


def test_wrong_models_score_what_they_deserve(world: EmojiWorld) -> None:
    def wrong_way(spec: ClipSpec) -> ClipSpec:
        swap = torch.arange(len(MOTIONS))
        swap[LEFT], swap[RIGHT] = RIGHT, LEFT
        return replace(spec, motion=swap[spec.motion])

    scores = evaluate_emoji(Painter(world, wrong_way), world, SETTINGS).sources[GENERATED]
    for name, by_score in scores.by_motion.items():
        expected = 0 if name in ("moving left", "moving right") else by_score["motion"].total
        assert by_score["motion"].right == expected
        assert by_score["object"].right == by_score["object"].total
    assert scores.rates["all"].right == scores.rates["motion"].right < 20

    def swapped(spec: ClipSpec) -> ClipSpec:
        if spec.has_pairs:
            return replace(spec, object=spec.second, second=spec.object)
        return replace(spec, object=(spec.object + 3) % len(world), background=(spec.background + 1) % len(COLORS))

    report = evaluate_emoji(Painter(world, swapped), world, SETTINGS)
    assert percent(report, GENERATED) == {
        "background": 0,
        "motion": 100,
        "object": 0,
        "object_top5": pytest.approx(50, abs=45),
        "all": 0,
        "relation": 0,
        "both_objects": 100,
    }
    assert not any(sample.right for sample in report.samples)


def test_reconstructions_are_judged_too(world: EmojiWorld) -> None:
    painter = Painter(world)
    painter.vae = Flipping()
    report = evaluate_emoji(painter, world, SETTINGS)
    by_motion = report.sources[RECONSTRUCTED].by_motion
    assert by_motion["moving left"]["motion"].right == 0
    assert by_motion["moving up"]["motion"].value == 1
    assert percent(report, GENERATED)["motion"] == 100


def test_image_models(world: EmojiWorld) -> None:
    report = evaluate_emoji(Painter(world), world, EmojiSettings(num_clips=10, num_pairs=0, num_frames=1))
    assert percent(report, GENERATED) == {"background": 100, "object": 100, "object_top5": 100, "all": 100}
    assert report.samples[0].caption.count("moving") == 0


def test_same_seed_asks_the_same(world: EmojiWorld) -> None:
    first, again, other = (world.captions(asked_specs(world, replace(SETTINGS, seed=seed))[0]) for seed in (0, 0, 1))
    assert first == again != other


def test_a_judge_that_misreads_is_refused(world: EmojiWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    painter = Painter(world)
    monkeypatch.setattr("nova_worlds.judging.judge.MOVES", 100.0)
    with pytest.raises(InputError, match=r"reads only .* of motion right on 25 real renders"):
        evaluate_emoji(painter, world, SETTINGS)
    assert painter.calls == []


def test_wrong_input_is_named(world: EmojiWorld, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="num_clips is 0: expected a whole number of at least 1"):
        EmojiSettings(num_clips=0)
    large = Painter(world)
    render = world.render
    large.world = SimpleNamespace(  # type: ignore[assignment]
        names=world.names, sample=world.sample, render=lambda spec: F.interpolate(render(spec), scale_factor=(1, 2, 2))
    )
    with pytest.raises(InputError, match=r"shape \(8, 17, 256, 256, 3\)"):
        evaluate_emoji(large, world, SETTINGS)
    (tmp_path / "file").write_text("")
    report = EmojiReport(SETTINGS, Origin("", "", "", "", {}), 0.0, {}, [])
    with pytest.raises(InputError, match="cannot write to"):
        write_report(report, tmp_path / "file" / "report")


def test_contact_sheet_shows_every_clip(clips: tuple[ClipSpec, Tensor]) -> None:
    samples = [Sample("asked", "seen", number % 2 == 0, clips[1][number].numpy()) for number in range(5)]
    sheet, row = np.asarray(contact_sheet(samples)), np.asarray(contact_sheet(samples[:2]))
    assert sheet.shape[0] > 2 * row.shape[0]
    for sample in samples:
        color = sample.frames[0, 0, 0]
        assert (sheet == color).all(axis=-1).sum() > 1000


def test_wilson_intervals() -> None:
    low, high = Rate(9, 10).interval()
    assert (low, high) == (pytest.approx(0.5958, abs=1e-4), pytest.approx(0.9821, abs=1e-4))
    assert Rate(0, 10).interval()[0] == 0
    assert str(Rate(390, 400)) == "97.5 (95.5-98.6)"
    assert str(Rate(0, 0)) == "-"
    assert Rate(0, 0).as_json() == {"percent": None, "right": 0, "of": 0, "interval_95": None}
