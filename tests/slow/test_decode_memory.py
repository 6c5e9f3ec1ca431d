"""Twenty seconds of 4K are read within 300 MB above what the process held before it opened the file."""

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

pytestmark = pytest.mark.slow

ROOM = 300  # MB
PEAK = """
import re, sys
import av, numpy, PIL.Image, torch
from nova_video.data.stages import DecodedClip, Decode, DecodeSettings, Item
from nova_video.io.inputs import read_clips

def peak():  # ru_maxrss would begin with that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

before, (_, path, door) = peak(), sys.argv
if door == "encode":
    made = 0
    for clip in Decode(DecodeSettings((33,), 12.0, (480, 768)))(Item("a.mp4", "a", path)):
        assert isinstance(clip, DecodedClip), clip
        made += 1
    assert made == 7
else:
    (clip,) = read_clips(path)
    assert clip.size == (2160, 3840)
    frames = clip.read(12.0, (128, 128))
    assert frames.shape == (240, 128, 128, 3)
print(round(peak() - before))
"""


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """480 frames of 4K in H.264, as phones make them: a square that moves over stripes."""
    path = tmp_path_factory.mktemp("film") / "a.mp4"
    stripes = np.zeros((2160, 3840, 3), np.uint8)
    stripes[:, ::64] = 90
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"preset": "ultrafast", "refs": "4"})
        stream.height, stream.width, stream.pix_fmt = 2160, 3840, "yuv420p"
        for number in range(480):
            pixels = stripes.copy()
            pixels[800:1300, 7 * number : 7 * number + 500] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("door", ["encode", "continue"])
def test_4k_is_streamed(film: Path, door: str) -> None:
    run = subprocess.run([sys.executable, "-c", PEAK, str(film), door], capture_output=True, text=True, check=True)
    assert int(run.stdout) < ROOM
