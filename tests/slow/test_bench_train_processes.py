"""Timing training in several processes: all take part, one prints and writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import CONFORMANCE

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_make_one_row(strategy: str, tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    work = ["--config", str(CONFORMANCE / "text-to-video"), "--frames", "9", "--batch", "2", "--strategy", strategy]
    launch = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "nova_video", "bench", "train"]
    command = [*launch, *work, "--warm-up", "1", "--steps", "2", "--device", "cpu", "--output", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads(path.read_text())
    assert [json.loads(line) for line in done.stdout.splitlines()] == [row]
    assert (row["processes"], row["strategy"], row["batch"], row["error"]) == (2, strategy, 2, None)
    assert row["samples_per_second"] == pytest.approx(4 / row["step_seconds"], rel=1e-3)
    assert 0.5 < row["loss"] < 2
    assert row["command"].startswith("torchrun --nproc-per-node 2 -m nova_video bench train --config")
