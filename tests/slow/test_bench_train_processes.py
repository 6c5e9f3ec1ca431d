"""Timing training in several processes: all take part, one prints and writes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import CONFORMANCE

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent


def timed(path: Path, strategy: str, *options: str) -> dict[str, Any]:
    """The row that two processes made, which one of them has printed."""
    work = ["--config", str(CONFORMANCE / "text-to-video"), "--frames", "9", "--batch", "2", "--strategy", strategy]
    launch = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "nova_video", "bench", "train"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launch, *work, *options, "--output", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    assert [json.loads(line) for line in done.stdout.splitlines()] == rows
    assert len(rows) == 1
    return rows[0]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_make_one_row(strategy: str, tmp_path: Path) -> None:
    row = timed(tmp_path / "train.json", strategy, "--warm-up", "1", "--steps", "2", "--device", "cpu")
    assert (row["processes"], row["strategy"], row["batch"], row["error"]) == (2, strategy, 2, None)
    assert row["samples_per_second"] == pytest.approx(4 / row["step_seconds"], rel=1e-3)
    assert 0.5 < row["loss"] < 2
    assert row["command"].startswith("torchrun --nproc-per-node 2 -m nova_video bench train --config")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_gpu_two_processes_record_what_they_exchange(strategy: str, tmp_path: Path) -> None:
    """Steps as CUDA graphs learn what plain ones do, within rounding. Not compiled, which takes most of the time."""
    recorded = timed(tmp_path / "graph.json", strategy, "--steps", "40", "--no-compile")
    plain = timed(tmp_path / "plain.json", strategy, "--steps", "40", "--no-compile", "--no-graph")
    assert (recorded["cuda_graph"], plain["cuda_graph"]) == (True, False)
    assert recorded["loss"] == pytest.approx(plain["loss"], rel=5e-3)
