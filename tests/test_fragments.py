"""Fragments: they play from any one on, hold the right pictures at their times, and have the same bytes each time."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from nova_video.common.errors import InputError
from nova_video.io import media
from nova_video.io.fragments import FragmentEncoder, boxes, join_fragments

RECORD = {"prompt": 'a "café" — whale\n', "seed": 7}
PARTS = ((0, 1), (1, 5), (5, 9), (9, 13))  # a latent frame each: of one pixel frame, then of four


def clip() -> media.Frames:
    """Returns a red square that crosses a blue background."""
    pixels = np.empty((13, 64, 96, 3), dtype=np.uint8)
    pixels[:] = (50, 100, 230)
    for index in range(13):
        pixels[index, 16:40, 4 * index : 4 * index + 24] = (220, 40, 40)
    return pixels


def encoder(fps: float = 12) -> FragmentEncoder:
    return FragmentEncoder((64, 96), fps, RECORD)


def fragments(fps: float = 12) -> list[bytes]:
    made = encoder(fps)
    return [made.encode(clip()[first:last], first) for first, last in PARTS]


def read(data: bytes) -> tuple[media.Frames, list[float]]:
    """Returns the frames of an mp4 and the seconds at which they are shown."""
    with av.open(io.BytesIO(data)) as container:
        shown = [(frame.to_ndarray(format="rgb24"), float(frame.time or 0)) for frame in container.decode(video=0)]
    return np.stack([frame for frame, _ in shown]), [time for _, time in shown]


def error(frames: media.Frames, expected: media.Frames) -> float:
    return float(np.abs(frames.astype(int) - expected).mean())


@pytest.mark.parametrize("fps", [8, 12, 23.976, 60])
def test_fragments_play_from_any_one_on(fps: float) -> None:
    parts = fragments(fps)
    for begin, (first, _) in enumerate(PARTS):
        frames, times = read(encoder(fps).init + b"".join(parts[begin:]))
        assert len(frames) == 13 - first
        assert error(frames, clip()[first:]) < 6
        assert times == pytest.approx([index / fps for index in range(first, 13)], abs=1e-3)


def test_each_fragment_begins_with_a_keyframe_and_holds_no_more_than_its_frames() -> None:
    for part, (first, last) in zip(fragments(), PARTS, strict=True):
        assert [name for name, _ in boxes(part)] == ["moof", "mdat"]
        assert b"x264" not in part
        with av.open(io.BytesIO(encoder().init + part)) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
        assert [packet.is_keyframe for packet in packets] == [True] + [False] * (last - first - 1)
        assert [packet.pts for packet in packets] == [packet.dts for packet in packets]


def test_a_fragment_has_the_same_bytes_each_time() -> None:
    parts = fragments()
    assert encoder().init == encoder().init
    assert encoder().encode(clip()[5:9], 5) == parts[2], "alone, as after a restart"
    assert encoder().encode(clip()[5:9], 9) != parts[2]


@pytest.mark.parametrize("begin", range(4))
def test_joined_fragments_are_one_plain_file(tmp_path: Path, begin: int) -> None:
    parts = fragments()[begin:]
    path = tmp_path / "clip.mp4"
    path.write_bytes(join_fragments(encoder().init, iter(parts), RECORD))
    assert [name for name, _ in boxes(path.read_bytes())][:2] == ["ftyp", "moov"], "it plays before it is all there"
    assert b"moof" not in path.read_bytes()
    frames, times = read(path.read_bytes())
    assert np.array_equal(frames, read(encoder().init + b"".join(parts))[0])
    assert times == pytest.approx([index / 12 for index in range(len(frames))], abs=1e-3)
    assert media.read_frames(path)[1] == pytest.approx(12)
    assert media.read_metadata(path) == RECORD
    assert join_fragments(encoder().init, parts, RECORD) == path.read_bytes()


def test_the_head_of_a_stream() -> None:
    made = encoder()
    assert [name for name, _ in boxes(made.init)] == ["ftyp", "moov"]
    assert made.mime_type.startswith('video/mp4; codecs="avc1.64')
    with av.open(io.BytesIO(made.init + fragments()[0])) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.codec_context.pix_fmt) == (96, 64, "yuv420p")
        assert stream.codec_context.colorspace == stream.codec_context.color_primaries == 1  # BT.709
        assert Fraction(stream.time_base).denominator % 12 == 0


def test_wrong_frames() -> None:
    with pytest.raises(InputError, match="size is 95x64: expected even numbers"):
        FragmentEncoder((64, 95), 12)
    with pytest.raises(InputError, match="a frame is 96x32: expected 96x64"):
        encoder().encode(clip()[:, :32], 0)
    with pytest.raises(InputError, match="expected uint8"):
        encoder().encode(clip()[:0], 0)
