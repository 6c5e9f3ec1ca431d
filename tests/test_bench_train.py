"""Timing training: rows, the command, tables; and that what is timed is the trainer's own step."""

import dataclasses
import json
import logging
import math
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from scaling import usual_rows
from tables import EMPTY, train_table

from conftest import CONFORMANCE
from nova_video.bench.configs import BATCHES, SIZES
from nova_video.bench.rows import record_row
from nova_video.bench.train import (
    OPTIMIZER,
    AskedTraining,
    GivenTask,
    choose_variants,
    measure_training,
    open_model,
    warm_up_variants,
)
from nova_video.bench.train_rows import TrainRow, read_train_rows, train_line
from nova_video.cli import main as cli
from nova_video.cli.arguments import BenchTrain, parse
from nova_video.common.errors import InputError
from nova_video.training.flops import step_flops
from nova_video.training.recipe import DatasetTransformerRecipe, load_recipe
from nova_video.training.transformer_task import Variant

PICTURES, CLIPS = str(CONFORMANCE / "text-to-image"), str(CONFORMANCE / "text-to-video")
ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
QUICK = ["--warm-up", "1", "--steps", "3"]


def row(config: str = "t2i-512-0.6b", batch: int = 16, seconds: float | None = 0.135, **values: object) -> TrainRow:
    """Like one of an H200."""
    how = {"precision": "bf16", "strategy": "single", "processes": 1, "checkpointing": False, "compile": True}
    given = {"device": "NVIDIA H200", "versions": {}, "command": "nova bench train", "step_seconds": seconds}
    shown = {"step_seconds_range": (0.13, 0.14), "mfu": 0.451, "tflop_per_second": 446.0, "peak_memory_gb": 21.25}
    return TrainRow(config, batch, **(how | given | shown | values))


def test_command_prints_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that trains, and one without weights: a row of each, and an exit code that tells."""
    path, empty = tmp_path / "train.json", tmp_path / "empty"
    shutil.copytree(CLIPS, empty, ignore=shutil.ignore_patterns("*.safetensors"))
    options = ["--batch", "2", "--frames", "5", "--device", "cpu", *QUICK, "--output", str(path)]
    assert cli.main(["bench", "train", "--config", CLIPS, str(empty), *options]) == 2
    printed = capsys.readouterr()
    assert "1 of 2 failed" in printed.err
    values = [json.loads(line) for line in printed.out.splitlines()]
    assert values == json.loads(path.read_text())
    done, failed = read_train_rows(path)
    assert (done.config, failed.config) == (CLIPS, str(empty))
    assert "no weights" in str(failed.error)
    assert failed.step_seconds is None
    assert (done.batch, done.frames, done.tokens, done.loss_repeat, done.steps) == (2, 2, 24, 4, 3)
    assert (done.precision, done.strategy, done.processes, done.compile) == ("fp32", "single", 1, False)
    assert done.cuda_graph is False
    assert done.device.startswith("cpu")
    assert done.step_seconds_range[0] <= done.step_seconds <= done.step_seconds_range[1]
    assert done.samples_per_second == pytest.approx(2 / done.step_seconds, rel=1e-3)
    assert (done.mfu, done.peak_memory_gb) == (None, None)
    assert done.finite
    assert 0.5 < done.loss < 2  # of an untrained model against noise of variance one
    again = parse(done.command.split()[1:])
    assert isinstance(again, BenchTrain)
    assert (again.config, again.batch, again.frames, again.steps) == ((CLIPS,), 2, 5, 3)


def test_profile_is_a_trace_of_steps(tmp_path: Path) -> None:
    """Of three more, which leave the row as it is."""
    path, asked = tmp_path / "trace.json", AskedTraining(batch=1, warm_up=1, steps=3, device="cpu")
    found = measure_training(PICTURES, asked, "", path)
    names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
    assert names.count("Optimizer.step#AdamW.step") == 3
    assert found.error is None
    assert found.loss == measure_training(PICTURES, asked, "").loss


def test_steps_that_are_not_finite_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = GivenTask.loss
    monkeypatch.setattr(GivenTask, "loss", lambda *a: plain(*a) | {"loss": plain(*a)["loss"] * math.nan})
    found = measure_training(PICTURES, AskedTraining(batch=1, warm_up=1, steps=3, device="cpu"), "")
    assert (found.error, found.finite, found.skipped_steps, found.loss) == (None, False, 3, None)
    assert "NOT FINITE" in train_line(found)
    assert "3 of 3 steps skipped" in train_line(found)
    assert "NOT FINITE" in train_table([found])
    assert not usual_rows([row(finite=False)])


def test_operations_are_those_of_the_steps() -> None:
    """In the mean over the numbers of revealed tokens that were drawn, which lie between the fewest and the most."""
    found = measure_training(PICTURES, AskedTraining(batch=3, warm_up=1, steps=2, device="cpu"), "")
    model = open_model(PICTURES, AskedTraining(), torch.device("cpu")).model
    counts = [step_flops(model, 3, 1, (8, 8), visible, 4) / 1e12 for visible in (0, 5)]
    assert min(counts) * 0.999 <= found.tflop <= max(counts) * 1.001


def test_a_batch_is_given_once_and_weights_move() -> None:
    recipe = dataclasses.replace(
        DatasetTransformerRecipe(), dataset=dataclasses.replace(DatasetTransformerRecipe().dataset, batch=2)
    )
    task = GivenTask(recipe, open_model(CLIPS, AskedTraining(frames=9), torch.device("cpu")), torch.device("cpu"))
    variants, shares = task.variants()
    assert sum(shares) == pytest.approx(1)
    assert {variant.visible for variant in variants} == set(range(8))  # up to 0.3 of 24 tokens
    first = task.draw(variants[0], 0)
    assert first is task.draw(variants[-1], 1)
    assert first.latents.shape == (2, 4, 3, 8, 12)
    assert task.samples(variants[0]) == 2
    losses = task.loss(variants[0], first)
    losses["loss"].backward()
    assert all(p.grad is not None for p in task.model.image_decoder.parameters())


@pytest.mark.parametrize("count", [1, 3, 10, 25, 30])
def test_what_is_timed_has_the_mean_of_training(count: int) -> None:
    """Few numbers of revealed tokens, each as often as the others, and called twice before."""
    task = GivenTask(DatasetTransformerRecipe(), open_model(PICTURES, AskedTraining(), CPU), CPU)
    numbers, shares = task.counts(1024)
    variants = [Variant((64, 64), number) for number in numbers]
    timed = choose_variants(variants, shares, count)
    assert len(timed) == count
    often = Counter(timed)
    assert len(often) == min(10, count)
    assert max(often.values()) - min(often.values()) <= 1
    mean = sum(number * share for number, share in zip(numbers, shares, strict=True))
    if count >= 10:
        assert sum(variant.visible or 0 for variant in timed) / count == pytest.approx(mean, rel=0.03)
    for least in (1, 25):
        warm = warm_up_variants(timed, least)
        assert len(warm) >= least
        assert set(warm) == set(timed)
        assert min(Counter(warm).values()) >= 3
        assert len(set(warm[: len(often)])) == len(often)


def test_other_kernels_are_other_work() -> None:
    assert AskedTraining().changed == {}
    changed = AskedTraining(attention="flash", graph=False, mask_levels=8).changed
    assert changed == {"attention": "flash", "no-graph": True, "mask-levels": 8}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"frames": 4}, "frames is 4: expected 4k"),
    ],
)
def test_wrong_settings_are_named(asked: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AskedTraining(**asked)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", PICTURES, "--size", "40x64"], "size is 40x64: expected width and height in multiples of 32"),
        (["--config", "t2i-512-0.6b", "--size", "500x500"], "size is 500x500: expected"),
        (["--config", "t2v-480-0.6b", "t2i-512-0.6b", "--frames", "9"], "t2i-512-0.6b makes pictures: expected 1"),
        (["--config", "nowhere"], "config is 'nowhere': expected one of t2i-512-0.6b"),
        (["--config", PICTURES, CLIPS, "--profile", "trace.json"], "--profile with 2 configurations: expected one"),
    ],
)
def test_wrong_input_is_found_before_the_work(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nova_video.bench.train.measure_training", None)
    assert cli.main(["bench", "train", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("benchmarks").exists()


def test_released_sizes_are_opened_from_shapes() -> None:
    opened = open_model("t2v-480-0.6b", AskedTraining(), torch.device("meta"))
    assert (opened.frames, opened.grid) == (9, (60, 96))
    assert open_model("t2i-512-0.6b", AskedTraining(size=(256, 512)), torch.device("meta")).grid == (32, 64)
    assert set(BATCHES) == set(SIZES)


def test_the_optimizer_is_that_of_the_recipes() -> None:
    recipe = load_recipe(ROOT / "recipes" / "paper-512.toml")
    assert recipe.optimizer == OPTIMIZER


def test_rows_replace_their_kind(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    for one in (row(seconds=0.2), row(checkpointing=True), row(seconds=0.15), row(processes=2, strategy="ddp")):
        record_row(path, one)
    assert [(r.step_seconds, r.checkpointing, r.processes) for r in read_train_rows(path)] == [
        (0.15, False, 1),
        (0.135, True, 1),
        (0.135, False, 2),
    ]
    assert [r.step_seconds for r in usual_rows(read_train_rows(path))] == [0.15]


def test_recorded_rows_can_be_made_again() -> None:
    """Each row's command is one that `nova` understands, of that row."""
    for measured in read_train_rows(ROOT / "benchmarks" / "results" / "train.json"):
        words = measured.command.split()
        args = parse(words[words.index("bench") :])
        assert isinstance(args, BenchTrain)
        assert args.config == (measured.config,)
        assert (args.batch or BATCHES[measured.config]) == measured.batch
        assert measured.device
        assert measured.versions


def test_commands_that_record_are_understood() -> None:
    """record_train.sh, with an echo in place of `nova`."""
    environment = os.environ | {"NOVA": "echo"}
    command = ["sh", str(ROOT / "benchmarks" / "record_train.sh"), "rows.json"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    asked = [parse(line.split()) for line in run.stdout.splitlines()]
    assert all(isinstance(args, BenchTrain) for args in asked)
    assert {config for args in asked for config in args.config} == set(SIZES)
    assert {args.output for args in asked} == {Path("rows.json")}


def test_rows_in_words_and_tables() -> None:
    assert train_line(row()).startswith("t2i-512-0.6b, batch 16, bf16: 0.135 s a step (0.13 to 0.14)")
    assert "MFU 45%" in train_line(row())
    assert train_line(row(error="out of memory")).endswith("failed: out of memory")
    table = train_table(
        [row("t2v-480-0.6b", 3, 0.225), row(), row(batch=4), row(strategy="fsdp", processes=2), row(error="no")]
    )
    lines = table.splitlines()
    assert lines[0] == "NVIDIA H200:"
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| t2i-512-0.6b"] * 3 + ["| t2v-480-0.6b"]
    assert "| 0.27 (32) | **0.135** | 0.13 to 0.14 | 2 |" in lines[5]
    assert "2 x fsdp | - | **0.135**" in lines[6]
    assert lines[7].split(" | ")[6] == "2"
    assert train_table([row(error="no")]) == EMPTY


# On a GPU -------------------------------------------------------------------------------------------------------------

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What is logged, such as why steps are not recorded."""
    caplog.set_level(logging.INFO, logger="nova_video")
    return caplog


@gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_a_gpu(checkpointing: bool, said: pytest.LogCaptureFixture) -> None:
    asked = AskedTraining(batch=2, checkpointing=checkpointing, compile=False, warm_up=2, steps=3)
    found = measure_training(PICTURES, asked, "")
    assert found.error is None, found.error
    assert found.finite, train_line(found)
    assert found.precision == "bf16"
    assert found.cuda_graph, said.text
    assert found.peak_memory_gb is not None
    assert 0 < found.peak_memory_gb < 2
