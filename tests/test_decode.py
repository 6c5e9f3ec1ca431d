"""The door to media files: what is opened, by which name, within which bounds, and how masks and clips meet there."""

import contextlib
import io
import os
import socket
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from nova_video.common.errors import InputError
from nova_video.data.stages import Decode, DecodedClip, DecodeSettings, Item, Rejected
from nova_video.io import media
from nova_video.io.decode import MediaFile, open_path, open_plain
from nova_video.io.inputs import InputClip as GivenClip
from nova_video.io.inputs import masks_at, masks_of, read_clips, read_masks

SIZE = (64, 96)
SETTINGS = DecodeSettings((1, 5), 8.0, SIZE, one_size=True)


def ramp(count: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Frames (F, H, W, 3), each brighter by 10."""
    return np.broadcast_to(10 * np.arange(count, dtype=np.uint8)[:, None, None, None], (count, *size, 3)).copy()


def refused(path: Path) -> str:
    """Why a file is, by every door: one line that names it."""
    reasons = set()
    for door in (media.read_frames, media.load_image, media.read_metadata, read_clips, read_masks):
        with pytest.raises(InputError) as caught:
            door(path)
        said = str(caught.value)
        assert "\n" not in said
        assert str(path) in said
        reasons.add(said.split(f"{path}: ")[-1])
    (found,) = Decode(SETTINGS)(Item(path.name, "a", str(path)))
    assert isinstance(found, Rejected)
    assert len(reasons) == 1
    assert found.reason.removeprefix("broken: ").removeprefix("it ") == reasons.pop().removeprefix("it ")
    return found.reason


def test_only_plain_files_are_opened(tmp_path: Path) -> None:
    """Neither a pipe that nobody writes to, nor a device without end, nor a socket, a folder or a damaged name."""
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.mp4", "zero.png"):
        assert refused(tmp_path / name) == "is a pipe, socket or device: expected a plain file"
    assert refused(tmp_path / "folder.png") == "is a folder: expected a plain file"
    assert "cannot be opened (embedded null byte)" in refused(tmp_path / "a\0b.png")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as ear, contextlib.chdir(tmp_path):
        ear.bind("ear.mp4")
        assert refused(Path("ear.mp4")).startswith("cannot be opened (")


def test_files_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.png").write_bytes(b"")
    monkeypatch.setattr(os, "open", refuse)  # as root, every file may be read
    assert refused(tmp_path / "a.png") == "cannot be opened (Permission denied)"


def test_no_other_file_and_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Playlists and lists of files, PostScript and drawings, whatever they are called."""
    media.write_media(ramp(5), tmp_path / "real.mp4", 8, {})
    lists = {
        "playlist": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nreal.mp4\n#EXT-X-ENDLIST\n",
        "concat": "ffconcat version 1.0\nfile real.mp4\n",
        "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"></MPD>',
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nm=video 5004 RTP/AVP 96\n",
        "eps": "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "xpm": '/* XPM */\nstatic char * a[] = {"1 1 1 1", "a c #FF0000", "a"};\n',
    }
    monkeypatch.setattr("subprocess.Popen", None)
    monkeypatch.setattr("os.system", None)
    for name, text in lists.items():
        for suffix in (".mp4", ".png", ".mkv"):
            path = tmp_path / f"{name}{suffix}"
            path.write_text(text)
            assert refused(path).startswith(
                ("is a playlist: expected", "is EPS or Post", "broken: it is damaged, or of")
            )


def test_content_counts_more_than_the_name(tmp_path: Path) -> None:
    media.write_media(ramp(5), tmp_path / "a.mp4", 8, {})
    media.write_media(ramp(5), tmp_path / "a.webp", 8, {})
    for name, other in [("a.mp4", "b"), ("a.mp4", "b.png"), ("a.webp", "c.mp4"), ("a.webp", "c.jpg")]:
        (tmp_path / other).write_bytes((tmp_path / name).read_bytes())
        if other != "b.png":
            frames, fps = media.read_frames(tmp_path / other)
            assert (frames.shape, fps) == ((5, *SIZE, 3), pytest.approx(8, rel=0.01))
            (clip,) = Decode(SETTINGS)(Item(other, "a", str(tmp_path / other)))
            assert isinstance(clip, DecodedClip)
            assert len(clip.frames) == 5
    assert refused(tmp_path / "b.png") == "broken: it is damaged, or of no known format"


def test_a_small_file_of_large_frames_is_refused_unread(tmp_path: Path) -> None:
    """300 frames of 5 megapixels in a few kilobytes: the file is rejected, the next one goes on."""
    frames = [Image.new("L", (2500, 2000), 0) for _ in range(2)]
    frames[1].paste(255, (0, 0, 1, 1))
    frames[0].save(file := io.BytesIO(), "GIF", save_all=True, append_images=frames[1:], duration=100)
    data = file.getvalue()
    second = data.rindex(b"\x21\xf9")  # its graphic control, with its pixels up to the trailer
    path = tmp_path / "bomb.gif"
    path.write_bytes(data[:second] + 299 * data[second:-1] + b";")
    assert path.stat().st_size < 60_000
    said = "has 108 frames or more of 2500x2000 pixels: expected at most 536870912 in all (NOVA_MAX_PIXELS)"
    assert refused(path) == said
    with open_path(path, limit=2**31) as content:
        assert content.picture is not None
        assert content.picture.frames == 300


def test_large_pictures_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More pixels than Pillow itself lets through are reduced, alike for a picture and its mask."""
    monkeypatch.setattr("nova_video.io.pictures.LARGE", 60_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("L", (500, 400), 77).save(tmp_path / "huge.png")
    assert media.load_image(tmp_path / "huge.png").size == (250, 200)
    assert read_masks(tmp_path / "huge.png").shape == (1, 200, 250)
    with pytest.raises(InputError, match="carries no record of how it was made: it has one picture of 500x400 pixels"):
        media.read_metadata(tmp_path / "huge.png")


def test_what_a_foreign_file_is(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        (stream.height, stream.width), stream.pix_fmt = SIZE, "yuv420p"
        for frame in ramp(7):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    with pytest.raises(InputError) as caught:
        media.read_metadata(tmp_path / "a.mkv")
    assert str(caught.value).endswith(
        "a.mkv carries no record of how it was made: it has 7 frames of 96x64 pixels, 10 a second"
    )


# Clips and masks -----------------------------------------------------------------------------------------------------


def test_a_clip_stays_in_its_file_until_it_is_read(tmp_path: Path) -> None:
    """Made at the size and rate that are needed, frame by frame, as a whole clip would be."""
    media.write_media(ramp(24), tmp_path / "a.mp4", 12, {})
    clip = read_clips(tmp_path / "a.mp4")[0]
    assert isinstance(clip, GivenClip)
    assert isinstance(clip.content, MediaFile)
    whole = GivenClip(clip.frames, 12)
    assert (len(clip), clip.fps, clip.size) == (24, 12, SIZE)
    for fps, size in [(12, SIZE), (11.95, SIZE), (6, (32, 32)), (8, (32, 64)), (24, (32, 48))]:
        assert np.array_equal(clip.read(fps, size), whole.read(fps, size))
        assert clip.count(fps) == len(clip.read(fps, size))
    os.unlink(tmp_path / "a.mp4")
    with pytest.raises(InputError, match="there is no file"):
        clip.read(12, SIZE)


def test_masks_lie_as_the_pictures_that_they_belong_to(tmp_path: Path) -> None:
    """A picture and its mask, both turned by their EXIF, and given as files or as PIL images."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.zeros((96, 64, 3), np.uint8)
    stored[:48] = 255  # shown on the right
    Image.fromarray(stored).save(tmp_path / "mask.png", exif=exif)
    clip = read_clips(tmp_path / "mask.png")[0]
    assert isinstance(clip, GivenClip)
    for mask in (tmp_path / "mask.png", Image.open(tmp_path / "mask.png")):
        masks = masks_of(read_masks(mask), clip)
        assert masks.shape == (1, *SIZE)
        assert not masks[0, :, :48].any()
        assert masks[0, :, 48:].all()
    (picture,) = read_clips([Image.open(tmp_path / "mask.png")])
    assert isinstance(picture, GivenClip)
    assert np.array_equal(picture.frames, clip.frames)


def test_masks_at_another_rate(tmp_path: Path) -> None:
    media.write_media(ramp(24), tmp_path / "a.mp4", 12, {})
    clip = read_clips(tmp_path / "a.mp4")[0]
    assert isinstance(clip, GivenClip)
    each = np.zeros((24, *SIZE), bool)
    each[12:] = True
    assert masks_at(each, clip, 6, (32, 48))[:, 0, 0].tolist() == 6 * [False] + 6 * [True]
    assert masks_at(each[12:13], clip, 6, (32, 48)).shape == (12, 32, 48)


def test_open_plain_reads(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"ab")
    with open_plain(tmp_path / "a") as file:
        assert file.read() == b"ab"
