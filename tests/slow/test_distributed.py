"""Two or four processes (gloo) train as one does: DDP and FSDP2, and a run goes on with another number of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nova_video.training.checkpoint import newest_checkpoint
from nova_video.training.recipe import (
    DatasetRecipe,
    DatasetTransformerRecipe,
    LogRecipe,
    LoraRecipe,
    OptimizerRecipe,
    recipe_toml,
)
from nova_video.training.trainer import train
from test_dataset_training import CLIPS, PICTURES, write_dataset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 6


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> DatasetTransformerRecipe:
    dataset = write_dataset(tmp_path_factory.mktemp("dataset"), tiny_checkpoint, {CLIPS: 12, PICTURES: 12})
    return DatasetTransformerRecipe(
        steps=STEPS,
        micro_batches=2,
        device="cpu",
        output=str(tmp_path_factory.mktemp("runs") / "one"),
        init=str(tiny_checkpoint),
        scheduler="init",
        dataset=DatasetRecipe(str(dataset), batch=2, image_share=0.3, held_out=0.1, workers=0),
        optimizer=OptimizerRecipe(lr=1e-3, warmup=2, ema=0.9),
        log=LogRecipe(every=1, validate_every=0, checkpoint_every=2, keep=9),
    )


@pytest.fixture(scope="module")
def alone(recipe: DatasetTransformerRecipe) -> DatasetTransformerRecipe:
    train(recipe)
    return recipe


def launch(recipe: DatasetTransformerRecipe, launcher: list[str], machines: int = 1) -> None:
    """By so many launchers, each of which is a machine to the others."""
    path = Path(recipe.output + ".toml")
    path.write_text(recipe_toml(recipe))
    command = [sys.executable, "-m", *launcher, "-m", "nova_video", "train", str(path)]
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    launched = [subprocess.Popen(command, **pipes) for _ in range(machines)]
    for process in launched:
        said = process.communicate(timeout=500)[1]
        assert process.returncode == 0, said[-3000:]


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def of_two_machines() -> list[str]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = f"localhost:{free.getsockname()[1]}"
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", place, "--rdzv-id", "test"]
    return ["torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2", *meet]


def logged(recipe: DatasetTransformerRecipe, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (Path(recipe.output) / "metrics.jsonl").read_text().splitlines()]


def state(recipe: DatasetTransformerRecipe) -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(Path(recipe.output) / "checkpoints")
    assert newest is not None
    assert newest.stem == f"step-{STEPS:08d}"
    return load_file(newest)


def check_same(one: DatasetTransformerRecipe, other: DatasetTransformerRecipe) -> None:
    for name in ("loss", "grad_norm", "loss_time_3"):
        assert logged(other, name) == pytest.approx(logged(one, name), rel=1e-4)
    assert min(logged(one, "loss")) < max(logged(one, "loss"))
    here, there = state(one), state(other)
    assert here.keys() == there.keys()
    for name, value in here.items():
        pair = (value.float(), there[name].float())
        if "attn.qkv.bias" in name and value.dim():  # without the keys': attention is the same under any, so that what
            pair = tuple(torch.cat([one.chunk(3)[0], one.chunk(3)[2]]) for one in pair)  # they learn is rounding
        assert torch.allclose(*pair, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize(
    ("strategy", "how"), [("ddp", {"workers": 2}), ("fsdp", {}), ("fsdp", {"checkpointing": True})], ids=str
)
def test_two_processes_learn_what_one_does(alone: DatasetTransformerRecipe, strategy: str, how: dict[str, Any]) -> None:
    """Readers of their own leave the rows as they are, and checkpointing the gradients."""
    dataset = replace(alone.dataset, workers=how.get("workers", 0))
    output = f"{alone.output}-{strategy}{''.join(how)}"
    two = replace(
        alone, strategy=strategy, dataset=dataset, checkpointing=how.get("checkpointing", False), output=output
    )
    launch(two, TORCHRUN)
    check_same(alone, two)
    assert {p.name for p in (Path(two.output) / "model").iterdir()} >= {"transformer", "vae", "scheduler", "nova.json"}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_add_up_micro_batches(
    recipe: DatasetTransformerRecipe, strategy: str, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    """Two each, of clips alone, whose every step reaches all weights."""
    clips = write_dataset(tmp_path / "clips", tiny_checkpoint, {CLIPS: 16})
    dataset = replace(recipe.dataset, path=str(clips), image_share=None)
    one = replace(recipe, micro_batches=4, dataset=dataset, output=str(tmp_path / "one"))
    train(one)
    two = replace(one, strategy=strategy, output=str(tmp_path / "two"))
    launch(two, TORCHRUN)
    check_same(one, two)


def test_machines_shard_and_reduce_between_them(
    recipe: DatasetTransformerRecipe, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    """Two of two processes each: four halves of the model, and a run that another number goes on with."""
    clips = write_dataset(tmp_path / "clips", tiny_checkpoint, {CLIPS: 16, PICTURES: 16})
    one = replace(
        recipe, micro_batches=4, dataset=replace(recipe.dataset, path=str(clips)), output=str(tmp_path / "one")
    )
    train(one)
    four = replace(one, strategy="fsdp", output=str(tmp_path / "four"))
    launch(four, of_two_machines(), machines=2)
    check_same(one, four)
    assert "(FSDP2 in machines of 2)" in (Path(four.output) / "model" / "README.md").read_text()
    for path in sorted((Path(four.output) / "checkpoints").iterdir())[1:]:
        path.unlink()
    launch(four, TORCHRUN)
    check_same(one, four)


def test_two_processes_train_adapters_as_one_does(recipe: DatasetTransformerRecipe) -> None:
    one = replace(recipe, lora=LoraRecipe(rank=2), output=f"{recipe.output}-lora")
    train(one)
    two = replace(one, strategy="fsdp", output=f"{recipe.output}-lora-fsdp")
    launch(two, TORCHRUN)
    check_same(one, two)
    assert (Path(two.output) / "model" / "pytorch_lora_weights.safetensors").exists()


def test_processes_stop_together_soon(recipe: DatasetTransformerRecipe) -> None:
    """Long before they would log: who started them waits for half a minute."""
    long = replace(recipe, steps=100_000, output=f"{recipe.output}-long")
    long = replace(long, log=replace(recipe.log, every=10_000, checkpoint_every=10_000))
    path = Path(long.output + ".toml")
    path.write_text(recipe_toml(long))
    command = [sys.executable, "-m", *TORCHRUN, "-m", "nova_video", "train", str(path)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for line in run.stdout or ():
        if "samples ready" in line:
            break
    time.sleep(5)
    os.killpg(run.pid, signal.SIGINT)
    said = "".join(run.communicate(timeout=60))
    assert run.returncode
    assert said.count("all saved: the same command goes on") == 1
    newest = newest_checkpoint(Path(long.output) / "checkpoints")
    assert newest is not None
    assert newest.stem < "step-00010000"


def test_a_run_goes_on_with_another_number_of_processes(alone: DatasetTransformerRecipe) -> None:
    """Sharded over two and stopped after step 2, then by one alone."""
    begun = replace(alone, strategy="fsdp", output=f"{alone.output}-begun")
    launch(begun, TORCHRUN)
    for path in sorted((Path(begun.output) / "checkpoints").iterdir())[1:]:
        path.unlink()
    train(begun)
    check_same(alone, begun)
