"""benchmarks/recipes.py, which tries the paper's recipes: on a CPU as a toy."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def test_recipes_are_tried_one_by_one(tmp_path: Path) -> None:
    """One that cannot be read fails alone."""
    recipes, path = ROOT / "recipes", tmp_path / "recipes.json"
    broken = tmp_path / "broken.toml"
    broken.write_text('kind = "transformer"\nstepz = 1\n[dataset]\n')
    asked = [str(recipes / "paper-512.toml"), str(broken), str(recipes / "paper-video-480.toml")]
    command = [sys.executable, str(ROOT / "benchmarks" / "recipes.py"), *asked]
    options = ["--size", "toy", "--steps", "2", "--device", "cpu", "--output", str(path)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr[-2000:]
    pictures, failed, clips = json.loads(path.read_text())["rows"]
    assert "unknown key 'stepz'" in failed["error"]
    for row in (pictures, clips):
        assert len(row["losses"]) == 2
        assert all(math.isfinite(loss) for loss in row["losses"])
        assert (row["batch"], row["precision"], row["skipped_steps"]) == (2, "bf16", 0)
