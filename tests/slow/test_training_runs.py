"""Training as a user runs it: the five-minute recipe learns new shapes, and a killed run resumes exactly."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nova_video.pipeline.pipeline import NovaPipeline
from nova_video.training.checkpoint import newest_checkpoint
from nova_worlds.evaluation.emoji import EmojiSettings, evaluate_emoji
from nova_worlds.evaluation.world_benchmark import GENERATED
from nova_worlds.rendering.shapes import prepare_shapes
from nova_worlds.rendering.world import EmojiWorld

ROOT = Path(__file__).parents[2]
NOVA = [sys.executable, "-c", "import sys; from nova_video.cli.main import main; sys.exit(main())"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "shapes"
    prepare_shapes(folder)
    return folder


def object_and_background(model: str | Path, world: EmojiWorld) -> tuple[float, float]:
    pipe = NovaPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    rates = evaluate_emoji(pipe, world, EmojiSettings(60, 0, num_frames=1, batch_size=30)).sources[GENERATED].rates
    return rates["object"].value, rates["background"].value


def test_the_tiny_recipe_learns_shapes_it_had_never_seen(shapes: Path, tmp_path: Path) -> None:
    world = EmojiWorld.load(shapes)
    before, _ = object_and_background("emoji", world)
    command = [*NOVA, "train", str(ROOT / "recipes/tiny.toml"), "--data.world", str(shapes)]
    subprocess.run([*command, "--output", str(tmp_path / "tiny")], check=True, timeout=1200)
    after, background = object_and_background(tmp_path / "tiny" / "model", world)
    assert before < 0.4  # it knows no star and no square
    assert after > 0.65
    assert background > 0.9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(number: signal.Signals, shapes: Path, tmp_path: Path) -> None:
    def command(output: str) -> list[str]:
        small = ["--model.arch", "vit_d1w64", "vit_d2w64", "mlp_d1w64", "--init", "", "--data.pool", "32"]
        when = ["--steps", "40", "--log.every", "1", "--log.checkpoint-every", "10", "--log.sample-every", "0"]
        options = ["--data.world", str(shapes), "--output", str(tmp_path / output), "--log.validate-every", "0"]
        return [*NOVA, "train", str(ROOT / "recipes/tiny.toml"), *options, *small, *when]

    subprocess.run(command("whole"), check=True, timeout=300)
    run = subprocess.Popen(command("stopped"))
    checkpoints = tmp_path / "stopped" / "checkpoints"
    deadline = time.monotonic() + 200
    while newest_checkpoint(checkpoints) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(number)
    run.wait(timeout=60)
    assert newest_checkpoint(checkpoints).stem < "step-00000040"
    subprocess.run(command("stopped"), check=True, timeout=300)
    whole, resumed = (load_file(newest_checkpoint(tmp_path / name / "checkpoints")) for name in ("whole", "stopped"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
