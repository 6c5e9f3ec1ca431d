"""Files: what is written reads back, with its record, and a failed or interrupted write leaves nothing behind."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from nova_video.common.errors import InputError
from nova_video.io import files, media
from nova_video.io.files import atomic_path

RECORD = {
    "prompt": 'a "café" — whale\n',
    "seed": 7,
    "model": "emoji",
    "settings": {"guidance_scale": 4.0, "size": [128, 96]},
}


def clip(frames: int, height: int = 64, width: int = 96) -> media.Frames:
    """A red square that crosses a blue background: flat colours, so that lossy formats stay close."""
    pixels = np.empty((frames, height, width, 3), dtype=np.uint8)
    pixels[:] = (50, 100, 230)
    for index in range(frames):
        pixels[index, 16:40, 4 * index : 4 * index + 24] = (220, 40, 40)
    return pixels


@pytest.mark.parametrize(
    ("suffix", "frames"),
    [(suffix, 1) for suffix in media.SUFFIXES]
    + [(suffix, 9) for suffix in media.SUFFIXES if suffix not in media.STILL_SUFFIXES],
)
def test_round_trip(tmp_path: Path, suffix: str, frames: int) -> None:
    path = tmp_path / f"clip{suffix}"
    media.write_media(clip(frames), path, 8, RECORD)
    back, fps = media.read_frames(path)
    assert back.shape == (frames, 64, 96, 3)
    assert fps == (pytest.approx(8, rel=0.01) if frames > 1 or suffix in media.VIDEO_SUFFIXES else 0)
    error = np.abs(back.astype(int) - clip(frames))
    assert np.median(error) <= 2  # flat areas keep their colour
    assert error.mean() < 6
    assert media.read_metadata(path) == RECORD
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_a_jpg_holds_one_picture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InputError, match="jpg holds one picture, expected another format for a clip"):
        media.write_media(clip(2), tmp_path / "clip.jpg", 8, {})
    media.write_media(clip(1), tmp_path / "long.jpg", 8, {"prompt": "a whale " * 9000})
    assert "written without its record" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["long.jpg"]


def test_a_folder_of_frames(tmp_path: Path) -> None:
    """Lossless, each with the record, and never among other files."""
    frames = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        media.write_frames(frames, tmp_path / name, RECORD)
        names = sorted(path.name for path in (tmp_path / name).iterdir())
        assert names == ["frame-0001.png", "frame-0002.png", "frame-0003.png"]
        back = [media.read_frames(tmp_path / name / file)[0][0] for file in names]
        assert np.array_equal(np.stack(back), frames)
        assert media.read_metadata(tmp_path / name) == RECORD
    for name, message in [("new", "expected a new or an empty folder"), ("x.mp4", "expected a folder")]:
        with pytest.raises(InputError, match=message):
            media.write_frames(frames, tmp_path / name, RECORD)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new"]


def test_png_is_lossless(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    media.write_media(noise, tmp_path / "noise.png", 12, {})
    assert np.array_equal(media.read_frames(tmp_path / "noise.png")[0], noise)


@pytest.mark.parametrize("suffix", [".webp", ".gif", ".png"])
@pytest.mark.parametrize("fps", [8, 12, 25])
def test_equal_frames_are_told_by_their_duration(tmp_path: Path, suffix: str, fps: int) -> None:
    """Writers of animated pictures make one of them, which is shown for longer."""
    frames = clip(4)[[0, 1, 1, 1, 2, 3, 3]]
    media.write_media(frames, tmp_path / f"clip{suffix}", fps, {})
    back, rate = media.read_frames(tmp_path / f"clip{suffix}")
    assert (back.shape, rate) == (frames.shape, pytest.approx(fps, rel=0.01))
    assert np.abs(back.astype(int) - frames).mean() < 6


def test_mp4_plays_everywhere(tmp_path: Path) -> None:
    """h264, yuv420p, named colours, and an odd size made even by repeating the edge."""
    media.write_media(clip(3, 63, 95), tmp_path / "odd.mp4", 12.5, RECORD)
    with av.open(str(tmp_path / "odd.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.height, stream.width) == (64, 96)
        assert (stream.codec_context.colorspace, stream.average_rate) == (1, 12.5)
    back, _ = media.read_frames(tmp_path / "odd.mp4")
    assert np.abs(back[0, -1].astype(int) - back[0, -2]).max() <= 3


def test_long_record(tmp_path: Path) -> None:
    record = {"prompt": "a whale " * 500}
    for suffix in media.SUFFIXES:
        media.write_media(clip(1), tmp_path / f"long{suffix}", 8, record)
        assert media.read_metadata(tmp_path / f"long{suffix}") == record


def test_fractional_rates_do_not_drift(tmp_path: Path) -> None:
    for suffix in (".webp", ".gif", ".png"):
        media.write_media(clip(15), tmp_path / f"slow{suffix}", 12, {})
        assert media.read_frames(tmp_path / f"slow{suffix}")[1] == pytest.approx(12, rel=0.005)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_interrupted_write_leaves_the_old_file(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "clip.mp4"
    path.write_text("old")

    def interrupted() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half of the new")
            raise failure

    with pytest.raises(failure):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clip.avi", r"its extension is '.avi', expected .mp4, .mov, .webm, .webp, .gif, .png, .jpg or .jpeg"),
        ("clip", "its extension is 'missing'"),
        ("nowhere/clip.mp4", "there is no folder"),
        ("folder.mp4", "it is a folder"),
        ("x" * 300 + ".png", "cannot write .*xxx.png: File name too long"),
        ("x" * 240 + ".png", "cannot write .*xxx.png: File name too long"),  # with what it has while it is written
        ("nul\0.png", "cannot write .*: embedded null byte"),
    ],
)
def test_wrong_places(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(InputError, match=message):
        media.check_output(tmp_path / name)


def test_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)  # as root every folder is writable
    with pytest.raises(InputError, match="is not writable"):
        media.check_output(tmp_path / "clip.mp4")


def test_wrong_frames(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"float64 of shape \(2, 3\), expected uint8 \(F, H, W, 3\)"):
        media.write_media(np.zeros((2, 3)), tmp_path / "clip.mp4", 8, {})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="fps is 0"):
        media.write_media(clip(1), tmp_path / "clip.mp4", 0, {})
    assert list(tmp_path.iterdir()) == []


def written_live(
    path: Path, frames: media.Frames, fps: float = 8, failure: BaseException | None = None, restore: bool = True
) -> None:
    with media.LiveWriter(path, fps, RECORD, restore=restore) as writer:
        for frame in frames:
            writer.write(frame)
        if failure is not None:
            raise failure


def test_live_file_grows_and_plays(tmp_path: Path) -> None:
    path = tmp_path / "live.mp4"
    path.write_text("old")
    frames = clip(17)
    with media.LiveWriter(path, 8, RECORD) as writer:
        assert path.read_text() == "old"  # nothing is touched before there is a frame
        for index, frame in enumerate(frames):
            writer.write(frame)
            assert writer.frames == index + 1
            if index > 0:
                back, fps = media.read_frames(path)  # one frame waits for the next
                assert len(back) == index
                assert fps == pytest.approx(8, rel=0.01)
                assert np.abs(back[-1].astype(int) - frames[index - 1]).mean() < 6
    back, fps = media.read_frames(path)
    assert (back.shape, fps) == (frames.shape, 8)
    assert np.abs(back.astype(int) - frames).mean() < 6
    assert media.read_metadata(path) == RECORD
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.codec_context.colorspace) == ("h264", "yuv420p", 1)
        assert [index for index, frame in enumerate(container.decode(video=0)) if frame.key_frame] == [0, 8, 16]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failure", [RuntimeError("no more"), KeyboardInterrupt()])
def test_interrupted_live_file_ends_well(tmp_path: Path, failure: BaseException) -> None:
    """It is the very file of a clip that ended there."""
    with pytest.raises(type(failure)):
        written_live(tmp_path / "cut.mp4", clip(5, 63, 95), 12.5, failure)
    written_live(tmp_path / "whole.mp4", clip(5, 63, 95), 12.5)
    back, fps = media.read_frames(tmp_path / "cut.mp4")
    assert (back.shape, fps) == ((5, 64, 96, 3), 12.5)
    assert (tmp_path / "cut.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_live_file_is_gone_on_with(tmp_path: Path) -> None:
    """Frames that are kept are not encoded again, the rest comes right behind them, also where some are lacking."""
    path, frames = tmp_path / "clip.mp4", clip(12)
    with media.LiveWriter(path, 8, RECORD) as writer:
        for frame in frames[:7]:
            writer.write(frame)
    first = media.read_frames(path)[0]
    with media.LiveWriter(path, 8, RECORD, keep=5) as writer:
        for frame in frames[5:]:
            writer.write(frame)
        assert writer.frames == 12
    back, fps = media.read_frames(path)
    assert (back.shape, fps) == (frames.shape, 8)
    assert np.array_equal(back[:5], first[:5])
    assert np.abs(back.astype(int) - frames).mean() < 6
    assert media.read_metadata(path) == RECORD
    with av.open(str(path)) as container:
        times = [packet.pts * packet.time_base for packet in container.demux(video=0) if packet.size]
    assert times == [Fraction(index, 8) for index in range(12)]


def test_live_file_that_cannot_be_gone_on_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InputError, match="there is no file"):
        media.LiveWriter(tmp_path / "none.mp4", 8, {}, keep=3)
    (tmp_path / "words.mp4").write_text("no clip")
    with pytest.raises(InputError, match="cannot read the video"):
        media.LiveWriter(tmp_path / "words.mp4", 8, {}, keep=3)
    written_live(tmp_path / "short.mp4", clip(2))
    with media.LiveWriter(tmp_path / "short.mp4", 8, {}, keep=3) as writer:
        writer.write(clip(1)[0])
    assert len(media.read_frames(tmp_path / "short.mp4")[0]) == 3
    assert "short.mp4 holds 2 of the 3 frames made so far" in caplog.text


def test_live_over_an_existing_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The old file stays until there is a frame; after an error both are kept, after Ctrl-C only the new one."""
    path = tmp_path / "clip.mp4"

    def begun(failure: BaseException, restore: bool = True) -> dict[str, int]:
        for file in tmp_path.iterdir():
            file.unlink()
        media.write_media(clip(2), path, 8, {})
        with pytest.raises(type(failure)):
            written_live(path, clip(5), 8, failure, restore)
        return {file.name: len(media.read_frames(file)[0]) for file in tmp_path.iterdir()}

    assert begun(RuntimeError()) == {"clip.mp4": 2, "clip-partial.mp4": 5}
    assert "clip.mp4 is the file that was there before; what was made of the new one is" in caplog.text
    assert begun(RuntimeError(), restore=False) == {"clip.mp4": 5, "clip-before.mp4": 2}
    assert begun(KeyboardInterrupt()) == {"clip.mp4": 5}


def test_live_file_without_frames(tmp_path: Path) -> None:
    with media.LiveWriter(tmp_path / "live.mp4", 8, {}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_wrong_live_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"live.gif while it is made: its extension must be .mp4"):
        media.LiveWriter(tmp_path / "live.gif", 8, {})
    with pytest.raises(InputError, match="there is no folder"):
        media.LiveWriter(tmp_path / "nowhere" / "live.mp4", 8, {})
    with pytest.raises(InputError, match="fps is 0"):
        media.LiveWriter(tmp_path / "live.mp4", 0, {})
    with media.LiveWriter(tmp_path / "live.mp4", 8, {}) as writer:
        with pytest.raises(InputError, match="float64 of shape"):
            writer.write(np.zeros((2, 3)))  # type: ignore[arg-type]
        writer.write(clip(1)[0])
        with pytest.raises(InputError, match="a frame is 96x32, expected 96x64 as the first"):
            writer.write(clip(1, height=32)[0])
    with pytest.raises(ValueError, match="live.mp4 is closed"):
        writer.write(clip(1)[0])
    assert len(media.read_frames(tmp_path / "live.mp4")[0]) == 1


def test_load_image(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert media.load_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: turned by a quarter
    Image.new("RGB", (4, 2), "red").save(tmp_path / "turned.jpg", exif=turned)
    assert media.load_image(tmp_path / "turned.jpg").size == (2, 4)
    Image.new("L", (4, 2), 128).save(tmp_path / "gray.png")
    assert media.load_image(tmp_path / "gray.png").mode == "RGB"


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    media.write_media(clip(1), tmp_path / "whole.png", 8, {})
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:150])
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "text.png").write_text("not a picture")
    Image.new("RGB", (4, 4)).save(tmp_path / "foreign.webp")
    for call, name, message in [
        (media.load_image, "missing.png", "there is no file"),
        (media.load_image, "text.png", "cannot read the image"),
        (media.load_image, "half.png", "cannot read the image"),
        (media.read_frames, "half.png", "cannot read the image"),
        (media.read_frames, "text.mp4", "cannot read the video"),
        (media.read_metadata, "text.mp4", "cannot read the video"),
        (media.read_metadata, "foreign.webp", "carries no record"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            call(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
