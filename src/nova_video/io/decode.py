"""The one decoder: opens a picture or video, whatever its name, and gives its frames with their times.

Pictures are read with Pillow (`pictures.py`), videos with PyAV (`videos.py`). Frames come one by one, timed by
presentation, upright, with square pixels, in sRGB, and on white where they are transparent; what cannot be shown
rightly is refused by name. Only plain files are opened, and nothing but the file itself is read.

    with open_path(path) as media: for scene, at, frame in media.frames(): frame.pixels()
    MediaFile(path).read()

Legend: F frames, H W pixels.
"""

import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from nova_video.common.checks import max_pixels
from nova_video.common.errors import InputError, MediaError, first_line
from nova_video.io.fit import fit_frames
from nova_video.io.pictures import SURE_DURATION, Picture, upright_srgb
from nova_video.io.text import LFS_POINTER, POINTER_ERROR
from nova_video.io.timing import nearest_frames, repeats, steady_rate

if TYPE_CHECKING:  # PyAV is imported when a video is opened
    from nova_video.io.videos import Video

__all__ = [
    "PICTURES",
    "VIDEOS",
    "Frame",
    "Media",
    "MediaFile",
    "open_media",
    "open_path",
    "open_plain",
    "upright_srgb",
    "warn_of_pages",
]

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
VIDEOS = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".3gp", ".mts")
EMPTY = "is empty"
NO_FORMAT = "is damaged, or of no known format"

log = logging.getLogger(__name__)


class Frame(Protocol):
    """A decoded frame, whose pixels are made when they are asked for."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) as shown."""

    def pixels(self, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """(H, W, 3). With `size`, frames that are larger may come smaller, but not below it."""


@dataclass(frozen=True, eq=False)
class ReadyFrame:
    """A frame of a picture."""

    array: NDArray[np.uint8]

    @property
    def size(self) -> tuple[int, int]:
        return self.array.shape[0], self.array.shape[1]

    def pixels(self, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        return self.array


class Media:
    """An opened file: a still picture, an animation or a video. Its frames can be gone through once."""

    def __init__(self, content: "Picture | Video") -> None:
        self.picture = content if isinstance(content, Picture) else None
        self.video = None if isinstance(content, Picture) else content
        self._durations: list[float] = []

    @property
    def is_still(self) -> bool:
        return self.picture is not None and self.picture.frames == 1

    @property
    def rate(self) -> float:
        """Frames a second as the file tells, 0 where it does not; of an animation, with held frames repeated."""
        if self.video is not None:
            return self.video.rate
        counts = self._repeats()
        return sum(counts) / sum(self._durations)

    def times(self) -> list[float]:
        """Times of all frames, in seconds. A video has to be opened again to be decoded after this."""
        if self.video is not None:
            return self.video.packet_times()
        counts, times, start = self._repeats(), list[float](), 0.0
        for duration, count in zip(self._durations, counts, strict=True):
            times += [start + duration * number / count for number in range(count)]
            start += duration
        return times

    def _repeats(self) -> list[int]:
        assert self.picture is not None
        self._durations = self._durations or self.picture.durations()
        return repeats(self._durations, SURE_DURATION)

    def frames(self) -> Iterator[tuple[int, float, Frame]]:
        """Frames with the numbers of their scenes, which end at damage, and their times in seconds."""
        if self.video is not None:
            yield from self.video.decode()
            return
        assert self.picture is not None
        if self.is_still:
            yield 0, 0.0, ReadyFrame(self.picture.still())
            return
        times = iter(self.times())
        for count, array in zip(self._repeats(), self.picture.sequence(), strict=True):
            frame = ReadyFrame(array)
            for _ in range(count):
                yield 0, next(times), frame

    def problem(self) -> str | None:
        """The fault of the frames, known after the last one; None if there is none."""
        return None if self.video is None else self.video.problem()

    def close(self) -> None:
        if self.video is not None:
            self.video.close()


def open_media(file: BinaryIO, name: str = "", limit: int | None = None) -> Media:
    """An opened file by its content, and by its name where that tells nothing. MediaError for what is neither.

    `limit` bounds pixels times frames of a picture, and the pixels of a video's frames; None: `settings.max_pixels`.
    """
    limit = max_pixels() if limit is None else limit
    head = file.read(len(LFS_POINTER))
    file.seek(0)
    if not head:
        raise MediaError(EMPTY)
    if head == LFS_POINTER:
        raise MediaError(POINTER_ERROR)
    try:
        return Media(Picture(file, limit))
    except MediaError as error:
        if str(error) != NO_FORMAT or PurePath(name).suffix.lower() in PICTURES:
            raise
    from nova_video.io.videos import Video  # imports PyAV

    return Media(Video(file, limit))


def open_plain(path: str | os.PathLike[str]) -> BinaryIO:
    """A file to read. MediaError for what is none: a folder, a device, or a pipe that nobody may write to."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise MediaError(f"cannot be opened ({error.strerror})") from error
    except ValueError as error:  # a NUL in the name
        raise MediaError(f"cannot be opened ({error})") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        os.close(handle)
        raise MediaError(f"is a {'folder' if folder else 'pipe, socket or device'}: expected a plain file")
    return os.fdopen(handle, "rb")


@contextmanager
def open_path(path: str | os.PathLike[str], limit: int | None = None) -> Iterator[Media]:
    """A file at a path, opened; whatever is wrong with it is an InputError that names it."""
    place = Path(path)
    kind = {True: "video ", False: "image "}.get(place.suffix.lower() in VIDEOS, "")
    if place.suffix.lower() not in (*PICTURES, *VIDEOS):
        kind = ""
    try:
        with open_plain(place) as file:
            media = open_media(file, place.name, limit)
            try:
                yield media
            finally:
                media.close()
    except FileNotFoundError:
        raise InputError(f"there is no file {place}") from None
    except MediaError as error:
        said = str(error)
        said = said if said.startswith(("its ", "cannot ", "breaks ")) else f"it {said}"
        raise InputError(f"cannot read the {kind or 'file '}{place}: {said}") from error
    except InputError:
        raise
    except Exception as error:  # decoders raise many kinds
        raise InputError(f"cannot read the {kind or 'file '}{place}: {first_line(error)}") from error


def warn_of_pages(media: Media, name: object) -> None:
    """Says that of several pages the first one is taken."""
    if media.picture is not None and media.picture.has_pages:
        log.warning("%s has several pages: the first one is taken", name)


class MediaFile:
    """A picture or clip in a file, with its size, rate and length. It is decoded only when it is read."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """InputError for a file that is neither, or cannot be shown rightly."""
        self.path = Path(path)
        with open_path(self.path) as media:
            warn_of_pages(media, self.path)
            self.fps: float | None = None
            """Frames a second: what the file tells, or that of most frames where it varies. None: a still picture."""
            times = [0.0]
            if not media.is_still:
                times = media.times()
                self.fps = steady_rate(times, media.rate) or None
            if not times:
                raise MediaError("has no frames")
            if media.picture is not None:
                self.size, self._whole = media.picture.size, media.picture.whole_size
        if media.video is not None:
            with open_path(self.path) as media:
                frame = next((frame for _, _, frame in media.frames()), None)
                if frame is None:
                    raise MediaError(media.problem() or "has no frames")
                frame.pixels((1, 1))  # colours that cannot be shown rightly are found before the work
                self.size = self._whole = frame.size
        self._times = times

    def describe(self) -> str:
        """Its length, size and rate in words."""
        width_height = f"{self._whole[1]}x{self._whole[0]} pixels"
        if self.fps is None:
            return f"one picture of {width_height}"
        return f"{self.count()} frames of {width_height}, {self.fps:.5g} a second"

    def count(self, fps: float | None = None) -> int:
        """Frames at this rate, by default its own."""
        if self.fps is None:
            return 1
        rate = fps or self.fps
        return sum(1 for _ in nearest_frames(((at, None) for at in self._times), rate, 1 / self.fps))

    def frames(self, fps: float | None = None) -> Iterator[Frame]:
        """Its frames at this rate, the nearest in time: `count` of them, decoded one by one."""
        wanted = self.count(fps)
        given, last = 0, None
        with open_path(self.path) as media:
            timed = ((at, frame) for at, frame in _in_a_row(media.frames(), self.fps or 1))
            for _, frame in nearest_frames(timed, fps or self.fps or 1, 1 / (self.fps or 1)):
                if given < wanted:
                    yield frame
                    given, last = given + 1, frame
            if (problem := media.problem()) is not None:
                raise MediaError(problem.removesuffix(", which are kept").removesuffix(", which are left out"))
            if last is None:
                raise MediaError("has no frames")
        for _ in range(wanted - given):  # the file tells of one that its decoder does not give
            yield last

    def read(self, fps: float | None = None, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """Its frames at a rate and size (H, W), by default its own: (F, H, W, 3), each made as it is decoded."""
        count, (height, width) = self.count(fps), size or self.size
        self.check_budget(count, height, width)
        frames = np.empty((count, height, width, 3), np.uint8)
        before: Frame | None = None
        for number, frame in enumerate(self.frames(fps)):
            if frame is before:
                frames[number] = frames[number - 1]
            else:
                frames[number] = fit_frames(frame.pixels((height, width))[None], (height, width))[0]
            before = frame
        return frames

    def check_budget(self, count: int, height: int, width: int) -> None:
        """InputError for more frames of a size than may be held at once."""
        if count * height * width > (limit := max_pixels()):
            raise InputError(
                f"cannot hold {self.path}: it has {count} frames of {width}x{height} pixels: expected at most {limit} "
                "in all (NOVA_MAX_PIXELS)"
            )


def _in_a_row(frames: Iterator[tuple[int, float, Frame]], fps: float) -> Iterator[tuple[float, Frame]]:
    """Frames with rising times: where time goes back, a joined recording follows the one before."""
    shift, before = 0.0, None
    for _, at, frame in frames:
        if before is not None and at + shift <= before:
            shift = before + 1 / fps - at
        before = at + shift
        yield before, frame
