"""`nova serve` as a process: it ends in order, its jobs go on at the next start, and faults are said in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nova_video.bench.server_client import own_server

FIELDS = {"prompt": "a whale moving left", "seed": 1, "num_frames": 21, "sets": 6, "diffusion_steps": 4}

pytestmark = pytest.mark.slow


def test_sigterm_saves_what_runs_and_the_next_start_goes_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    flags = ["--model", str(tiny_checkpoint), "--log-json"]
    log = tmp_path / "log.jsonl"
    with own_server(flags, str(tmp_path / "one"), str(log)) as server:
        job = server.client.create_video(FIELDS)
        while server.client.ask("GET", f"/v1/videos/{job['id']}")["frames_done"] < 5:
            time.sleep(0.02)
        began = time.monotonic()
        assert server.end(signal.SIGTERM) == 0
        assert time.monotonic() - began < 15
    with own_server(flags, str(tmp_path / "one"), str(log)) as server:
        assert server.client.wait(job["id"])["status"] == "completed"
        stopped = server.client.read("GET", f"/v1/videos/{job['id']}/content")
        assert b"nova_jobs_ended_total" in server.client.read("GET", "/metrics")
    with own_server([*flags, "--warm"], str(tmp_path / "other"), str(log)) as server:
        whole = server.client.wait(server.client.create_video(FIELDS)["id"])
        assert server.client.read("GET", f"/v1/videos/{whole['id']}/content") == stopped
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    assert [line["event"] for line in lines].count("shutdown") == 3
    assert not any("whale" in str(line) for line in lines)


def test_a_missing_package_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "fastapi.py").write_text("raise ModuleNotFoundError(\"No module named 'fastapi'\", name='fastapi')\n")
    (tmp_path / "uvicorn.py").write_text("raise ModuleNotFoundError(\"No module named 'uvicorn'\", name='uvicorn')\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "nova_video", "serve", "--port", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("nova: this needs the package ")
    assert "[serve]" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_taken_port_and_a_wrong_flag_are_said_before_the_model_is_loaded(tmp_path: Path) -> None:
    for flags, said in (
        (["--port", "99999"], "port is 99999: expected"),
        (["--cors", "example.org"], "cors is 'example.org': expected origins"),
        (["--api-key", str(tmp_path / "none")], f"{tmp_path / 'none'}: No such file"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid port 8000"),
    ):
        command = [sys.executable, "-m", "nova_video", "serve", "--model", "not-there", *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 2
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
