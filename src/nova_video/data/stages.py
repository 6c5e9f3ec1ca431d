"""Turns source files into clips: the encoding stages without a model, and the records that pass between all stages.

    Item  -- Decode -->  DecodedClip or Rejected
    DecodedClip  -- Motion -->  DecodedClip  -- EncodeLatents, EncodeText -->  EncodedSample

Each stage is a plain callable made from settings that pickle; `encode.py` calls them one after the other, and the
actors of `encode_ray.py` wrap them:

    Decode(settings)(item)           -> Iterator[DecodedClip | Rejected]: never raises for a broken file
    Motion()(clip)                   -> DecodedClip with its score
    EncodeLatents(model, device, ...)(clips of one bucket) -> [moments (2C, F, h, w) bf16], in encoders.py
    EncodeText(name, device, ...)(captions)                -> [features (T, D) fp16], in encoders.py

Legend: F frames, H W pixels.
"""

import io
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any, BinaryIO, TypeVar, cast

import av
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from torch import Tensor

from nova_video.common.checks import check_number, max_pixels
from nova_video.common.errors import InputError, MediaError
from nova_video.common.extras import install_command
from nova_video.data.dataset import TEMPORAL_STRIDE, Bucket, EncodedSample, open_place
from nova_video.data.failures import name_error
from nova_video.data.sidecars import MOST_TEXT, caption_from
from nova_video.io.decode import EMPTY, NO_FORMAT, PICTURES, VIDEOS, Frame, Media, open_media, open_plain, warn_of_pages
from nova_video.io.fit import fit_frames
from nova_video.io.inputs import SAME_RATE
from nova_video.io.motion import flow_magnitude
from nova_video.io.text import LFS_POINTER, printable
from nova_video.io.timing import TimedFrame, nearest_frames
from nova_video.io.videos import VideoPicture
from nova_video.model.config import size_multiple

T = TypeVar("T")

MEDIA = PICTURES + VIDEOS

MULTIPLE = size_multiple(8)  # pixels, for the spatial stride of the released autoencoders
WIDEST = 2.0  # sides of a bucket: at most so many times as long as each other
MOST_ENLARGED = 1.25  # a source is enlarged by at most this much; a smaller one is rejected
SLOWEST = 0.5  # of the rate asked for: a source with fewer frames a second is rejected
CUT_SIDE = 256  # pixels: cuts are looked for in frames of at most this width
STANDSTILL = 2.0  # seconds a frame may last within a scene: timestamps that jump are no stillness
NO_RANGES = "its server gives files only as a whole: expected one that answers range requests"
TRIES, WAIT = 3, 1.0  # of reading from elsewhere: how often, and seconds before the second time


# What passes between stages ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """A source file with its caption, and where its bytes are. Items of a group are numbered, and the last one says so:
    a group's shards can be written when all of its items have gone through."""

    source: str
    """Its name in the dataset: a relative path, TAR/MEMBER or PART:ROW."""
    caption: str = ""
    url: str = ""
    """A path, or what fsspec opens."""
    offset: int = 0
    """Where in the file at `url` it begins: more than 0 in a tar."""
    size: int | None = None
    """In bytes; None: to the end of that file."""
    data: bytes | None = None
    """The bytes themselves, where the source gives them with the caption."""
    caption_url: str = ""
    """Where the caption is, if it is still to be read: a text file, or JSON with `caption_key`."""
    caption_key: str = "caption"
    problem: str | None = None
    """Why it is rejected, where that is known from the listing."""
    group: str = ""
    """Name of the group of items that share shards."""
    index: int = 0
    """In its group."""
    last: bool = False
    """True for the last item of its group."""
    final: bool = False
    """True in the last group of its part of the source."""


@dataclass(frozen=True, eq=False)
class DecodedClip:
    """A stretch of one scene, or a picture, at its bucket's size and rate."""

    source: str
    start: float
    """Seconds in the source, as `end`."""
    end: float
    fps: float
    caption: str
    frames: NDArray[np.uint8]
    """(F, H, W, 3)."""
    motion: float = 0.0
    """Mean optical flow in pixels a frame, set by Motion."""
    group: str = ""
    index: int = 0
    """Number of its item in the group."""
    number: int = 0
    """Among the clips of its item."""

    @property
    def id(self) -> str:
        return f"{self.source}#{self.number}"

    @property
    def bucket(self) -> Bucket:
        frames, height, width = self.frames.shape[:3]
        return Bucket(frames, height, width)

    def rejected(self, error: Exception) -> "Rejected":
        """The record that stands for the sample if a later stage fails."""
        return Rejected(self.source, f"clip {self.number} failed: {name_error(error)}", self.group, self.index)

    def sample(self, moments: Tensor, text: Tensor | None = None, text_short: Tensor | None = None) -> EncodedSample:
        """The row that it becomes, with what the networks gave."""
        return EncodedSample(
            id=self.id,
            source=self.source,
            start=self.start,
            end=self.end,
            caption=self.caption,
            fps=self.fps,
            motion=self.motion,
            bucket=self.bucket,
            moments=moments,
            text=text,
            text_short=text_short,
        )


@dataclass(frozen=True)
class Rejected:
    """A source that gave nothing, or less than there is in it: a line of rejected.jsonl, of printable text."""

    source: str
    reason: str
    group: str = ""
    index: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", printable(self.source))
        object.__setattr__(self, "reason", printable(" ".join(self.reason.split())))


@dataclass(frozen=True, eq=False)
class ItemResult:
    """The samples and rejections of an item, whichever runner made them."""

    group: str
    index: int
    last: bool
    final: bool
    samples: list[EncodedSample]
    """In the order of their numbers, as `rejected`."""
    rejected: list[Rejected]


@dataclass(frozen=True)
class DecodeSettings:
    """How sources become clips."""

    frames: tuple[int, ...]
    """Lengths of clips, each 4k + 1: of a scene, the longest ones that fit. A picture has one frame whatever is said
    here; 1 among the lengths also takes a first frame from scenes that are too short for the others."""
    fps: float
    """At most so many frames a second: of faster sources the nearest frames are taken, slower ones keep their own."""
    size: tuple[int, int]
    """(H, W): the area of all buckets, and one of them."""
    one_size: bool = False
    """True if `size` is the only bucket."""
    cuts: bool = False
    """True if clips end where PySceneDetect finds a cut."""
    threshold: float = 27.0
    """The threshold of PySceneDetect's ContentDetector."""
    max_pixels: int = field(default_factory=max_pixels)
    """The most pixels of a source: of a picture, an animation (all frames), or a frame of a video."""
    multiple: int = MULTIPLE
    """Pixels that all sides are multiples of: `size_multiple` of the autoencoder's stride."""

    def __post_init__(self) -> None:
        if not self.frames:
            raise InputError("frames is empty: expected lengths of clips, such as 17")
        for length in self.frames:
            check_number("frames", length, 1, integer=True)
            if length % TEMPORAL_STRIDE != 1:
                raise InputError(f"frames is {length}: expected {TEMPORAL_STRIDE}k + 1 (1, 5, 9, ...)")
        check_number("fps", self.fps, 0, above=True)
        check_number("threshold", self.threshold, 0, above=True)
        check_number("max_pixels", self.max_pixels, 1, integer=True)
        height, width = self.size
        if height < 1 or width < 1 or height % self.multiple or width % self.multiple:
            raise InputError(f"size is {width}x{height}: expected width and height in multiples of {self.multiple}")


# Sizes ---------------------------------------------------------------------------------------------------------------


def size_buckets(size: tuple[int, int], one_size: bool = False, multiple: int = MULTIPLE) -> list[tuple[int, int]]:
    """The sizes (H, W) that clips may have: about the area of `size`, with sides in multiples of `multiple`.

    No side is more than WIDEST times as long as the other, unless those of `size` itself are.
    """
    if one_size:
        return [size]
    area = size[0] * size[1] / multiple**2
    sides = range(1, math.ceil(math.sqrt(area * WIDEST)) + 1)
    found = {(side, max(1, round(area / side))) for side in sides}
    found |= {(width, height) for height, width in found}
    kept = {(h * multiple, w * multiple) for h, w in found if max(h, w) <= WIDEST * min(h, w)}
    return sorted(kept | {size})


def choose_size(height: int, width: int, buckets: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The bucket whose ratio of sides is nearest; of equals, the largest."""
    ratio = math.log(width / height)
    return min(buckets, key=lambda size: (round(abs(math.log(size[1] / size[0]) - ratio), 6), -size[0] * size[1]))


# Reading -------------------------------------------------------------------------------------------------------------


def read_bytes(item: Item) -> bytes:
    """All of a source file. What is elsewhere is asked for again if it fails."""
    if item.data is not None:
        return item.data
    stop = None if item.size is None else item.offset + item.size
    data = _patiently(item.url, lambda system, path: system.cat_file(path, start=item.offset, end=stop))
    if item.size is not None and len(data) > item.size:
        raise MediaError(NO_RANGES)
    return data


def read_caption(item: Item) -> str:
    """The caption of a source file, wherever it is."""
    if not item.caption_url:
        return item.caption
    data = _patiently(item.caption_url, lambda system, path: system.cat_file(path, start=0, end=MOST_TEXT + 1))
    return caption_from(data, PurePosixPath(item.caption_url).name, item.caption_key)


def _patiently(url: str, read: Callable[[Any, str], bytes]) -> bytes:
    system, path = open_place(url)
    for attempt in range(1, TRIES):
        try:
            return read(system, path)
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except Exception:  # of many kinds, as file systems are
            time.sleep(WAIT * attempt)
    return read(system, path)


# Decode --------------------------------------------------------------------------------------------------------------


class Decode:
    """A source file -> its clips, in order. Whatever is wrong with the file is a Rejected, never an error."""

    def __init__(self, settings: DecodeSettings) -> None:
        self.settings = settings
        self.buckets = size_buckets(settings.size, settings.one_size, settings.multiple)
        if settings.cuts:
            _content_detector(settings.threshold)  # an absent package is found before the work

    def __call__(self, item: Item) -> Iterator[DecodedClip | Rejected]:
        def rejected(reason: str) -> Rejected:
            return Rejected(item.source, reason, item.group, item.index)

        if item.problem is not None:
            yield rejected(item.problem)
            return
        try:
            caption = read_caption(item)
        except Exception as error:  # of the file or of where it is
            yield rejected(f"no caption: {_one_line(error)}")
            return
        clips = 0
        try:
            for clip in self._clips(item):
                yield replace(clip, caption=caption, group=item.group, index=item.index, number=clips)
                clips += 1
        except MediaError as error:
            yield rejected(f"broken: it {error}" if str(error) in (EMPTY, NO_FORMAT) else str(error))
        except Exception as error:  # decoders raise many kinds
            yield rejected(f"broken: {_one_line(error)}" + (f" (after {clips} clips, which are kept)" if clips else ""))

    def _clips(self, item: Item) -> Iterator[DecodedClip]:
        """The clips of a file, without its caption."""
        with ExitStack() as stack:
            media = open_media(_open_file(item, stack), _file_name(item), self.settings.max_pixels)
            stack.callback(media.close)
            warn_of_pages(media, item.source)
            if media.picture is not None:
                self._choose_size(*media.picture.size)  # raises before an animation's frames are gone through
            if media.is_still:
                _, _, frame = next(media.frames())
                size = self._choose_size(*frame.size)
                fitted = fit_frames(frame.pixels(size)[None], size)
                yield DecodedClip(item.source, 0.0, 0.0, self.settings.fps, "", fitted)
                return
            yield from self._cut(item.source, self._scenes(media), media.rate)
            if (problem := media.problem()) is not None:
                raise MediaError(problem)

    def _scenes(self, media: Media) -> Iterator[tuple[int, TimedFrame[Frame]]]:
        """Frames with the numbers of their scenes, which end at cuts too."""
        detector = _content_detector(self.settings.threshold) if self.settings.cuts else None
        cuts = 0
        for number, (scene, at, frame) in enumerate(media.frames()):
            if detector is not None and isinstance(frame, VideoPicture):
                cuts += _is_cut(detector, number, frame.frame, media.rate)
            yield scene + cuts, (at, frame)

    def _cut(
        self,
        source: str,
        frames: Iterable[tuple[int, TimedFrame[Frame]]],
        rate: float,
    ) -> Iterator[DecodedClip]:
        """Frames with the numbers of their scenes, `rate` of them a second -> clips of one scene each."""
        if not rate:
            raise MediaError("tells no frame rate")
        asked = self.settings.fps
        if rate < SLOWEST * asked:
            least = SLOWEST * asked
            raise MediaError(f"has {rate:g} frames a second: expected at least {least:g}, half of the fps asked for")
        fps = asked if rate > asked * (1 + SAME_RATE) else rate
        size: tuple[int, int] | None = None
        longest = length = clips = 0

        def fitted(scene: Iterable[TimedFrame[Frame]]) -> Iterator[TimedFrame[NDArray[np.uint8]]]:
            nonlocal size, length
            for length, (at, frame) in enumerate(nearest_frames(scene, fps, 1 / rate), start=1):  # noqa: B007
                size = size or self._choose_size(*frame.size)
                yield at, fit_frames(frame.pixels(size)[None], size)[0]

        for _, scene in groupby(told_apart(frames), key=lambda pair: pair[0]):
            for part in cut_lengths(fitted(timed for _, timed in scene), self.settings.frames):
                yield _take_clip(source, part, fps)
                clips += 1
            longest = max(longest, length)
        if not clips:
            scenes = ", in its longest scene" if self.settings.cuts else ""
            least = min(self.settings.frames)
            raise MediaError(f"has {longest} frames at {fps:g} a second{scenes}: expected at least {least}")

    def _choose_size(self, height: int, width: int) -> tuple[int, int]:
        size = choose_size(height, width, self.buckets)
        enlarged = max(size[0] / height, size[1] / width)
        if enlarged > MOST_ENLARGED:
            raise MediaError(
                f"is {width}x{height}, too small: it would be enlarged {enlarged:.2f} times for {size[1]}x{size[0]},"
                f" expected at most {MOST_ENLARGED:g}"
            )
        return size


def _take_clip(source: str, part: list[TimedFrame[NDArray[np.uint8]]], fps: float) -> DecodedClip:
    """The clip of a stretch of frames, which is emptied so that no frame is held twice."""
    start, end = part[0][0], part[0][0] + len(part) / fps
    frames = np.stack([pixels for _, pixels in part])  # (F, H, W, 3)
    part.clear()
    return DecodedClip(source, round(start, 6), round(end, 6), fps, "", frames)


def told_apart(frames: Iterable[tuple[int, TimedFrame[T]]]) -> Iterator[tuple[tuple[int, int], TimedFrame[T]]]:
    """Frames with the numbers of their scenes.

    A scene also ends where time goes back, as in joined recordings, or jumps by more than `STANDSTILL` seconds.
    """
    breaks, before = 0, math.nan
    for scene, (at, frame) in frames:
        breaks += at < before or at - before > STANDSTILL
        before = at
        yield (scene, breaks), (at, frame)


def cut_lengths(frames: Iterable[T], lengths: Iterable[int]) -> Iterator[list[T]]:
    """A scene's frames in stretches, one after the other: each the longest of `lengths` that still fits. If there is
    none and 1 is among them, the first frame alone."""
    several = [length for length in lengths if length > 1]
    longest = max(several, default=1)
    waiting: list[T] = []
    found = 0
    for frame in frames:
        waiting.append(frame)
        if len(waiting) == longest:
            yield waiting
            found += 1
            if longest == 1:
                return
            waiting = []
    while fitting := [length for length in several if length <= len(waiting)]:
        length = max(fitting)
        yield waiting[:length]
        found += 1
        waiting = waiting[length:]
    if not found and waiting and 1 in lengths:
        yield waiting[:1]


def _file_name(item: Item) -> str:
    """The name that may tell what a file is: in a tar, which is what `url` names, its own."""
    return PurePosixPath(item.source if item.size is not None else item.url or item.source).name


def _open_file(item: Item, stack: ExitStack) -> BinaryIO:
    """Local files are read as they are decoded, videos elsewhere by pieces, other files as a whole."""
    if item.data is not None or item.size is not None:
        return io.BytesIO(read_bytes(item))
    system, path = open_place(item.url)
    if isinstance(system, LocalFileSystem):
        return stack.enter_context(open_plain(path))
    if PurePosixPath(item.url).suffix.lower() not in VIDEOS:
        return io.BytesIO(read_bytes(item))
    return cast(BinaryIO, stack.enter_context(system.open(path, "rb")))


def _content_detector(threshold: float) -> Any:
    """PySceneDetect's, which compares each frame's hue, saturation and brightness with the last one's. It is asked for
    every cut: scenes that are too short for a clip are dropped later."""
    try:
        from scenedetect import ContentDetector
    except ImportError as error:
        raise InputError(f"scene cuts need PySceneDetect: {install_command('data')}") from error
    return ContentDetector(threshold=threshold, min_scene_len=0)


def _is_cut(detector: Any, number: int, frame: av.VideoFrame, rate: float) -> bool:
    """True if a scene begins with this frame."""
    from scenedetect import FrameTimecode

    scale = min(1.0, CUT_SIDE / frame.width)
    small = frame.reformat(max(1, round(frame.width * scale)), max(1, round(frame.height * scale)), "bgr24")
    return bool(detector.process_frame(FrameTimecode(number, rate), small.to_ndarray()))


def _one_line(error: Exception) -> str:
    """An error in one line, without its class's brackets and numbers."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    text = getattr(error, "strerror", None) or str(error)
    return next((line.strip() for line in str(text).splitlines() if line.strip()), type(error).__name__)


# Motion --------------------------------------------------------------------------------------------------------------


class Motion:
    """Sets the motion score: the mean optical flow between neighbouring frames; 0 for a picture.

    It counts pixels a frame, at the bucket's size and the clip's rate, as in the emoji world (`motion.flow_magnitude`).
    """

    def __init__(self) -> None:
        if find_spec("cv2") is None:  # found before the work
            raise InputError(f"optical flow needs OpenCV: {install_command('data')}")

    def __call__(self, clip: DecodedClip) -> DecodedClip:
        return replace(clip, motion=flow_magnitude(clip.frames) if len(clip.frames) > 1 else 0.0)


def decode_with_motion(decode: Decode, motion: Motion, item: Item) -> Iterator[DecodedClip | Rejected]:
    """The clips of an item, with their scores, and its rejections."""
    for found in decode(item):
        if isinstance(found, DecodedClip):
            try:
                found = motion(found)
            except Exception as error:  # of one clip
                found = found.rejected(error)
        yield found


def is_pointer(item: Item) -> bool:
    """True for a file that Git LFS left in another's place."""
    start, stop = item.offset, item.offset + len(LFS_POINTER)
    try:
        if item.data is not None:
            return item.data.startswith(LFS_POINTER)
        system, path = open_place(item.url)
        return bool(system.cat_file(path, start=start, end=stop) == LFS_POINTER)
    except Exception:  # as file systems have them; the file was rejected before
        return False
