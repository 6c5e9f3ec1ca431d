"""`make demo`: a minute at most once installed, and the video shows what the sentence says."""

import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from nova_video import media

ROOT = Path(__file__).parents[2]
BLUE = np.array([50, 100, 230])
LIMIT = 60  # seconds, on two cores

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def demo() -> Path:
    """demo.mp4, made as a user makes it, without the installation."""
    if not (ROOT / ".venv" / "bin" / "nova").exists():
        pytest.skip("make demo needs the environment in .venv, which make test-slow sets up")
    (ROOT / "demo.mp4").unlink(missing_ok=True)
    start = time.monotonic()
    command = ["make", "--silent", "--old-file=.venv/.demo", "demo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("demo.mp4")
    assert seconds < LIMIT
    return ROOT / "demo.mp4"


def test_sentence_is_in_the_file(demo: Path) -> None:
    record = media.read_metadata(demo)
    assert record["prompt"] == "a whale moving left on a blue background"
    assert record["model"] == "emoji"


def test_video_shows_what_the_sentence_says(demo: Path) -> None:
    frames, fps = media.read_frames(demo)  # (F, H, W, 3)
    assert frames.shape == (17, 128, 128, 3)
    assert fps == 8
    border = np.concatenate([frames[:, :4].reshape(-1, 3), frames[:, -4:].reshape(-1, 3)])
    assert np.abs(np.median(border, axis=0) - BLUE).max() < 12  # blue, as named in the emoji world
    thing = np.abs(frames.astype(int) - BLUE).max(axis=-1) > 60  # (F, H, W)
    share = thing.mean(axis=(1, 2))
    assert 0.03 < share.min() < share.max() < 0.7  # one object, there all the time
    columns = np.array([np.nonzero(frame)[1].mean() for frame in thing])
    assert columns[-1] < columns[0] - 8  # it went left
    assert (np.diff(columns) < 1).all()  # all the way
