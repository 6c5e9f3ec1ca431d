"""A newcomer's first hour: every command of the README, in its order, on a clean clone, in the environment that its
own steps make; and the demo's clip shows what its sentence says."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from test_docs_commands import ROOT, blocks

from nova_video.io import media

GREEN = np.array([50, 170, 80])
LIMIT = 60  # seconds of the demo, without the installation, on two cores
HOUR = 3600
BLOCKS = [block for block in blocks(ROOT / "README.md") if block.why is None]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(HOUR)]


@dataclass(frozen=True)
class Walk:
    """What became of the commands, as one shell ran them."""

    clone: Path
    finished: list[int]
    """Lines of the README whose blocks came to their end."""
    demo_seconds: float
    report: str
    """The end of what was printed."""


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    folder = tmp_path_factory.mktemp("walk")
    clone = folder / "nova-video"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.split("\0"):
        if name and (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, clone / name)
    script = ["set -euo pipefail"]
    for block in BLOCKS:
        text = block.text if block.kind == "bash" else f"python - <<'END'\n{block.text}END\n"
        script.append(f"{text}echo finished {block.line}")
    script[2:2] = ["touch .venv/.demo; date +'before %s.%N'; make demo; date +'after %s.%N'"]  # once more, installed
    names = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
    environment = {key: value for key, value in os.environ.items() if key not in names} | {"HF_HUB_OFFLINE": "1"}
    log = folder / "log.txt"
    try:
        with log.open("w") as file:
            command = ["bash", "-c", "\n".join(script)]
            subprocess.run(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=HOUR)
        printed = log.read_text()
        times = dict(re.findall(r"^(before|after) (\d+\.\d+)$", printed, re.M))
        yield Walk(
            clone,
            [int(line) for line in re.findall(r"^finished (\d+)$", printed, re.M)],
            float(times.get("after", "inf")) - float(times.get("before", 0)),
            printed[-4000:],
        )
    finally:
        shutil.rmtree(clone / ".venv", ignore_errors=True)  # gigabytes


def test_every_command_works_in_order(walk: Walk) -> None:
    assert walk.finished == [block.line for block in BLOCKS], walk.report
    made = ("demo.mp4", "sunflower.mp4", "apple.png", "two-1.webp", "two-2.webp", "from-image.mp4", "runs/tiny/model")
    assert [name for name in made if not (walk.clone / name).exists()] == []


def test_readme_installs_trains_and_samples() -> None:
    text = "".join(block.text for block in BLOCKS)
    for command in ("make demo", "nova generate", "pip install", "nova data", "nova train", "NovaPipeline"):
        assert command in text


def test_demo_takes_less_than_a_minute(walk: Walk) -> None:
    assert walk.demo_seconds < LIMIT


def test_demo_shows_what_its_sentence_says(walk: Walk) -> None:
    record = media.read_metadata(walk.clone / "demo.mp4")
    assert (record["prompt"], record["model"]) == ("a panda growing on a green background", "emoji")
    assert "warnings" not in record
    frames, fps = media.read_frames(walk.clone / "demo.mp4")  # (F, H, W, 3)
    assert (frames.shape, fps) == ((17, 128, 128, 3), 8)
    border = np.concatenate([frames[:, :4].reshape(-1, 3), frames[:, -4:].reshape(-1, 3)])
    assert np.abs(np.median(border, axis=0) - GREEN).max() < 12  # green, as named in the emoji world
    thing = np.abs(frames.astype(int) - GREEN).max(axis=-1) > 60  # (F, H, W)
    share = thing.mean(axis=(1, 2))
    assert 0.03 < share[0] < share[-1] < 0.7
    assert share[-1] > 1.5 * share[0]  # it grew
