"""Readiness, measures, and checks of uploads by their headers."""

import io
import struct
import time
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from nova_video.common.errors import InputError
from nova_video.serving.readiness import Readiness
from nova_video.serving.serve_settings import ServeSettings
from nova_video.serving.uploads import check_upload

SETTINGS = ServeSettings(max_pixels=10_000, max_frames=8)


def picture(kind: str = "PNG", size: tuple[int, int] = (8, 8), frames: int = 1) -> bytes:
    made = io.BytesIO()
    pages = [Image.new("RGB", size, (number, 0, 0)) for number in range(frames)]
    pages[0].save(made, kind, **({"save_all": True, "append_images": pages[1:]} if frames > 1 else {}))
    return made.getvalue()


def clip(tmp_path: Path, size: tuple[int, int], frames: int) -> bytes:
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((size[1], size[0], 3), np.uint8))))
        container.mux(stream.encode())
    return path.read_bytes()


def png_bomb(side: int) -> bytes:
    """A png that says it has side x side pixels, in some hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def test_pictures_and_clips_within_the_bounds_are_taken(tmp_path: Path) -> None:
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        check_upload("image", picture(kind), SETTINGS, still=True)
    check_upload("video", clip(tmp_path, (64, 48), 8), SETTINGS)
    check_upload("video", picture("GIF", frames=8), SETTINGS)


@pytest.mark.parametrize(
    ("data", "still", "said"),
    [
        (b"", True, "image is empty"),
        (b"hello", True, "image is damaged, or of no known format"),
        (picture()[:40], True, "image "),
        (picture(size=(200, 51)), True, "10200|200x51 pixels"),
        (png_bomb(60_000), True, "60000x60000 pixels: expected at most"),
        (picture("GIF", frames=2), True, "image has 2 frames: expected a picture of one"),
        (picture("GIF", frames=9), False, "image has 9 frames: expected at most 8"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", True, "image "),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", False, "image "),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", False, "image "),
    ],
)
def test_what_is_too_large_or_no_picture_is_refused_before_it_is_decoded(data: bytes, still: bool, said: str) -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match=said) as caught:
        check_upload("image", data, SETTINGS, still)
    assert time.monotonic() - began < 0.5
    assert "\n" not in str(caught.value)
    assert "NOVA_MAX_PIXELS" not in str(caught.value)


def test_clips_beyond_the_bounds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="video has 9 frames: expected at most 8"):
        check_upload("video", clip(tmp_path, (64, 48), 9), SETTINGS)
    with pytest.raises(InputError, match="video has 160x120 pixels: expected at most 10,000 in a frame"):
        check_upload("video", clip(tmp_path, (160, 120), 2), SETTINGS)


def test_readiness_tells_the_first_reason_and_closing_is_the_end() -> None:
    broken = [False]

    def check_database() -> str | None:
        if broken[0]:
            raise OSError("the disk is gone")
        return None

    readiness = Readiness({"worker": lambda: None, "database": check_database})
    assert readiness.problem() == "the server is starting"
    readiness.enter("ready")
    assert readiness.problem() is None
    broken[0] = True
    assert readiness.problem() == "database: OSError: the disk is gone"
    readiness.enter("shutting down")
    readiness.enter("ready")
    assert readiness.is_closing
    assert readiness.problem() == "the server is shutting down"
