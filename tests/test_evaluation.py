"""Benchmarks of a user's own: what is made, what is judged, and what a stopped run keeps."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nova_video.cli.main import main
from nova_video.common.errors import InputError
from nova_video.evaluation import Benchmark, BenchmarkItem, SampleFile, evaluate

EXAMPLES = Path(__file__).parents[1] / "examples"


class Counts(Benchmark):
    """Pictures in two groups and a clip; the score is the mean of all values."""

    def items(self) -> Sequence[BenchmarkItem]:
        return [
            BenchmarkItem("a", group="one", samples=2),
            BenchmarkItem("b", group="two"),
            BenchmarkItem("c", group="two", options={"num_frames": 5}),
        ]

    def judge(self, sample: SampleFile) -> Mapping[str, float]:
        frames = sample.frames()
        return {"value": float(frames.mean()), "frames": len(frames)}


class Painter:
    """Stands in for a pipeline: every frame is as gray as the number of the seed. It fails after some calls."""

    def __init__(self, calls: int = 99) -> None:
        self.calls: list[dict[str, Any]] = []
        self.left = calls

    def __call__(self, prompt: list[str], generator: list[Any], num_frames: int = 1, **options: Any) -> Any:
        if not self.left:
            raise RuntimeError("stopped")
        self.left -= 1
        self.calls.append({"prompt": prompt, "num_frames": num_frames, **options})
        clips = [np.full((num_frames, 16, 16, 3), one.initial_seed(), np.uint8) for one in generator]
        pictures = [[Image.fromarray(frame) for frame in clip] for clip in clips]
        records = [{"prompt": text} for text in prompt]
        if num_frames == 1:
            return SimpleNamespace(images=[clip[0] for clip in pictures], frames=None, fps=12, records=records)
        return SimpleNamespace(images=None, frames=pictures, fps=12, records=records)


def test_scores_are_means_by_group(tmp_path: Path) -> None:
    pipe = Painter()
    report = evaluate(Counts(), pipe, tmp_path, seed=100, batch_size=8, options={"preset": "fast"}, model="m")
    assert report.table == {
        "one": {"value": pytest.approx(100.5), "frames": 1},
        "two": {"value": pytest.approx(102.5, abs=1), "frames": 3},  # an mp4 rounds colours
        "all": {"value": pytest.approx(101.5, abs=1), "frames": 2},
    }
    assert [call["prompt"] for call in pipe.calls] == [["a", "a", "b"], ["c"]]  # those of one shape share a call
    assert all(call["preset"] == "fast" for call in pipe.calls)
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["table"] == report.table
    assert (written["benchmark"], written["model"], written["seed"]) == ("Counts", "m", 100)
    assert written["samples"][3] == {
        "prompt": "c",
        "group": "two",
        "seed": 103,
        "file": "samples/00003.mp4",
        "scores": {"value": pytest.approx(103, abs=2), "frames": 5},
    }
    assert report.judged[3][0].record() == {"prompt": "c"}


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        evaluate(Counts(), Painter(calls=2), tmp_path)
    rest = Painter()
    report = evaluate(Counts(), rest, tmp_path)
    assert [call["prompt"] for call in rest.calls] == [["b"], ["c"]]
    assert report.table == evaluate(Counts(), Painter(), tmp_path / "whole").table


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    evaluate(Counts(), Painter(), tmp_path)
    with pytest.raises(InputError, match="has samples made with seed 0, and seed is 1: expected another --output"):
        evaluate(Counts(), Painter(), tmp_path, seed=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": lambda self: []}, "has no items"),
        ({"judge": lambda self, sample: 3}, "the judge of 00000.png returns int: expected scores by name"),
    ],
)
def test_wrong_benchmarks_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(type("Wrong", (Counts,), change)(), Painter(), tmp_path)


def test_the_example_runs(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With random weights; a second run needs no model."""
    monkeypatch.chdir(EXAMPLES)
    given = ["evaluate", "own_benchmark:Backgrounds", "-o", str(tmp_path / "out"), "--model", str(tiny_checkpoint)]
    given += ["--sets", "1", "--diffusion-steps", "1", "--device", "cpu", "--batch-size", "16"]
    assert main(given) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert list(scores["table"]) == ["white", "red", "green", "blue", "all"]
    assert scores["command"].startswith("nova evaluate own_benchmark:Backgrounds --")
    assert len(scores["samples"]) == 16
    monkeypatch.setattr("nova_video.cli.evaluate.load_pipeline", None)
    assert main(given) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_benchmark:COLORS", "expected a class that extends nova_video.evaluation.Benchmark"),
        ("own_benchmark:Nothing", "has no Nothing"),
    ],
)
def test_what_is_no_benchmark_is_refused(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(EXAMPLES)
    assert main(["evaluate", name, "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
