"""The commands and python of the docs run as they are printed; test_readme_walk.py runs those of the README.

Every ```bash and ```python block of a document is one test, run in the order of the page in a folder of its own that
looks like the clone. A block that cannot run here says so in a comment right above it: <!-- not run in tests: why -->
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ART = ROOT / "data" / "downloads"
BIN = Path(sys.executable).parent  # not resolved: the environment's own folder, with `nova` in it
BLOCK = re.compile(
    r"(?:<!-- not run in tests: (?P<why>[^>]+) -->\n+)?^```(?P<kind>bash|python)\n(?P<text>.*?)^```$", re.M | re.S
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    kind: str
    text: str
    why: str | None
    """Why it is not run."""


def blocks(*pages: Path) -> list[Block]:
    found = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start("text")) + 1
            name = str(page.relative_to(ROOT))
            found.append(Block(name, line, match["kind"], match["text"], match["why"]))
    return found


DOCS = blocks(*sorted((ROOT / "docs").glob("*.md")))


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the clone, so that what the commands write stays out of it."""
    folder = tmp_path_factory.mktemp("clone")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in sorted({line.split("/")[0] for line in tracked.splitlines()}):
        (folder / name).symlink_to(ROOT / name)
    if ART.exists():
        (folder / "data").mkdir()
        (folder / "data" / "downloads").symlink_to(ART)
    return folder


@pytest.mark.parametrize("block", DOCS, ids=lambda block: f"{block.page}:{block.line}")
def test_block_runs(block: Block, clone: Path) -> None:
    if block.why is not None:
        pytest.skip(block.why)
    if re.search(r"data/(downloads|emoji)", block.text) and not ART.exists():
        pytest.skip("the real art is not here: make data fetches it")
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    command = (
        ["bash", "-euo", "pipefail", "-c", block.text] if block.kind == "bash" else [sys.executable, "-c", block.text]
    )
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{block.page}:{block.line}\n{block.text}\n{done.stdout}\n{done.stderr}"


def test_there_are_blocks() -> None:
    run = [block for block in DOCS if block.why is None]
    assert {block.kind for block in run} == {"bash", "python"}
    assert any("nova generate" in block.text for block in run)
    assert any("nova train" in block.text for block in run)
