"""Batches on a local Ray: they go on after kill -9, to the bytes that one process makes without Ray."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray"),
]
FLAGS = ("--frames", "1", "--sets", "8", "--diffusion-steps", "4", "--seed", "1", "--threads", "1")


def test_a_killed_batch_goes_on_to_the_bytes_without_ray(tiny_checkpoint: Path, tmp_path: Path) -> None:
    lines = [{"prompt": "a whale moving left"}, {"prompt": "the red apple", "sets": 4}, {"prompt": "the whale"}]
    lines += [{"prompt": "a whale", "image": "broken.png"}, {"prompt": "the apple", "num_images_per_prompt": 16}]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    nova = [sys.executable, "-m", "nova_video", "generate", "--prompts", "many.jsonl", "--model", str(tiny_checkpoint)]

    def content(name: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.name[0] != "."}

    here = subprocess.run([*nova, "-o", "here", *FLAGS], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert here.returncode == 1
    on_ray = [*nova, "-o", "there", "--engine", "ray", "--workers", "2", *FLAGS]
    with subprocess.Popen(
        on_ray, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    ) as first:
        assert first.stdout is not None
        made = [first.stdout.readline() for _ in range(3)]
        os.killpg(first.pid, signal.SIGKILL)
    assert all(made)
    begun = len((tmp_path / "there" / "index.jsonl").read_bytes().splitlines())
    assert 3 <= begun < 20
    for _ in range(50):
        again = subprocess.run(on_ray, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        if "another process is writing there" not in again.stderr:
            break
        time.sleep(0.1)
    assert again.returncode == 1
    assert "line 4: cannot read the image broken.png" in again.stderr
    assert 0 < len(again.stdout.splitlines()) <= 20 - begun + 1
    assert content("there") == content("here")
