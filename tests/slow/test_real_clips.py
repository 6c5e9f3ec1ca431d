"""Real camera clips through `nova encode`: their shots, sizes and rates; and a run that is killed again and again."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nova_video.cli import main as cli
from nova_video.data.dataset import EncodedSample, list_shards, read_shard
from nova_video.data.encoders import DecodeLatents
from nova_video.data.stages import Decode, DecodedClip, DecodeSettings, Item
from nova_video.io import media
from nova_video.io.fit import fit_frames

pytestmark = pytest.mark.slow

NAMES = {"bikes": "people on bikes", "carphone_pristine": "a man in a car", "bigbuckbunny": "a rabbit. It is rendered."}
SHOTS = (0, 30, 76, 137, 187, 242)  # frames of bikes.mp4 that differ from the one before by over 50 of 255 in the mean


@pytest.fixture
def folder(camera_clips: Path, tmp_path: Path) -> Path:
    """With a caption beside each."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for name, caption in NAMES.items():
        shutil.copy(camera_clips / f"{name}.mp4", folder)
        (folder / f"{name}.txt").write_text(caption)
    return folder


def read_all(output: Path) -> dict[str, EncodedSample]:
    found = (sample for shards in list_shards(output).values() for shard in shards for sample in read_shard(shard.url))
    return {sample.id: sample for sample in found}


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(one.astype(float) - other).mean()))


def test_clips_of_a_camera(folder: Path, tmp_path: Path) -> None:
    """By the bundled model: what is decoded from a row is what the file shows at that time, cropped to its size."""
    output = tmp_path / "dataset"
    words = ["encode", folder, "-o", output, "--no-ray", "--cuts", "--frames", 17, 33]
    assert cli.main([str(word) for word in words]) == 0
    samples = read_all(output)
    assert {name: sample.bucket.name for name, sample in samples.items()} == {
        "bikes.mp4#0": "17x96x192",
        "bikes.mp4#1": "17x96x192",
        "carphone_pristine.mp4#0": "17x96x160",
        "bigbuckbunny.mp4#0": "33x96x160",
    }
    decode = DecodeLatents("emoji")
    for sample in samples.values():
        frames, fps = media.read_frames(folder / sample.source)
        moments = sample.start + np.arange(sample.bucket.frames) / sample.fps
        shown = frames[np.ceil(moments * fps - 0.5).astype(int).clip(0, len(frames) - 1)]
        if sample.source.startswith("carphone"):  # 193x144 of square pixels
            shown = np.stack([np.asarray(Image.fromarray(frame).resize((193, 144))) for frame in shown])
        shown = fit_frames(shown, (sample.bucket.height, sample.bucket.width))
        assert psnr(decode(sample.moments), shown) > 18  # an autoencoder of emoji, on a camera's pictures
        assert 0.2 < sample.motion < 10
        assert sample.end - sample.start == pytest.approx(sample.bucket.frames / 8, abs=1e-5)
    assert samples["bigbuckbunny.mp4#0"].text_short is not None
    assert samples["bikes.mp4#0"].text_short is None


def test_shots(folder: Path) -> None:
    """Clips start where shots do, and none goes over a cut."""
    item = Item("bikes.mp4", "a", str(folder / "bikes.mp4"))
    decode = Decode(DecodeSettings((5,), 25.0, (64, 128), one_size=True, cuts=True))
    found = [clip for clip in decode(item) if isinstance(clip, DecodedClip)]
    starts = {round(25 * clip.start) for clip in found}
    assert set(SHOTS) <= starts
    for clip in found:
        first, last = round(25 * clip.start), round(25 * clip.end)
        assert not any(first < shot < last for shot in SHOTS), (first, last)


def test_killed_again_and_again(folder: Path, tmp_path: Path) -> None:
    """kill -9 a moment after a group is finished, three times: the dataset is that of a run that was let be."""
    for number in range(9):
        shutil.copy(folder / "carphone_pristine.mp4", folder / f"copy-{number:02d}.mp4")
        (folder / f"copy-{number:02d}.txt").write_text(f"number {number}")
    command = [sys.executable, "-m", "nova_video", "encode", str(folder), "--no-ray", "--group", "2", "--frames", "5"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "-o", str(tmp_path / "whole")], check=True, env=environment, capture_output=True)
    output = tmp_path / "killed"
    draw = random.Random(0)
    for finished in (1, 2, 4):
        process = subprocess.Popen([*command, "-o", str(output)], env=environment, stderr=subprocess.DEVNULL)
        while len(list(output.glob("progress/0*.json"))) < finished:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in output.glob("progress/0*.json")}
    subprocess.run([*command, "-o", str(output)], check=True, env=environment, capture_output=True)
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())  # not done again
    expected = {
        path.relative_to(tmp_path / "whole"): path for path in (tmp_path / "whole").rglob("*") if path.is_file()
    }
    found = {path.relative_to(tmp_path / "killed"): path for path in (tmp_path / "killed").rglob("*") if path.is_file()}
    assert found.keys() == expected.keys()
    for name, path in expected.items():
        if name.name not in ("README.md", "sheet.png"):  # they tell the folder's name
            assert found[name].read_bytes() == path.read_bytes(), name
