"""Videos through the one decoder, against known values: time, direction, colour, alpha, and what is refused."""

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from nova_video.common.errors import InputError
from nova_video.data.stages import Decode, DecodedClip, DecodeSettings, Item, Rejected
from nova_video.io.decode import MediaFile
from nova_video.io.media import read_frames
from nova_video.io.timing import repeats, steady_rate

SIZE = (64, 96)
RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)


def write(
    path: Path,
    frames: Any,
    codec: str = "libx264",
    pixels: str = "yuv444p",
    times: list[float] | None = None,
    options: dict[str, str] | None = None,
    source: str = "rgb24",
    **context: Any,
) -> Path:
    """A video of arrays, which are converted by `from_ndarray` or, in the format of the codec itself, not at all."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8, options=options or {})
        stream.height, stream.width = frames[0].shape[:2] if source in ("rgb24", "rgba") else frames[0].shape[1:]
        stream.pix_fmt = pixels
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for number, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format=source)
            for name in ("color_trc", "color_primaries", "colorspace", "color_range"):
                if name in context:
                    setattr(frame, name, context[name])
            if times is not None:
                frame.pts, frame.time_base = round(1000 * times[number]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def grey(values: Any, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.broadcast_to(np.array(values, np.uint8)[:, None, None, None], (len(values), *size, 3)).copy()


def quarters(colours: tuple[Any, ...] = (RED, GREEN, BLUE, BLACK), size: tuple[int, int] = SIZE) -> np.ndarray:
    """One frame whose quarters have four colours: top left, top right, bottom left, bottom right."""
    half = np.array(colours, np.uint8).reshape(2, 2, -1)
    return half.repeat(size[0] // 2, 0).repeat(size[1] // 2, 1)


def corners(frame: np.ndarray) -> np.ndarray:
    height, width = frame.shape[:2]
    rows, columns = [height // 4, height // 4, 3 * height // 4, 3 * height // 4], [width // 4, 3 * width // 4] * 2
    return frame[rows, columns].astype(int)


def encoded(path: Path, size: tuple[int, int] = SIZE) -> DecodedClip | Rejected:
    """What `nova encode` makes of a file, first of all."""
    return next(Decode(DecodeSettings((1, 5), 8.0, size, one_size=True))(Item(path.name, "a", str(path))))


def refused(path: Path) -> str:
    """Why a file is, by every door."""
    with pytest.raises(InputError) as caught:
        read_frames(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    found = encoded(path)
    assert isinstance(found, Rejected)
    assert found.reason.removeprefix("broken: ").removeprefix("it ") in str(caught.value)
    return found.reason


# Time ----------------------------------------------------------------------------------------------------------------


def test_variable_rate_is_timed(tmp_path: Path) -> None:
    """Fast for a second, slow for two: at any rate, a frame shows the brightness of its moment."""
    times = [k / 24 for k in range(24)] + [1 + k / 6 for k in range(13)]
    path = write(tmp_path / "a.mp4", grey([80 * time for time in times]), times=times)
    file = MediaFile(path)
    assert file.fps == pytest.approx(24, rel=0.01)
    for fps in (6, 8, 12):
        shown = file.read(fps).mean((1, 2, 3))
        assert len(shown) == file.count(fps) == pytest.approx(3 * fps + 1, abs=1)
        assert np.abs(shown - 80 * np.arange(len(shown)) / fps).max() <= 80 / 12 + 3  # half of the longest gap


@pytest.mark.parametrize("first", [-0.5, 0.0, 3.0])
def test_time_counts_from_the_first_frame(tmp_path: Path, first: float) -> None:
    """With frames that are coded out of order (B-frames), and stamps that begin below or above nothing."""
    path = write(tmp_path / "a.mkv", grey(range(0, 200, 10)), times=[first + k / 8 for k in range(20)])
    frames, fps = read_frames(path)
    assert fps == pytest.approx(8, rel=0.01)
    assert frames.mean((1, 2, 3)) == pytest.approx(list(range(0, 200, 10)), abs=2)


def test_edit_lists_are_followed(tmp_path: Path) -> None:
    """An mp4 that begins within its frames, as trimmed on a phone: those before are not shown."""
    data = bytearray(write(tmp_path / "a.mp4", grey(range(0, 200, 10)), codec="mjpeg", pixels="yuvj444p").read_bytes())
    start = data.index(b"elst") + 4
    count, duration, begin = struct.unpack(">4xIIi", data[start : start + 16])
    assert count == 1
    scale = struct.unpack(">I", data[data.index(b"mdhd") + 16 : data.index(b"mdhd") + 20])[0]
    struct.pack_into(">Ii", data, start + 8, duration // 2, begin + round(5 / 8 * scale))
    (tmp_path / "b.mp4").write_bytes(data)
    shown = read_frames(tmp_path / "b.mp4")[0].mean((1, 2, 3))
    assert shown == pytest.approx(list(range(50, 150, 10)), abs=2)


def test_frames_that_lack_or_come_twice(tmp_path: Path) -> None:
    """A frame that the camera dropped is stood in for by a neighbour; the others keep their times."""
    times = [k / 8 for k in range(20) if k != 7]
    frames, fps = read_frames(write(tmp_path / "a.mkv", grey([80 * time for time in times]), times=times))
    assert (len(frames), fps) == (20, pytest.approx(8, rel=0.01))
    off = np.abs(frames.mean((1, 2, 3)) - [10 * k for k in range(20)])
    assert off[7] == pytest.approx(10, abs=2)
    assert np.delete(off, 7).max() <= 2


def test_rates() -> None:
    steady = [k / 12 for k in range(50)]
    assert steady_rate(steady, 12) == 12
    assert steady_rate([round(time, 2) for time in steady], 12) == 12
    assert steady_rate(steady, 25) == pytest.approx(12)  # a wrong word of the file
    assert steady_rate([0, 0.1, 0.2, 0.3, 2, 2.1], 3) == pytest.approx(10)
    assert (steady_rate([0], 12), steady_rate([0], 0)) == (12, 0)
    assert repeats([0.08, 0.25, 0.09, 0.16], 0.03) == [1, 3, 1, 2]
    assert repeats([0.01, 0.02], 0.03) == [1, 1]


# Direction -----------------------------------------------------------------------------------------------------------

MATRICES = {  # (a, b, c, d) of the display matrix -> the stored frame of an upright one
    (1, 0, 0, 1): lambda a: a,
    (-1, 0, 0, 1): lambda a: a[:, ::-1],
    (-1, 0, 0, -1): lambda a: a[::-1, ::-1],
    (1, 0, 0, -1): lambda a: a[::-1],
    (0, 1, -1, 0): lambda a: np.rot90(a),  # shown turned clockwise
    (0, -1, 1, 0): lambda a: np.rot90(a, -1),
    (0, 1, 1, 0): lambda a: a.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda a: a[::-1, ::-1].transpose(1, 0, 2),
}


def with_matrix(path: Path, matrix: tuple[float, ...]) -> None:
    a, b, c, d = (round(65536 * value) for value in matrix)
    data = bytearray(path.read_bytes())
    plain = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    start = data.index(plain, data.index(b"tkhd"))
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


@pytest.mark.parametrize("matrix", MATRICES)
def test_all_display_matrices(tmp_path: Path, matrix: tuple[int, ...]) -> None:
    stored = MATRICES[matrix](quarters())
    path = write(tmp_path / "a.mp4", [stored] * 5)
    with_matrix(path, matrix)
    frames = read_frames(path)[0]
    clip = encoded(path)
    assert isinstance(clip, DecodedClip)
    for frame in (frames[0], clip.frames[0]):
        assert frame.shape == (*SIZE, 3)
        assert np.abs(corners(frame) - [RED, GREEN, BLUE, BLACK]).max() <= 6


SLANTED = "turns or shears by other than quarter turns"


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        ((0.7071, 0.7071, -0.7071, 0.7071), SLANTED),
        ((1, 1 / 3, 0, 1), SLANTED),
        ((1, 0, 0, 0), SLANTED),
        ((0, 2, -1, 0), "both turns and stretches"),
    ],
)
def test_slanted_videos_are_refused(tmp_path: Path, matrix: tuple[float, ...], said: str) -> None:
    path = write(tmp_path / "a.mp4", grey([0] * 5))
    with_matrix(path, matrix)
    assert refused(path) == f"has a display matrix that {said}"


@pytest.mark.parametrize(
    ("matrix", "width"), [((2, 0, 0, 1), 192), ((1, 0, 0, 2), 48), ((2, 0, 0, 2), 96), ((0, 0, 0, 0), 96)]
)
def test_matrices_that_stretch(tmp_path: Path, matrix: tuple[float, ...], width: int) -> None:
    """The height stays, as for pixels that are not square. A matrix of zeros says nothing."""
    path = write(tmp_path / "a.mp4", [quarters()] * 5)
    with_matrix(path, matrix)
    frame = read_frames(path)[0][0]
    assert frame.shape == (64, width, 3)
    assert np.abs(corners(frame) - [RED, GREEN, BLUE, BLACK]).max() <= 6


def test_square_pixels(tmp_path: Path) -> None:
    """The height stays, the width is scaled; where a file turns its frame as well, it is turned after."""
    path = write(tmp_path / "a.mp4", [quarters()] * 5, sample_aspect_ratio=Fraction(3, 2))
    frame = read_frames(path)[0][0]
    assert frame.shape == (64, 144, 3)
    assert np.abs(corners(frame) - [RED, GREEN, BLUE, BLACK]).max() <= 6
    with_matrix(path, (0, 1, -1, 0))
    assert MediaFile(path).size == (144, 64)


# Colour --------------------------------------------------------------------------------------------------------------

LIMITED = {  # 8-bit Y, Cb, Cr of full red, by each standard; white is 235 and black 16
    5: (81, 90, 240),
    1: (63, 102, 240),
    9: (74, 97, 240),
}


def planes(colours: tuple[Any, ...], size: tuple[int, int] = SIZE) -> np.ndarray:
    """A frame of yuv444p whose quarters have four colours, (3, H, W)."""
    return quarters(colours, size).transpose(2, 0, 1)


@pytest.mark.parametrize("matrix", LIMITED)
@pytest.mark.parametrize("full", [False, True])
def test_matrices_and_ranges(tmp_path: Path, matrix: int, full: bool) -> None:
    """Red, white, black and grey by BT.601, BT.709 and BT.2020, in limited and full range."""
    y, cb, cr = LIMITED[matrix]
    wide = (round((y - 16) / 219 * 255), round((cb - 128) / 224 * 255 + 128), 255)
    colours = (wide, (255, 128, 128), (0, 128, 128), (128, 128, 128))
    if not full:
        colours = ((y, cb, cr), (235, 128, 128), (16, 128, 128), (126, 128, 128))
    settings = {"colorspace": matrix, "color_range": 2 if full else 1}
    path = write(tmp_path / "a.mkv", [planes(colours)] * 5, "ffv1", source="yuv444p", **settings)
    frame = read_frames(path)[0][0]
    assert np.abs(corners(frame) - [RED, (255, 255, 255), BLACK, (128, 128, 128)]).max() <= 3
    clip = encoded(path)
    assert isinstance(clip, DecodedClip)
    assert np.array_equal(clip.frames[0], frame)


@pytest.mark.parametrize(("size", "matrix"), [((64, 96), 5), ((576, 720), 5), ((720, 1280), 1), ((580, 64), 1)])
def test_unnamed_colours_follow_the_size(tmp_path: Path, size: tuple[int, int], matrix: int) -> None:
    """As players have it: BT.709 from 1280 pixels of width or above 576 of height, BT.601 below."""
    frame = planes((LIMITED[matrix],) * 4, size)
    path = write(tmp_path / "a.mkv", [frame], "ffv1", source="yuv444p")
    assert np.abs(read_frames(path)[0][0, 9, 9].astype(int) - RED).max() <= 3


@pytest.mark.parametrize("codec", ["ffv1", "libx264rgb", "qtrle", "png"])
def test_lossless_colours_pass_bit_for_bit(tmp_path: Path, codec: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (5, *SIZE, 3), dtype=np.uint8)
    pixels = {"ffv1": "bgr0", "libx264rgb": "rgb24", "qtrle": "rgb24", "png": "rgb24"}[codec]
    name = "a.mkv" if codec == "ffv1" else "a.mov"
    path = write(tmp_path / name, noise, codec, pixels, options={"crf": "0"} if codec == "libx264rgb" else None)
    frames = read_frames(path)[0]
    clip = encoded(path)
    assert np.array_equal(frames, noise)
    assert isinstance(clip, DecodedClip)
    assert np.array_equal(clip.frames, noise)


def test_ten_bits(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", grey([0, 60, 120, 180, 255]), "ffv1", "yuv444p10le")
    assert read_frames(path)[0][:, 9, 9, 1] == pytest.approx([0, 60, 120, 180, 255], abs=1)


def pq(nits: Any) -> np.ndarray:
    power = (np.asarray(nits) / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg(nits: Any) -> np.ndarray:
    """Codes that a display of 1000 nits shows so, of greys."""
    scene = (np.asarray(nits) / 1000) ** (1 / 1.2)
    log = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), log)


@pytest.mark.parametrize(("transfer", "curve"), [(16, pq), (18, hlg)])
def test_hdr_becomes_sdr(tmp_path: Path, transfer: int, curve: Any) -> None:
    """Greys of PQ and HLG: 203 nits are white, half as much light is 188, more is white too; no cast."""
    codes = np.round(255 * curve([203.0, 101.5, 0.0, 1000.0]))
    frame = quarters(tuple((code, code, code) for code in codes))
    settings = {"colorspace": 9, "color_trc": transfer, "color_primaries": 9, "color_range": 1}
    path = write(tmp_path / "a.mkv", [frame] * 5, "ffv1", "yuv444p10le", **settings)
    expected = [(255,) * 3, (188,) * 3, (0,) * 3, (255,) * 3]
    clip = encoded(path)
    assert isinstance(clip, DecodedClip)
    for got in (read_frames(path)[0][0], clip.frames[0], MediaFile(path).read(8, (32, 48))[0]):
        assert np.abs(corners(got) - expected).max() <= 6  # a step of 8-bit PQ there


def test_wide_gamuts_become_srgb(tmp_path: Path) -> None:
    """SDR of BT.2020: its white stays, and its red is beyond sRGB's."""
    settings = {"colorspace": 9, "color_trc": 14, "color_primaries": 9, "color_range": 1}
    colours = ((235, 128, 128), (126, 128, 128), LIMITED[9], (16, 128, 128))
    path = write(tmp_path / "a.mkv", [planes(colours)] * 5, "ffv1", source="yuv444p", **settings)
    frame = corners(read_frames(path)[0][0])
    assert np.abs(frame - [(255,) * 3, (128,) * 3, RED, BLACK]).max() <= 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"color_trc": 9}, "has the transfer function log100: expected SDR, PQ (smpte2084) or HLG (arib-std-b67)"),
        ({"color_primaries": 10}, "has the colour primaries smpte428: expected BT.709, BT.601, BT.2020 or P3"),
        ({"colorspace": 14}, "has the colour matrix ictcp: expected BT.709, BT.601, BT.2020 or RGB"),
    ],
)
def test_other_codings_are_refused_by_name(tmp_path: Path, settings: dict[str, int], said: str) -> None:
    path = write(tmp_path / "a.mkv", [planes(((90, 128, 128),) * 4)] * 5, "ffv1", source="yuv444p", **settings)
    assert refused(path) == said


@pytest.mark.parametrize(("profile", "compatible"), [(5, 0), (10, 0), (8, 4), (8, 1)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_dolby_vision_without_another_picture(tmp_path: Path, profile: int, compatible: int, suffix: str) -> None:
    """Profile 5 has colours of its own; what other players can show as HLG or HDR10 is read as that."""
    path = write(tmp_path / f"a{suffix}", grey([90] * 5))
    data = path.read_bytes()
    record = struct.pack(">BBHB", 1, 0, profile << 9 | 5, compatible << 4) + bytes(19)
    if suffix == ".mp4":  # in a box of its own at the end of the index
        start = data.index(b"moov") - 4
        size = struct.unpack(">I", data[start : start + 4])[0]
        box = struct.pack(">I", 32) + b"dvcC" + record
        data = data[:start] + struct.pack(">I", size + 32) + data[start + 4 : start + size] + box + data[start + size :]
    else:  # over the tags' empty room
        start = data.index(b"\xec", 60)
        length = 2 + (data[start + 1] & 0x7F) if data[start + 1] & 0x80 else 60
        mapping = b"\x41\xe7\x84dvcC\x41\xed\x98" + record
        assert length >= len(mapping)
        data = data[: start + 2] + mapping + data[start + 2 + len(mapping) :]
    path.write_bytes(data)
    if compatible:
        assert len(read_frames(path)[0]) == 5
    else:
        assert refused(path) == f"is Dolby Vision of profile {profile}, which has no picture for other players"


# Alpha and fields ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.webm", "libvpx-vp9", "yuva420p"),
        ("a.webm", "libvpx", "yuva420p"),
        ("a.mov", "prores_ks", "yuva444p10le"),
        ("a.mov", "qtrle", "argb"),
        ("a.mov", "png", "rgba"),
        ("a.mkv", "ffv1", "bgra"),
    ],
)
def test_clear_is_white(tmp_path: Path, name: str, codec: str, pixels: str) -> None:
    """What is clear is white, its hidden colour does not show; half clear is half of both."""
    frame = quarters(((200, 0, 0, 255), (200, 0, 0, 0), (0, 0, 0, 128), (0, 90, 0, 255)))
    options = {"auto-alt-ref": "0", "crf": "4", "b": "0"} if "vpx" in codec else None
    path = write(tmp_path / name, [frame] * 5, codec, pixels, source="rgba", options=options)
    clip = encoded(path)
    assert isinstance(clip, DecodedClip)
    for got in (read_frames(path)[0][0], clip.frames[0]):
        assert np.abs(corners(got) - [(200, 0, 0), (255,) * 3, (127,) * 3, (0, 90, 0)]).max() <= 6


def test_combs_are_gone(tmp_path: Path) -> None:
    """A bar that moves between the two fields of a frame: neighbouring lines show it in the same place."""
    frames = np.zeros((6, *SIZE, 3), np.uint8)
    for number, frame in enumerate(frames):
        frame[0::2, 10 * number : 10 * number + 10] = frame[1::2, 10 * number + 5 : 10 * number + 15] = 255
    options = {"flags": "+ildct+ilme", "x264-params": "interlaced=1:tff=1", "crf": "1"}
    path = write(tmp_path / "a.mp4", frames, pixels="yuv420p", options=options)
    shown, fps = read_frames(path)
    assert (shown.shape, fps) == (frames.shape, 8)
    lines = shown[2:-1, 8:-8, :, 0].astype(int)
    assert np.abs(lines[:, 1:] - lines[:, :-1]).mean() < 2
    assert np.abs(np.diff(frames[2:-1, 8:-8, :, 0].astype(int), axis=1)).mean() > 20
    centres = [float((line * np.arange(96)).sum() / line.sum()) for line in lines.mean(1)]
    assert np.diff(centres) == pytest.approx([10, 10], abs=1.5)  # the times of frames are kept
    clip = encoded(path)
    assert isinstance(clip, DecodedClip)
    assert np.array_equal(clip.frames, shown[:5])


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cover", [False, True])
def test_sound_alone(tmp_path: Path, cover: bool) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        picture = add_cover(container) if cover else None
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 8000
        packets = [*stream.encode(sound), *stream.encode()]
        container.mux([picture, *packets] if picture is not None else packets)
    assert refused(tmp_path / "a.mp4") == "has no video stream"


def add_cover(container: av.container.OutputContainer) -> av.Packet:
    """A red picture that comes with a film or with music, as the next stream of its file."""
    cover = container.add_stream("mjpeg", rate=1)
    cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
    cover.disposition = av.stream.Disposition.attached_pic
    red = av.VideoFrame.from_ndarray(np.full((32, 32, 3), RED, np.uint8), format="rgb24")
    return [*cover.encode(red), *cover.encode()][0]


def test_a_cover_before_the_film(tmp_path: Path) -> None:
    film = write(tmp_path / "film.mp4", grey(range(0, 200, 10)))
    with av.open(str(film)) as source, av.open(str(tmp_path / "a.mp4"), "w") as container:
        picture = add_cover(container)
        stream = container.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        for packet in packets:
            packet.stream = stream
        container.mux([picture, *packets])
    data = (tmp_path / "a.mp4").read_bytes()
    start, place = data.index(b"moov") + 4, data.index(b"udta") - 4
    (tmp_path / "a.mp4").write_bytes(data[:start] + data[place:] + data[start:place])  # the cover first, as by a tagger
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert [stream.width for stream in container.streams.video] == [32, 96]
    assert np.array_equal(read_frames(tmp_path / "a.mp4")[0], read_frames(film)[0])
    assert isinstance(encoded(tmp_path / "a.mp4"), DecodedClip)


@pytest.mark.parametrize("name", ["a.h264", "a.hevc"])
def test_raw_streams_have_no_times(tmp_path: Path, name: str) -> None:
    """Their frames come one after the other at the rate of the stream."""
    path = write(tmp_path / name, grey(range(0, 200, 10)), {"a.hevc": "libx265"}.get(name, "libx264"))
    file = MediaFile(path)
    assert file.count() == 20
    assert file.read()[:, 32, 48, 0].astype(int) == pytest.approx(np.arange(0, 200, 10), abs=4)
    assert isinstance(encoded(path), DecodedClip)


def test_frames_that_change(tmp_path: Path) -> None:
    """Of size, or of the shape of their pixels."""
    whole = write(tmp_path / "a.ts", grey([9] * 9, (64, 128)), "mpeg2video", "yuv420p").read_bytes()
    for changed, said in [
        ({"frames": grey([9] * 9)}, "its frames change size, from 128x64 to 96x64"),
        ({"frames": grey([9] * 9, (64, 128)), "sample_aspect_ratio": Fraction(2)}, "its pixels change shape, from 1:1"),
    ]:
        other = write(tmp_path / "b.ts", codec="mpeg2video", pixels="yuv420p", **changed).read_bytes()
        (tmp_path / "both.ts").write_bytes(whole + other)
        with pytest.raises(InputError) as caught:
            read_frames(tmp_path / "both.ts")
        assert said in str(caught.value)
        *_, last = Decode(DecodeSettings((5,), 8.0, SIZE))(Item("both.ts", "a", str(tmp_path / "both.ts")))
        assert isinstance(last, Rejected)
        assert last.reason.startswith(said)


def test_files_that_break_off(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, *SIZE, 3), np.uint8)
    data = write(tmp_path / "a.mkv", noise).read_bytes()
    (tmp_path / "half.mkv").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"half.mkv: breaks off: has \d.\d+ of the 5.00 seconds that it tells$"):
        read_frames(tmp_path / "half.mkv")
    (tmp_path / "start.mp4").write_bytes(write(tmp_path / "a.mp4", noise).read_bytes()[:2000])
    assert refused(tmp_path / "start.mp4") == "broken: it is damaged, or of no known format"
    (tmp_path / "none.mp4").write_bytes(b"")
    assert refused(tmp_path / "none.mp4") == "broken: it is empty"


def test_encrypted(tmp_path: Path) -> None:
    data = write(tmp_path / "a.mp4", grey([90] * 5)).read_bytes()
    assert data.count(b"avc1") == 2  # the brand, and the entry of the stream
    start = data.index(b"avc1", data.index(b"stsd"))
    size = struct.unpack(">I", data[data.index(b"moov") - 4 : data.index(b"moov")])[0]
    end = data.index(b"moov") - 4 + size
    whole = struct.pack(">I", size + 8)
    data = data[: data.index(b"moov") - 4] + whole + data[data.index(b"moov") : end] + b"\0\0\0\x08sinf" + data[end:]
    (tmp_path / "a.mp4").write_bytes(data[:start] + b"encv" + data[start + 4 :])
    assert refused(tmp_path / "a.mp4") == "is encrypted"


def test_frames_over_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One frame of a video that is encoded, all of a clip that is held at once; the setting is named."""
    path = write(tmp_path / "a.mp4", grey(range(0, 250, 10)))
    monkeypatch.setenv("NOVA_MAX_PIXELS", str(24 * 64 * 96))
    with pytest.raises(
        InputError, match=r"it has 25 frames of 96x64 pixels: expected at most 147456 in all \(NOVA_MAX"
    ):
        read_frames(path)
    assert MediaFile(path).read(4).shape == (13, *SIZE, 3)
    assert isinstance(encoded(path), DecodedClip)
    monkeypatch.setenv("NOVA_MAX_PIXELS", "6143")
    assert refused(path) == "has frames of 96x64 pixels: expected at most 6143 (NOVA_MAX_PIXELS)"
    for wrong in ("0", "-1", "1e9", "many"):
        monkeypatch.setenv("NOVA_MAX_PIXELS", wrong)
        with pytest.raises(InputError, match="NOVA_MAX_PIXELS is .*: expected a whole number of at least 1"):
            DecodeSettings((5,), 8.0, SIZE)
