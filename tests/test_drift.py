"""Measures of long clips: real renders do not drift, and every kind of drift moves its own measure."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from nova_video.cli.arguments import parse
from nova_video.cli.main import main
from nova_video.common.errors import InputError
from nova_worlds.evaluation.drift import (
    ALL_FRAMES,
    MEASURES,
    PLAIN,
    TOGETHER,
    Curve,
    DriftSettings,
    evaluate_drift,
    last_frames,
    measure,
    windows,
)
from nova_worlds.evaluation.plot import draw_drift, write_plot
from nova_worlds.evaluation.report import print_drift, write_report
from nova_worlds.evaluation.world_benchmark import REAL, RECONSTRUCTED
from nova_worlds.judging.judge import Judge
from nova_worlds.rendering.clips import SPAN, ClipSpec
from nova_worlds.rendering.lexicon import MOTIONS, STILL
from nova_worlds.rendering.shapes import prepare_shapes
from nova_worlds.rendering.world import EmojiWorld, to_uint8

FRAMES = 41


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> EmojiWorld:
    return prepare_shapes(tmp_path_factory.mktemp("worlds") / "shapes", score_clips=1)


@pytest.fixture(scope="module")
def judge(world: EmojiWorld) -> Judge:
    return Judge(world)


@pytest.fixture(scope="module")
def spec(world: EmojiWorld) -> ClipSpec:
    """Six clips of objects that spin or stand still on a gray background."""
    spec = world.sample(6, torch.Generator().manual_seed(0), num_frames=FRAMES)
    motion = torch.tensor([STILL, MOTIONS.index("spinning clockwise")]).repeat(3)
    return replace(spec, motion=motion, speed=torch.ones_like(motion), background=torch.full_like(motion, 2))


def fade(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The second half of clips (N, 3, F, H, W) in [-1, 1] is changed."""

    def changed(clips: Tensor) -> Tensor:
        half = clips.shape[2] // 2
        return torch.cat((clips[:, :, :half], change(clips[:, :, half:])), dim=2)

    return changed


def blur(clips: Tensor) -> Tensor:
    return F.avg_pool3d(F.pad(clips, (2, 2, 2, 2, 0, 0), mode="replicate"), (1, 5, 5), stride=1)


def gray(clips: Tensor) -> Tensor:
    return clips.mean(dim=1, keepdim=True).expand_as(clips)


DRIFTS: dict[str, tuple[Callable[[Tensor], Tensor], str, float]] = {
    # what happens to a clip, the measure that tells, and by what it is multiplied at least or at most
    "blurred": (blur, "sharpness", 0.6),
    "gray": (gray, "saturation", 0.1),
    "frozen": (lambda clips: clips[:, :, :1].expand_as(clips), "motion", 0.1),
    "gone": (lambda clips: torch.zeros_like(clips), "identity", 0.1),
    "not there": (lambda clips: torch.zeros_like(clips), "recognised", 0.1),
    "small": (lambda clips: F.pad(F.interpolate(clips, scale_factor=(1, 0.5, 0.5)), (32,) * 4), "size", 0.6),
}


@pytest.mark.parametrize("kind", DRIFTS)
@pytest.mark.slow
def test_what_fades_is_measured(world: EmojiWorld, judge: Judge, spec: ClipSpec, kind: str) -> None:
    change, name, most = DRIFTS[kind]
    clips = world.render(spec)
    steady = measure(judge, to_uint8(clips), spec)[name].mean(dim=0)
    drifted = measure(judge, to_uint8(fade(change)(clips)), spec)[name].mean(dim=0)
    assert steady.shape == (FRAMES // 8,)
    assert drifted[:2] == pytest.approx(steady[:2])
    assert (drifted[3:] < most * steady[3:]).all()


def test_a_background_of_another_colour_is_measured(world: EmojiWorld, judge: Judge, spec: ClipSpec) -> None:
    colour = measure(judge, to_uint8((world.render(spec) + 0.08).clamp(max=1)), spec)["colour"]
    assert colour.mean() == pytest.approx(10, abs=1)  # 0.08 of half of 255
    assert measure(judge, to_uint8(world.render(spec)), spec)["colour"].max() < 1


def test_real_clips_do_not_drift(world: EmojiWorld, judge: Judge, spec: ClipSpec) -> None:
    measured = measure(judge, to_uint8(world.render(spec)), spec)
    assert set(measured) == set(MEASURES)
    for name, least in (("identity", 0.9), ("recognised", 0.95)):
        assert measured[name].mean(dim=0).min() > least
    for name in ("sharpness", "saturation", "size"):
        values = measured[name].mean(dim=0)
        assert values.max() < 1.1 * values.min()
    still, turning = measured["motion"][0::2].mean(), measured["motion"][1::2].mean()
    assert still < 0.01 < 0.1 < turning


def test_windows_and_curves() -> None:
    values = torch.arange(20.0)[None]
    assert windows(values, torch.arange(20), 2).tolist() == [[3.5, 11.5]]
    assert windows(values[:, ::4], torch.arange(0, 20, 4), 2).tolist() == [[2, 10]]
    curve = Curve.of(torch.tensor([[1.0, 1.0, 2.0, 4.0], [3.0, 3.0, 3.0, 3.0]]))
    assert (curve.mean, curve.start, curve.end) == ([2, 2, 2.5, 3.5], 2, 3)
    assert curve.error == pytest.approx(1 / 2**0.5)


def test_last_frames_are_those_of_the_whole_clip(world: EmojiWorld, spec: ClipSpec) -> None:
    whole, last = to_uint8(world.render(spec))[:, -SPAN:], last_frames(world, spec)
    assert (whole.int() - last.int()).abs().max() <= 1


class Blurring:
    """Stands in for a pipeline: real renders, the more blurred the longer they last unless statistics are held."""

    def __init__(self, world: EmojiWorld, settings: DriftSettings) -> None:
        self.world = world
        self.asked = world.sample(
            max(settings.num_clips, 12),
            torch.Generator().manual_seed(settings.seed),
            num_frames=settings.num_frames,
            split=settings.split,
        )
        self.vae: Any = None
        self.calls: list[dict[str, Any]] = []

    def __call__(self, prompt: list[str], **given: Any) -> SimpleNamespace:
        self.calls.append(given)
        rows = torch.tensor([g.initial_seed() for g in given["generator"]])
        asked = self.asked.select(rows)
        assert prompt == self.world.captions(asked)
        assert given["num_frames"] == asked.num_frames
        assert given["video"] is None
        clips = self.world.render(asked)
        if not given["hold_statistics"]:
            clips = fade(blur)(clips)
        return SimpleNamespace(frames=list(to_uint8(clips).numpy() / 255))


@pytest.mark.slow
def test_remedies_are_compared(world: EmojiWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nova_worlds.evaluation.drift.JUDGE_CLIPS", 12)
    settings = DriftSettings(num_clips=3, num_frames=FRAMES, batch_size=2, context_frames=17)
    model = Blurring(world, settings)
    model.vae = SimpleNamespace(
        device=torch.device("cpu"),
        dtype=torch.float32,
        encode=lambda clips: SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: clips)),
        decode=lambda latents: SimpleNamespace(sample=latents),
    )
    steps: list[tuple[str, int, int]] = []
    report = evaluate_drift(
        model, world, settings, model="blurring", command="nova evaluate", on_progress=lambda *s: steps.append(s)
    )
    assert list(report.sources)[:4] == [REAL, RECONSTRUCTED, PLAIN, ALL_FRAMES]
    assert steps[0] == (REAL, 2, 3)
    assert steps[-1] == (TOGETHER, 3, 3)
    options = [(call["context_frames"], call["history_noise"], call["reanchor_frames"]) for call in model.calls[::2]]
    assert options == [(17, 0, 0), (FRAMES, 0, 0), (17, 0.1, 0), (17, 0, 32), (17, 0, 0), (17, 0.1, 32)]
    sharpness = {name: source.curves["sharpness"] for name, source in report.sources.items()}
    assert sharpness[PLAIN].end < 0.7 * sharpness[PLAIN].start
    assert sharpness["statistics held"] == sharpness[TOGETHER] == sharpness[REAL]
    assert report.sources[REAL].ends["object"].value == 1

    write_report(report, tmp_path)
    write_plot(report, tmp_path / "plot.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plot.png", "scores.json", "sheet.png"]
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["benchmark"] == "drift"
    assert content["time"] == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert len(content["sources"][PLAIN]["sharpness"]["mean"]) == 5
    assert content["sources"]["history noise"]["made_with"]["history_noise"] == 0.1
    lines = [line for axis in draw_drift(report).axes[: len(MEASURES)] for line in axis.lines]
    assert len(lines) == len(MEASURES) * len(report.sources)
    assert [sample.caption.split(":")[0] for sample in report.sheets()["sheet"].samples[:2]] == [REAL, RECONSTRUCTED]
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_drift(report, console)
    text = console.export_text()
    assert "statistics held" in text
    assert "100.0" in text


@pytest.mark.slow
def test_the_command(
    world: EmojiWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_shapes(tmp_path / "world", score_clips=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nova_worlds.evaluation.drift.JUDGE_CLIPS", 12)
    settings = DriftSettings(num_clips=1, num_frames=33)
    monkeypatch.setattr("nova_video.cli.evaluate.load_pipeline", lambda *_: Blurring(world, settings))
    assert main(["evaluate", "drift", "--data", "world", "-o", "scores", "--num-clips", "1", "--num-frames", "33"]) == 0
    assert capsys.readouterr().out.endswith("scores\n")
    assert sorted(path.name for path in Path("scores").iterdir()) == ["plot.png", "scores.json", "sheet.png"]


def test_defaults_are_the_library_s() -> None:
    typed, settings = parse(["evaluate", "drift"]), DriftSettings()
    for name in ("num_clips", "num_frames", "split", "seed", "batch_size", "context_frames", "sink_frames"):
        assert getattr(typed, name) == getattr(settings, name)
    for name in ("history_noise", "reanchor_frames", "hold_statistics"):
        assert getattr(typed, name) == getattr(settings, name)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(InputError, match="num_frames is 17: expected a whole number of at least 32"):
        DriftSettings(num_frames=17)
