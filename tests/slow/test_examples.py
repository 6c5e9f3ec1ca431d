"""The examples that are programs run as they are, in a folder of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("own_head", []),
        ("own_guidance", ["interval.png"]),
        ("own_order", ["halton.png", "randomorder.png", "raster.png"]),
    ],
)
def test_an_example_runs(name: str, files: list[str], tmp_path: Path) -> None:
    subprocess.run([sys.executable, EXAMPLES / f"{name}.py"], cwd=tmp_path, check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == files
