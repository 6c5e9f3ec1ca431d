"""Stages of encoding without a network: which frames, lengths and sizes a file gives, and what is said against it."""

import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from nova_video.common.errors import InputError
from nova_video.data.stages import (
    MOST_ENLARGED,
    MULTIPLE,
    WIDEST,
    Decode,
    DecodedClip,
    DecodeSettings,
    Item,
    Motion,
    Rejected,
    choose_size,
    cut_lengths,
    size_buckets,
    told_apart,
)
from nova_video.io import media
from nova_video.io.fit import fit_frames
from nova_video.io.motion import flow_magnitude
from nova_video.io.timing import nearest_frames

SIZE = (64, 96)


def settings(**changed: object) -> DecodeSettings:
    values: dict[str, object] = {"frames": (5,), "fps": 8.0, "size": SIZE} | changed
    return DecodeSettings(**values)  # type: ignore[arg-type]


def gray(values: Sequence[float], size: tuple[int, int] = SIZE) -> np.ndarray:
    """Frames (F, H, W, 3), each of one brightness."""
    return np.broadcast_to(np.array(values, np.uint8)[:, None, None, None], (len(values), *size, 3)).copy()


def write(path: Path, frames: np.ndarray, fps: float = 8) -> Item:
    media.write_media(frames, path, fps, {})
    return Item(path.name, "a caption", str(path))


def clips(item: Item, **changed: object) -> list[DecodedClip]:
    found = list(Decode(settings(**changed))(item))
    assert all(isinstance(one, DecodedClip) for one in found), found
    return [one for one in found if isinstance(one, DecodedClip)]


def reason(item: Item, **changed: object) -> str:
    (found,) = Decode(settings(**changed))(item)
    assert isinstance(found, Rejected)
    assert (found.source, found.group, found.index) == (item.source, item.group, item.index)
    return found.reason


def brightness(clip: DecodedClip) -> list[float]:
    return clip.frames.mean((1, 2, 3)).tolist()


# Times ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "fps", "count", "expected"),
    [
        (24, 8, 24, [0, 3, 6, 9, 12, 15, 18, 21]),
        (8, 8, 5, [0, 1, 2, 3, 4]),
        (25, 8, 25, [0, 3, 6, 9, 12, 16, 19, 22]),  # moments 0, 3.125, 6.25, 9.375, 12.5, 15.625, 18.75, 21.875
        (30000 / 1001, 15, 8, [0, 2, 4, 6]),
        (12, 8, 6, [0, 1, 3, 4]),  # of two as near, the earlier
    ],
)
def test_nearest_frames(rate: float, fps: float, count: int, expected: list[int]) -> None:
    """k / fps is what is shown at that moment, for as long as the video lasts."""
    found = list(nearest_frames(((number / rate, number) for number in range(count)), fps, 1 / rate))
    assert [frame for _, frame in found] == expected
    assert [at for at, _ in found] == pytest.approx([k / fps for k in range(len(found))])


def test_nearest_frames_of_uneven_times() -> None:
    """A frame that is shown for longer comes several times; times count from the first."""
    times = [5.0, 5.5, 5.6, 5.7, 6.5]
    found = list(nearest_frames(zip(times, "abcde", strict=True), 4, 0.25))
    assert found == [(5.0, "a"), (5.25, "a"), (5.5, "b"), (5.75, "d"), (6.0, "d"), (6.25, "e"), (6.5, "e")]


@pytest.mark.parametrize(
    ("count", "lengths", "expected"),
    [
        (33, (17, 33), [33]),
        (50, (17, 33), [33, 17]),
        (49, (17, 33), [33]),
        (32, (17, 33), [17]),
        (34, (17,), [17, 17]),
        (16, (17, 33), []),
        (16, (1, 17), [1]),
        (20, (1, 17), [17]),
        (20, (1,), [1]),
        (12, (5, 9), [9]),
        (14, (5, 9), [9, 5]),
    ],
)
def test_longest_lengths_that_fit(count: int, lengths: tuple[int, ...], expected: list[int]) -> None:
    parts = list(cut_lengths(iter(range(count)), lengths))
    assert [len(part) for part in parts] == expected
    assert [number for part in parts for number in part] == list(range(sum(expected)))


# Sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(128, 128), (512, 512), (480, 768), (1024, 1024), (64, 96)])
def test_size_buckets(size: tuple[int, int]) -> None:
    """Sides in multiples, ratios up to WIDEST, areas within what rounding a side to a multiple can change."""
    buckets = size_buckets(size)
    assert size in buckets
    assert {(width, height) for height, width in buckets if (height, width) != size} <= {*buckets}
    for height, width in buckets:
        assert height % MULTIPLE == width % MULTIPLE == 0
        assert max(height, width) <= WIDEST * min(height, width)
        assert abs(height * width - size[0] * size[1]) <= MULTIPLE / 2 * max(height, width)
    assert size_buckets(size, one_size=True) == [size]
    for height, width in buckets:  # the nearest ratio, by brute force
        assert choose_size(3 * height, 3 * width + 1, buckets) == min(
            buckets, key=lambda b: abs(math.log(b[1] / b[0]) - math.log((3 * width + 1) / (3 * height)))
        )


def test_bucket_of_a_source(tmp_path: Path) -> None:
    """As wide as its bucket: nothing is cut off that need not be, and the rest is cut alike from both sides."""
    wide = np.random.default_rng(0).integers(0, 255, (1, 160, 480, 3), np.uint8)
    Image.fromarray(wide[0]).save(tmp_path / "wide.png")
    item = Item("wide.png", "wide", str(tmp_path / "wide.png"))
    (clip,) = clips(item, size=(128, 128))
    assert clip.bucket.name == "1x96x192"
    assert np.array_equal(clip.frames, fit_frames(wide, (96, 192)))
    (clip,) = clips(item, size=(128, 128), one_size=True)
    assert clip.bucket.name == "1x128x128"
    middle = fit_frames(wide[:, :, 160:320], (128, 128))
    assert np.array_equal(clip.frames[:, :, 8:-8], middle[:, :, 8:-8])  # at its sides it knows what is beyond


def test_too_small(tmp_path: Path) -> None:
    item = write(tmp_path / "small.mp4", gray([0] * 5, (50, 76)))
    assert reason(item) == ("is 76x50, too small: it would be enlarged 1.28 times for 96x64, expected at most 1.25")
    item = write(tmp_path / "enough.mp4", gray([0] * 5, (52, 78)))
    assert max(64 / 52, 96 / 78) < MOST_ENLARGED
    assert clips(item)[0].bucket.name == "5x64x96"


# Videos --------------------------------------------------------------------------------------------------------------


def test_rate_and_lengths(tmp_path: Path) -> None:
    """Three times as fast as asked for: each third frame, in clips that follow one another."""
    item = write(tmp_path / "a.mp4", gray(range(0, 250, 5)), 24)  # 50 frames: 17 at 8 a second
    first, second = clips(item, frames=(5, 9))
    assert (first.bucket.name, second.bucket.name) == ("9x64x96", "5x64x96")
    assert brightness(first) == pytest.approx([15 * k for k in range(9)], abs=3)
    assert brightness(second) == pytest.approx([15 * k for k in range(9, 14)], abs=3)
    assert (first.start, first.end, second.start, second.end) == pytest.approx((0, 1.125, 1.125, 1.75))
    assert (first.id, second.id, first.fps, first.caption) == ("a.mp4#0", "a.mp4#1", 8, "a caption")


def test_slower_sources_keep_their_rate(tmp_path: Path) -> None:
    item = write(tmp_path / "slow.mp4", gray(range(0, 200, 20)), 5)
    (clip, _) = clips(item)
    assert clip.fps == 5
    assert brightness(clip) == pytest.approx([0, 20, 40, 60, 80], abs=3)
    assert clip.end == pytest.approx(1)
    assert reason(item, fps=12.0) == "has 5 frames a second: expected at least 6, half of the fps asked for"
    near = write(tmp_path / "near.mp4", gray([0] * 5), 8.05)  # as good as the rate asked for: left alone
    assert clips(near)[0].fps == pytest.approx(8.05, abs=0.01)


def test_cuts(tmp_path: Path) -> None:
    """With cuts, no clip shows two scenes, and clips start where scenes do."""
    pattern = np.random.default_rng(0).integers(0, 255, (2, *SIZE, 3), np.uint8)
    dark, light = np.stack([pattern[0] // 4] * 8), np.stack([255 - pattern[1] // 4] * 11)
    item = write(tmp_path / "two.mp4", np.concatenate([dark, light]))
    assert [clip.start for clip in clips(item)] == pytest.approx([0, 5 / 8, 10 / 8])
    assert max(np.ptp(brightness(clip)) for clip in clips(item)) > 100
    found = clips(item, cuts=True)
    assert [clip.start for clip in found] == pytest.approx([0, 8 / 8, 13 / 8])
    assert max(np.ptp(brightness(clip)) for clip in found) < 10
    assert len(clips(item, cuts=True, threshold=300.0)) == 3  # finds nothing: as without
    assert [clip.start for clip in clips(item, cuts=True, frames=(1,))] == [0, 1]  # a first frame of each scene


def write_raw(path: Path, frames: np.ndarray, **stream_settings: object) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        if "aspect" in stream_settings:
            stream.codec_context.sample_aspect_ratio = stream_settings["aspect"]
        if "rotation" in stream_settings:
            stream.set_display_rotation(stream_settings["rotation"])
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())


def test_scenes_end_where_time_jumps(tmp_path: Path) -> None:
    """Joined recordings start their time again, and lose nothing; a gap is no still picture."""
    times = [0.0, 0.5, 0.0, 0.5, 2.5, 302.5, 303.0]
    scenes = [scene for scene, _ in told_apart((0, (at, number)) for number, at in enumerate(times))]
    assert [count for _, count in Counter(scenes).items()] == [2, 3, 2]
    write_raw(tmp_path / "one.ts", gray(range(0, 250, 10)))
    whole = (tmp_path / "one.ts").read_bytes()
    (tmp_path / "joined.ts").write_bytes(whole + whole)
    (alone, joined) = (clips(Item(name, "a", str(tmp_path / f"{name}.ts"))) for name in ("one", "joined"))
    assert len(alone) == 5
    assert len(joined) >= 9  # where they are joined, a frame may be lost
    assert max(np.ptp(brightness(clip)) for clip in joined) < 60


def test_upright_with_square_pixels(tmp_path: Path) -> None:
    """What a player shows: turned as the file asks, wide where its pixels are."""
    frames = gray([0] * 5, (96, 64))
    frames[:, :48, :32] = 255  # top left
    write_raw(tmp_path / "turned.mp4", frames, rotation=-90)  # clockwise
    (clip,) = clips(Item("t", "t", str(tmp_path / "turned.mp4")))
    assert clip.bucket.name == "5x64x96"
    corner = clip.frames[0, :28, 52:].mean(), clip.frames[0, :28, :44].mean()  # now top right
    assert corner == pytest.approx((255, 0), abs=4)
    write_raw(tmp_path / "wide.mp4", gray([0] * 5, (96, 96)), aspect=Fraction(2))
    (clip,) = clips(Item("w", "w", str(tmp_path / "wide.mp4")), size=(96, 192))
    assert clip.bucket.name == "5x96x192"


def test_motion(tmp_path: Path) -> None:
    """A texture that moves by three pixels a frame scores about three, by the emoji world's measure; a picture 0."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 60), np.uint8))
    texture = np.asarray(noise.resize((240, 96), Image.Resampling.BICUBIC))
    frames = np.stack([np.stack([texture[:, 3 * k : 3 * k + 96]] * 3, -1) for k in range(5)])
    clip = DecodedClip("a", 0, 1, 8, "a", frames)
    assert Motion()(clip).motion == pytest.approx(3, abs=0.3)
    assert Motion()(clip).motion == flow_magnitude(frames)
    assert Motion()(DecodedClip("a", 0, 0, 8, "a", frames[:1])).motion == 0
    assert Motion()(DecodedClip("a", 0, 1, 8, "a", frames[[0] * 5])).motion == pytest.approx(0, abs=0.01)


# Pictures and animations ---------------------------------------------------------------------------------------------


def test_pictures(tmp_path: Path) -> None:
    """White where they are transparent, upright as their EXIF says, and with the fps asked for, as one frame."""
    clear = np.zeros((*SIZE, 4), np.uint8)
    clear[:, 48:] = (200, 0, 0, 255)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    (clip,) = clips(Item("clear.png", "c", str(tmp_path / "clear.png")))
    assert (clip.bucket.name, clip.fps, clip.start, clip.end) == ("1x64x96", 8, 0, 0)
    assert clip.frames[0, 30, 10].tolist() == [255, 255, 255]
    assert clip.frames[0, 30, 80].tolist() == [200, 0, 0]
    ramp = np.linspace(0, 65535, SIZE[1]).astype(np.uint16)
    Image.fromarray(np.stack([ramp] * SIZE[0])).save(tmp_path / "deep.png")
    (clip,) = clips(Item("deep.png", "d", str(tmp_path / "deep.png")))
    assert clip.frames[0, 30, ::95, 0].tolist() == [0, 255]
    assert clip.frames[0, 30, 48, 0] == pytest.approx(129, abs=1)
    for kind, said in ((np.int32, "32 bit"), (np.float32, "floating point")):
        Image.fromarray(np.zeros(SIZE, kind)).save(tmp_path / "deeper.tiff")
        assert f"pixels of {said}: expected 8 or 16 bit" in reason(Item("t", "t", str(tmp_path / "deeper.tiff")))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise
    Image.fromarray(gray([9], (96, 64))[0]).save(tmp_path / "turned.jpg", exif=exif)
    assert clips(Item("turned.jpg", "t", str(tmp_path / "turned.jpg")))[0].bucket.name == "1x64x96"


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animations_are_clips(suffix: str, tmp_path: Path) -> None:
    item = write(tmp_path / f"a{suffix}", gray(range(0, 240, 20)), 10)
    (clip,) = clips(item, fps=5.0)
    assert brightness(clip) == pytest.approx([0, 40, 80, 120, 160], abs=4)


def test_bytes_without_a_name_are_looked_into(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", gray(range(0, 50, 10)))
    Image.fromarray(gray([77])[0]).save(png := io.BytesIO(), "PNG")
    for data, expected in [((tmp_path / "a.mp4").read_bytes(), 5), (png.getvalue(), 1)]:
        (clip,) = clips(Item("00000:00001", "a", data=data))
        assert len(clip.frames) == expected


# What is rejected ----------------------------------------------------------------------------------------------------


def test_rejected(tmp_path: Path) -> None:
    for name, content in [("a.mp4", b"no video"), ("b.png", b"no picture"), ("c.mp4", b""), ("d", b"nothing known")]:
        (tmp_path / name).write_bytes(content)
        found = reason(Item(name, "a", str(tmp_path / name), group="00000-00001", index=3))
        assert found.startswith("broken: ")
        assert str(tmp_path) not in found.replace(f"'{tmp_path}", "")
    assert reason(Item("e.png", "a", str(tmp_path / "e.png"))) == "broken: there is no such file"
    assert reason(Item("f.mp4", "a", str(tmp_path / "f.mp4"))).startswith("broken: ")
    assert reason(write(tmp_path / "g.mp4", gray([1] * 4))) == "has 4 frames at 8 a second: expected at least 5"
    assert reason(Item("i", problem="is said")) == "is said"
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    assert reason(Item("sound.mp4", "a", str(tmp_path / "sound.mp4"))) == "has no video stream"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b" \n", "no caption: it is empty"),
        ("a.txt", b"\xff\xfe\xff", "no caption: a.txt is not a text file in utf-16-le"),
        ("a.json", b"{", "no caption: a.json is not JSON: Expecting"),
        ("a.json", b'{"title": "a"}', "no caption: a.json has title: expected the key caption"),
        ("a.json", b'["a"]', "no caption: a.json is no object: expected the key caption"),
        ("a.json", b'{"caption": 3}', "no caption: caption is the number 3: expected text"),
        ("a.json", None, "no caption: there is no such file"),
    ],
)
def test_rejected_captions(name: str, content: bytes | None, expected: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert reason(Item("a.mp4", url="a.mp4", caption_url=str(tmp_path / name))).startswith(expected)


@pytest.mark.parametrize(
    ("beyond", "expected"),
    [
        (0, "breaks off: has 25 of the 40 frames that it tells, which are kept"),
        (100, "broken: Invalid data found when"),
    ],
)
def test_a_file_that_breaks_off_gives_what_it_has(beyond: int, expected: str, tmp_path: Path) -> None:
    """Between two frames, or within one: clips before the break are kept, and what is lost is said."""
    noise = np.random.default_rng(0).integers(0, 255, (40, *SIZE, 3), np.uint8)
    whole = clips(write(tmp_path / "a.mp4", noise))
    with av.open(str(tmp_path / "a.mp4")) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.pos is not None]
    data = (tmp_path / "a.mp4").read_bytes()  # its index stands at the beginning
    (tmp_path / "half.mp4").write_bytes(data[: places[25] + beyond])
    *kept, last = Decode(settings())(Item("half.mp4", "a", str(tmp_path / "half.mp4")))
    assert len(kept) == (5 if not beyond else 4)  # with an error, the frames under way in the decoder are lost
    for one, other in zip(kept, whole, strict=False):
        assert isinstance(one, DecodedClip)
        assert np.array_equal(one.frames, other.frames)
    assert isinstance(last, Rejected)
    assert last.reason.startswith(expected)


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "libx264"), ("a.webm", "libvpx")])
def test_matroska_that_breaks_off(name: str, codec: str, tmp_path: Path) -> None:
    """It tells seconds, and no number of frames."""
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        (stream.height, stream.width), stream.pix_fmt = SIZE, "yuv420p"
        for pixels in np.random.default_rng(0).integers(0, 255, (40, *SIZE, 3), np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    item = Item(name, "a", str(path))
    whole, data = clips(item), path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    *kept, last = Decode(settings())(item)
    assert 0 < len(kept) < len(whole)
    assert isinstance(last, Rejected)
    assert re.fullmatch(r"breaks off: has 2\.\d+ of the 5\.00 seconds that it tells, which are kept", last.reason)


def test_titles_in_any_encoding(tmp_path: Path) -> None:
    media.write_media(gray([0] * 5), tmp_path / "a.mp4", 8, {"title": "cafe"})
    data = (tmp_path / "a.mp4").read_bytes()
    assert b"cafe" in data
    (tmp_path / "a.mp4").write_bytes(data.replace(b"cafe", "café".encode("latin-1")))
    assert len(clips(Item("a.mp4", "a", str(tmp_path / "a.mp4")))) == 1


def test_no_clip_shows_damage(tmp_path: Path) -> None:
    """Bytes overwritten in the middle: what was decoded from them is in no clip, and the file is said to be damaged."""
    noise = np.random.default_rng(0).integers(0, 255, (40, *SIZE, 3), np.uint8)
    whole = clips(write(tmp_path / "a.mp4", noise))
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 9000] = bytes(9000)  # more than a frame: within one, a decoder may not notice
    (tmp_path / "b.mp4").write_bytes(data)
    *kept, last = Decode(settings())(Item("b.mp4", "a", str(tmp_path / "b.mp4")))
    assert 0 < len(kept) < len(whole)
    shown = {clip.start: clip.frames for clip in whole}
    for one in kept:
        assert isinstance(one, DecodedClip)
        assert np.array_equal(one.frames, shown[one.start])
    assert isinstance(last, Rejected)
    assert last.reason.endswith(("damaged frames, which are left out", "clips, which are kept)"))


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"frames": ()}, "frames is empty"),
        ({"frames": (17, 16)}, "frames is 16: expected 4k + 1"),
        ({"frames": (0,)}, "frames is 0: expected a whole number of at least 1"),
        ({"fps": 0}, "fps is 0: expected a number of more than 0"),
        ({"size": (100, 96)}, "size is 96x100: expected width and height in multiples of 32"),
        ({"size": (0, 96)}, "size is 96x0: expected"),
        ({"threshold": -1.0}, "threshold is -1.0: expected"),
    ],
)
def test_settings_are_checked(changed: dict[str, object], expected: str) -> None:
    with pytest.raises(InputError) as error:
        settings(**changed)
    assert str(error.value).startswith(expected)


def test_neighbouring_sizes_are_apart() -> None:
    """No bucket is there twice, and each is the nearest to its own ratio."""
    buckets = size_buckets((480, 768))
    assert len(set(buckets)) == len(buckets)
    assert all(choose_size(*size, buckets) == size for size in buckets)
    ratios = sorted(width / height for height, width in buckets)
    assert all(after > before for before, after in pairwise(ratios))
