"""The properties of tests/test_sidecars.py with more drawn inputs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_two_thousand_inputs_each() -> None:
    path = Path(__file__).parents[1] / "test_sidecars.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    run = subprocess.run(command, env=os.environ | {"DRAWN_INPUTS": "2000"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
