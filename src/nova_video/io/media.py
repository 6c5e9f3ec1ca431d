"""Writes and reads pictures and clips in the formats of `SUFFIXES`, each with a JSON record of its making.

A file appears whole or not at all: it is written beside its place under a hidden name and then renamed. `LiveWriter` is
the exception: its mp4 grows in place, and plays while it does. A png, webp or gif of several frames is animated.
Legend: F frames, H W pixels.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from fractions import Fraction
from itertools import count, pairwise
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from nova_video.common.errors import InputError, MediaError
from nova_video.io.decode import Media, MediaFile, open_path, warn_of_pages
from nova_video.io.files import atomic_path, check_writable, name_beside, name_errors
from nova_video.io.text import parse_json

Frames = NDArray[np.uint8]  # (F, H, W, 3)

VIDEO_SUFFIXES = (".mp4", ".mov", ".webm")
STILL_SUFFIXES = (".jpg", ".jpeg")  # formats of one picture alone
PICTURE_SUFFIXES = (".webp", ".gif", ".png", *STILL_SUFFIXES)
SUFFIXES = VIDEO_SUFFIXES + PICTURE_SUFFIXES
FRAME_NAME = "frame-{:04d}.png"  # a frame in a folder of frames, counted from 1
PNG_KEY = "nova"  # the text chunk of a png
EXIF_DESCRIPTION = 0x010E  # the EXIF field of a webp or jpg
JPEG_EXIF_LIMIT = 65000  # bytes: a segment of a jpg holds no more
MP4_OPTIONS = {"crf": "16", "preset": "medium"}  # near transparent: these clips are short and small
WEBM_OPTIONS = {"crf": "18", "b": "0", "row-mt": "1"}  # of VP9, by quality alone
LIVE_OPTIONS = MP4_OPTIONS | {"tune": "zerolatency"}  # no frame waits in the encoder for later ones
LIVE_CONTAINER = {"movflags": "+frag_every_frame+empty_moov+default_base_moof", "flush_packets": "1"}

log = logging.getLogger(__name__)


def check_output(path: Path) -> None:
    """Raises for a place that could not be written to later: unknown extension, no such folder, not writable."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(
            f"cannot write {path}: its extension is {path.suffix or 'missing'!r}, expected {_enumerate(SUFFIXES)}"
        )
    try:
        os.lstat(name_beside(path))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # such as a name that is too long
        raise InputError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder, expected a file name")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    check_writable(path.parent)


def write_media(frames: Frames, path: str | Path, fps: float, metadata: dict[str, Any]) -> None:
    """Writes frames (F, H, W, 3) in the format of the path's extension, with `metadata` as JSON inside the file."""
    path = Path(path)
    check_output(path)
    check_frames(frames, fps)
    record = json.dumps(metadata)  # plain ASCII, so that every format can hold it
    suffix = path.suffix.lower()
    if suffix in STILL_SUFFIXES and len(frames) > 1:
        raise InputError(f"cannot write {path}: {suffix[1:]} holds one picture, expected another format for a clip")
    with atomic_path(path) as temporary:
        if suffix in VIDEO_SUFFIXES:
            _write_video(frames, temporary, suffix, fps, record)
        else:
            _write_pictures(frames, temporary, suffix, fps, record)


def check_folder_of_frames(folder: Path) -> None:
    """Raises for a folder that frames could not be written to as the only files in it."""
    if folder.suffix.lower() in SUFFIXES:
        raise InputError(f"cannot write frames to {folder}: its extension is that of one file, expected a folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"cannot write frames to {folder}: expected a new or an empty folder")
    if not folder.parent.is_dir():
        raise InputError(f"cannot write {folder}: there is no folder {folder.parent}")
    check_writable(folder.parent)


def write_frames(frames: Frames, folder: Path, metadata: dict[str, Any]) -> None:
    """Writes each frame as a png into a new or empty folder: frame-0001.png and so on, each with the record."""
    check_frames(frames, 1)
    check_folder_of_frames(folder)
    record = json.dumps(metadata)
    part = name_beside(folder)
    try:
        with name_errors(folder, part):
            part.mkdir()
            for index, frame in enumerate(frames, 1):
                with name_errors(folder, part / FRAME_NAME.format(index)):
                    _write_pictures(frame[None], part / FRAME_NAME.format(index), ".png", 1, record)
            if folder.exists():
                folder.rmdir()  # empty, as it was found to be
            os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_frames(frames: Frames, fps: float) -> None:
    """Raises for frames that are not uint8 (F, H, W, 3), and for a rate that is not above 0."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or len(frames) == 0:
        raise InputError(f"frames are {frames.dtype} of shape {frames.shape}, expected uint8 (F, H, W, 3) with F >= 1")
    if fps <= 0:
        raise InputError(f"fps is {fps}, expected a number above 0")


def _write_video(frames: Frames, path: Path, suffix: str, fps: float, record: str) -> None:
    flags = {} if suffix == ".webm" else {"movflags": "+faststart"}
    with av.open(str(path), "w", format=suffix[1:], options=flags) as container:
        container.metadata["comment"] = record
        if suffix == ".webm":
            stream = add_stream(container, "libvpx-vp9", frames.shape[1:3], fps, WEBM_OPTIONS)
        else:
            stream = add_stream(container, "libx264", frames.shape[1:3], fps, MP4_OPTIONS)
        for pixels in frames:
            container.mux(encode_frame(stream, pixels))
        container.mux(stream.encode())


class LiveWriter:
    """An mp4 that grows in place, frame by frame, and can be played while it does.

    `with LiveWriter(path, fps, metadata) as writer: writer.write(frame)`. The file is made at the first frame, and ends
    well whatever ends the block, an error or Ctrl-C as well: it then holds the frames so far. While it grows, a frame
    is in the file as soon as the next one is written. With `keep`, it goes on behind the first so many frames of the
    file that is there, which are not encoded again.

    Another file of that name stays until the new one is complete or is ended by Ctrl-C. If an error ends it, the old
    file comes back and the new one gets another name; with `restore=False`, for a clip that is to be gone on with, it
    is the old one that gets another name.
    """

    def __init__(
        self, path: str | Path, fps: float, metadata: dict[str, Any], keep: int = 0, restore: bool = True
    ) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() != ".mp4":
            raise InputError(f"cannot write {self.path} while it is made: its extension must be .mp4")
        check_output(self.path)
        if fps <= 0:
            raise InputError(f"fps is {fps}, expected a number above 0")
        self.fps = fps
        self._kept = _read_packets(self.path, keep) if keep else []
        self._before = len(self._kept)
        self.frames = self._before
        """In the file so far."""
        self._record = json.dumps(metadata)
        self._closed = False
        self._restore = restore
        self._old: Path | None = None  # the file that was there before
        self._size = (0, 0)
        self._container: av.container.OutputContainer | None = None
        self._stream: av.VideoStream | None = None

    def write(self, frame: NDArray[np.uint8]) -> None:
        """The next frame, (H, W, 3) uint8, all of the same size."""
        if self._closed:
            raise ValueError(f"{self.path} is closed")
        check_frames(frame[None], self.fps)
        with name_errors(self.path):
            self._write(frame)
        self.frames += 1

    def _write(self, frame: NDArray[np.uint8]) -> None:
        if self._container is None or self._stream is None:
            if not self._before and self.path.is_file() and self.path.stat().st_size:
                old = name_beside(self.path, "old")
                self.path.rename(old)
                self._old = old
            self._container = av.open(str(self.path), "w", format="mp4", options=LIVE_CONTAINER)
            self._container.metadata["comment"] = self._record
            self._size = frame.shape[:2]
            self._stream = add_stream(self._container, "libx264", self._size, self.fps, LIVE_OPTIONS)
            self._stream.codec_context.gop_size = max(int(self.fps), 1)  # players join at a keyframe: one each second
            for packet in self._kept:
                packet.stream = self._stream
            self._container.mux(self._kept)
            self._kept = []
        if frame.shape[:2] != self._size:
            height, width = self._size
            raise InputError(f"a frame is {frame.shape[1]}x{frame.shape[0]}, expected {width}x{height} as the first")
        self._container.mux(self._later(encode_frame(self._stream, frame)))

    def close(self) -> None:
        """Ends the file; nothing can be written after it."""
        self._closed = True
        container, stream = self._container, self._stream
        self._container = self._stream = None
        if container is not None and stream is not None:
            with name_errors(self.path), container:
                container.mux(self._later(stream.encode()))

    def _later(self, packets: list[av.Packet]) -> list[av.Packet]:
        """New packets behind those that were there before: the encoder counts from 0."""
        for packet in packets:
            assert packet.pts is not None
            assert packet.dts is not None
            start = round(self._before / frame_rate(self.fps) / packet.time_base)
            packet.pts, packet.dts = packet.pts + start, packet.dts + start
        return packets

    def __enter__(self) -> "LiveWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        failed = kind is not None and issubclass(kind, Exception)
        try:
            self.close()
        except Exception:
            failed = True
            raise
        finally:
            self._put_old_away(failed)

    def _put_old_away(self, failed: bool) -> None:
        """Delete the file that was there before or, after an error, keep both."""
        old, self._old = self._old, None
        if old is None:
            return
        if not failed:
            old.unlink(missing_ok=True)
            return
        with name_errors(self.path, old):
            if self._restore:
                other = _free_name(self.path, "partial")
                self.path.rename(other)
                old.rename(self.path)
                log.warning(
                    "%s is the file that was there before; what was made of the new one is %s", self.path, other
                )
            else:
                other = _free_name(self.path, "before")
                old.rename(other)
                log.warning(
                    "%s is what was made of the new file; the one that was there before is %s", self.path, other
                )


def _free_name(path: Path, word: str) -> Path:
    """A name beside a file that none has, such as clip-partial.mp4."""
    tries = (f"-{word}{'' if number == 1 else f'-{number}'}" for number in count(1))
    return next(other for end in tries if not (other := path.with_stem(f"{path.stem}{end}")).exists())


def _read_packets(path: Path, count: int) -> list[av.Packet]:
    """The first frames of a video, encoded as they come from the encoder."""
    with open_path(path) as media:
        if media.video is None:
            raise MediaError("is a picture: expected a video that was written here")
        container, stream = media.video.container, media.video.stream
        try:
            as_encoded = BitStreamFilterContext("h264_mp4toannexb", stream)
            packets = [part for packet in container.demux(stream) if packet.size for part in as_encoded.filter(packet)]
        except (av.FFmpegError, IndexError) as error:
            raise InputError(f"cannot go on with {path}: it is not a video that was written here") from error
    packets = packets[:count]
    if len(packets) < count:  # of a frame each: live ones have none that depends on later ones
        log.warning(
            "%s holds %d of the %d frames made so far: it goes on without the others", path, len(packets), count
        )
    return packets


def frame_rate(fps: float) -> Fraction:
    """Frames per second as the fraction that a file holds."""
    return Fraction(fps).limit_denominator(1001)


def add_stream(
    container: av.container.OutputContainer,
    codec: Literal["libx264", "libvpx-vp9"],
    size: tuple[int, int],
    fps: float,
    options: dict[str, str],
) -> av.VideoStream:
    """Adds the stream of a clip to a file: frames of (H, W), in even sizes, with their colours named."""
    stream = container.add_stream(codec, rate=frame_rate(fps), options=options)
    stream.height, stream.width = (side + side % 2 for side in size)  # yuv420p has even sizes only
    stream.pix_fmt = "yuv420p"
    stream.codec_context.colorspace = Colorspace.ITU709  # named in the file, so that every player decodes it alike
    stream.codec_context.color_primaries = stream.codec_context.color_trc = 1  # BT.709
    stream.codec_context.color_range = ColorRange.MPEG
    return stream


def encode_frame(stream: av.VideoStream, pixels: NDArray[np.uint8]) -> list[av.Packet]:
    """Encodes one frame (H, W, 3), and returns the packets that the encoder has ready."""
    height, width = pixels.shape[:2]
    even = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
    frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
    return stream.encode(frame)


def _write_pictures(frames: Frames, path: Path, suffix: str, fps: float, record: str) -> None:
    first, *rest = [Image.fromarray(pixels) for pixels in frames]
    tick = 10 if suffix == ".gif" else 1  # milliseconds a file can tell apart
    ends = [round(1000 * count / fps / tick) * tick for count in range(len(frames) + 1)]
    settings: dict[str, Any] = {}
    if rest:
        durations = [after - before for before, after in pairwise(ends)]
        settings = {"save_all": True, "append_images": rest, "duration": durations, "loop": 0}
    if suffix == ".png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text(PNG_KEY, record)
        first.save(path, format="PNG", pnginfo=chunks, **settings)
    elif suffix == ".webp":
        exif = Image.Exif()
        exif[EXIF_DESCRIPTION] = record
        first.save(path, format="WEBP", exif=exif.tobytes(), quality=90, method=4, **settings)
    elif suffix in STILL_SUFFIXES:
        exif = Image.Exif()
        if len(record) < JPEG_EXIF_LIMIT:
            exif[EXIF_DESCRIPTION] = record
        else:
            log.warning(
                "the jpg is written without its record, which has %d bytes: it holds at most 65000", len(record)
            )
        first.save(path, format="JPEG", exif=exif.tobytes(), quality=95, subsampling=0)
    else:
        first, *rest = [image.quantize(256, dither=Image.Dither.NONE) for image in (first, *rest)]
        if rest:
            settings["append_images"] = rest
        first.save(path, format="GIF", comment=record.encode(), **settings)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The record that `write_media` left in a file."""
    if Path(path).is_dir():
        path = next(iter(sorted(Path(path).glob("frame-*.png"))), path)
    with open_path(path) as media:
        record = _record(media)
    try:
        metadata = parse_json(record)
    except (TypeError, ValueError):
        metadata = None
    if not isinstance(metadata, dict):
        raise InputError(f"{path} carries no record of how it was made: it has {MediaFile(path).describe()}")
    return metadata


def _comment(metadata: Mapping[str, str]) -> str | None:
    """The comment of a video; Matroska writes the key in capitals."""
    return metadata.get("comment", metadata.get("COMMENT"))


def _record(media: Media) -> Any:
    """The text that a file holds where `write_media` puts its record."""
    if media.video is not None:
        return _comment(media.video.container.metadata)
    assert media.picture is not None
    image = media.picture.image
    if isinstance(image, PngImagePlugin.PngImageFile):
        image.load()  # text chunks may follow the pixels
        return image.text.get(PNG_KEY)
    return image.info.get("comment") if image.format == "GIF" else image.getexif().get(EXIF_DESCRIPTION)


def load_image(path: str | Path) -> Image.Image:
    """A picture, the first frame of an animated one, as `nova_video.io` reads it: RGB, upright, on white."""
    with open_path(path) as media:
        if media.picture is None:
            raise MediaError("is a video: expected a picture")
        warn_of_pages(media, path)
        if media.picture.frames > 1:
            log.warning("%s is an animation of %d frames: the first one is taken", path, media.picture.frames)
        return Image.fromarray(media.picture.still())


def read_frames(path: str | Path) -> tuple[Frames, float]:
    """All frames (F, H, W, 3) of a clip or picture, and its frames per second (0 for a still picture)."""
    file = MediaFile(path)
    return file.read(), file.fps or 0.0


def _enumerate(words: tuple[str, ...]) -> str:
    return ", ".join(words[:-1]) + " or " + words[-1]
