"""Videos by PyAV: frames in time, upright, with square pixels, as sRGB bytes, on white where they are transparent.

Only the containers of `CONTAINERS` are opened, and only the file itself is read: neither playlists nor addresses are
followed. Legend: H W pixels.
"""

import math
import re
import struct
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, BinaryIO, cast

import av
import numpy as np
from av.sidedata.sidedata import SideDataContainer
from numpy.typing import NDArray
from PIL import Image

from nova_video.common.errors import MediaError
from nova_video.io.colour import coding_of, to_srgb
from nova_video.io.timing import TimedFrame

CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,m4v,h264,hevc,av1,obu,ivf,vc1,asf,flv,ogg,mxf,nut,"
    "dv,wtv,yuv4mpegpipe"
)
HEAD, INDEX = 2**16, 2**26  # bytes that are looked into: of a file's beginning, of an mp4's index
COMPLETE = 0.9  # of the frames or seconds that a file tells of: with fewer, it is said to break off
ASPECT = 0.01  # pixels that are wider or higher by less are square
SLANT = 0.01  # of the largest part of a display matrix: smaller parts are rounded
HD = (1280, 576)  # a video of at least this width, or more than this height, is of BT.709 if it does not say
MATRICES = (0, 1, 2, 3, 4, 5, 6, 7, 9)  # code points of H.273 that swscale converts; RGB is 0
MATRIX_NAMES = {8: "ycgco", 10: "bt2020c", 12: "chroma-derived-nc", 13: "chroma-derived-c", 14: "ictcp", 15: "ipt-c2"}
SWS = (1, 4, 5, 7, 9)  # those that PyAV hands on; 6 is the same as 5, and the frame's own
TURNS = {
    (1, 0, 0, 1): (0, False),
    (-1, 0, 0, 1): (0, True),
    (-1, 0, 0, -1): (2, False),
    (1, 0, 0, -1): (2, True),
    (0, 1, -1, 0): (3, False),
    (0, -1, 1, 0): (1, False),
    (0, 1, 1, 0): (3, True),
    (0, -1, -1, 0): (1, True),
}
"""Display matrices (a, b, c, d) -> quarter turns counterclockwise, and whether they are followed by a mirror."""
DOLBY_VISION = (b"dvcC", b"dvvC", b"dvwC")
REDUCTION = 2  # frames whose colours are converted are first brought to this many times the size that is needed


class Video:
    """An opened video whose frames are still to be decoded. After them, `problem` says what is wrong with them."""

    def __init__(self, file: BinaryIO, max_pixels: int) -> None:
        """MediaError for what cannot be read rightly."""
        _check_boxes(file)
        file.seek(0)
        options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none"}
        try:  # titles may be in any encoding
            self.container = av.open(file, "r", options=options, metadata_errors="replace")
        except (av.FFmpegError, OSError) as error:
            raise MediaError("is damaged, or of no known format") from error
        cover = av.stream.Disposition.attached_pic  # a picture that comes with a film or with music
        found = [stream for stream in self.container.streams.video if not stream.disposition & cover]
        if not found:
            raise MediaError("has no video stream")
        self.stream = found[0]
        self.stream.thread_type = "NONE"  # with several threads, a damaged frame is not told every time
        self.rate = float(self.stream.average_rate or self.stream.guessed_rate or 0)
        """Frames a second as the file tells, 0 if it does not."""
        self.aspect = float(self.stream.sample_aspect_ratio or 1)
        """Of one pixel, width to height."""
        self.damaged = self.decodable = 0
        self.end = 0.0  # of the last frame, in seconds
        self._told_frames = self.stream.frames
        if self.container.format.name.startswith("mov"):  # whose edit lists may leave frames out
            kept = sum(not entry.is_discard for entry in self.stream.index_entries)
            self._told_frames = min(self._told_frames, kept)
        context = self.stream.codec_context
        width, height = context.width, context.height
        if width * max(self.aspect, 1) * height > max_pixels:
            raise MediaError(
                f"has frames of {round(width * max(self.aspect, 1))}x{height} pixels: expected at most {max_pixels} "
                "(NOVA_MAX_PIXELS)"
            )

    def close(self) -> None:
        self.container.close()

    def packet_times(self) -> list[float]:
        """Times of the frames, rising, told by the file without decoding it. Recordings that were joined follow one
        another. A raw stream tells no times: its frames come at its rate, as in `decode`."""
        times: list[float] = []
        recording: list[float] = []
        before, base, untimed = -math.inf, self.stream.time_base or 0, 0
        for packet in self.container.demux(self.stream):
            at = packet.dts if packet.pts is None else packet.pts
            if not packet.size or packet.is_discard:
                continue
            if at is None:
                untimed += 1
                continue
            if packet.dts is not None:
                if packet.dts < before:
                    times, recording = _append_times(times, recording, self.rate), []
                before = packet.dts
            recording.append(float(at * base))
        return _append_times(times, recording, self.rate) or [number / (self.rate or 1) for number in range(untimed)]

    def decode(self) -> Iterator[tuple[int, float, "VideoPicture"]]:
        """Frames with their scenes and times. A damaged one is left out with those after it, which are made from it, up
        to a frame that stands by itself; there a new scene begins."""
        whole, lines = True, _Deinterlacer()
        for frame in self._frames():
            self.decodable += 1
            told: float | None = frame.time  # PyAV's own hint leaves the None out
            at = (self.decodable - 1) / (self.rate or 1) if told is None else told
            self.end = at + 1 / (self.rate or 1)
            if frame.is_corrupt or not (whole or frame.key_frame):
                for late, picture in lines.flush():
                    yield self.damaged, late, VideoPicture(picture, self.aspect)
                self.damaged += 1
                whole = False
            else:
                for late, picture in lines.push(at, frame):
                    yield self.damaged, late, VideoPicture(picture, self.aspect)
                whole = True
        for late, picture in lines.flush():
            yield self.damaged, late, VideoPicture(picture, self.aspect)

    def _frames(self) -> Iterator[av.VideoFrame]:
        """Decoded frames, with the alpha that VP8 and VP9 have beside their pictures."""
        alpha = next((value for key, value in self.stream.metadata.items() if key.lower() == "alpha_mode"), "0")
        name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(self.stream.codec_context.name)
        decoder = cast(Any, av.CodecContext.create(name, "r")) if name is not None and alpha == "1" else None
        first: tuple[str, str] | None = None
        for packet in self.container.demux(self.stream):
            for frame in packet.decode() if decoder is None else decoder.decode(packet if packet.size else None):
                assert isinstance(frame, av.VideoFrame)
                shape = _shape(frame, self.stream.codec_context if decoder is None else decoder)
                first = first or shape
                if shape[0] != first[0]:
                    raise MediaError(f"its frames change size, from {first[0]} to {shape[0]}")
                if shape[1] != first[1]:
                    raise MediaError(f"its pixels change shape, from {first[1]} to {shape[1]}")
                yield frame

    def problem(self) -> str | None:
        """The fault of the frames, known after the last one; None if there is none."""
        if self.damaged:
            return f"has {self.damaged} damaged frames, which are left out"
        told = self._told_frames
        if self.decodable < COMPLETE * told:
            return f"breaks off: has {self.decodable} of the {told} frames that it tells, which are kept"
        if not told and self.end < COMPLETE * (seconds := self._told_seconds()):
            return f"breaks off: has {self.end:.2f} of the {seconds:.2f} seconds that it tells, which are kept"
        return None

    def _told_seconds(self) -> float:
        """How long the video is by what its file says, 0 if that is nothing. Matroska tells it in a tag, as
        00:00:05.250, or of sound and pictures together."""
        stream = self.stream
        if stream.duration and stream.time_base:
            return float(stream.duration * stream.time_base)
        if match := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "").strip("\0 ")):
            hours, minutes, seconds = map(float, match.groups())
            return 3600 * hours + 60 * minutes + seconds
        return (self.container.duration or 0) / av.time_base if len(self.container.streams) == 1 else 0.0


def _shape(frame: av.VideoFrame, context: Any) -> tuple[str, str]:
    """The size of a frame and of its pixels, in words."""
    aspect = context.sample_aspect_ratio or 1
    return f"{frame.width}x{frame.height}", f"{aspect.numerator}:{aspect.denominator}"


def _append_times(times: list[float], recording: list[float], rate: float) -> list[float]:
    """The times of one more recording, which begins a frame after the last one."""
    if not times or not recording:
        return times + sorted(recording)
    later = sorted(recording)
    begin = times[-1] + 1 / (rate or 1)
    return times + [begin + at - later[0] for at in later]


class _Deinterlacer:
    """Makes whole pictures of interlaced frames, each with its time; others pass as they are."""

    def __init__(self) -> None:
        self._graph: av.filter.Graph | None = None
        self._times: deque[float] = deque()

    def push(self, at: float, frame: av.VideoFrame) -> Iterator[TimedFrame[av.VideoFrame]]:
        if self._graph is None:
            if not frame.interlaced_frame:
                yield at, frame
                return
            self._graph = av.filter.Graph()
            source = self._graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1)
            )
            lines, sink = self._graph.add("bwdif", "mode=send_frame:deint=interlaced"), self._graph.add("buffersink")
            source.link_to(lines)
            lines.link_to(sink)
            self._graph.configure()
        self._times.append(at)
        self._graph.push(frame)
        yield from self._ready()

    def flush(self) -> Iterator[TimedFrame[av.VideoFrame]]:
        """The frames that wait for a next one, which does not come."""
        if self._graph is not None:
            self._graph.push(None)
            yield from self._ready()
        self._graph = None
        self._times.clear()

    def _ready(self) -> Iterator[TimedFrame[av.VideoFrame]]:
        assert self._graph is not None
        while True:
            try:
                frame = self._graph.pull()
            except (av.BlockingIOError, av.EOFError):
                return
            assert isinstance(frame, av.VideoFrame)
            yield self._times.popleft(), frame


class VideoPicture:
    """One decoded frame, whose pixels are converted when they are asked for."""

    def __init__(self, frame: av.VideoFrame, aspect: float) -> None:
        self.frame = frame
        self.aspect = aspect

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) as shown: square pixels, the height kept and the width scaled, then upright."""
        width = self.frame.width if self._is_square else max(1, round(self.frame.width * self.aspect))
        return (width, self.frame.height) if self._turns[0] % 2 else (self.frame.height, width)

    def pixels(self, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """(H, W, 3). If `size` is all that is needed, converted colours may come smaller, though never below it."""
        frame = self.frame
        coding = coding_of(frame.color_primaries, frame.color_trc)
        matrix = self._matrix()
        if coding.is_srgb:
            has_alpha = any(part.is_alpha for part in frame.format.components) or frame.format.has_palette
            pixels = self._array("rgba" if has_alpha else "rgb24", matrix)
            if has_alpha:
                pixels = _on_white(pixels[..., :3], pixels[..., 3])
        else:
            scale = 1.0
            if size is not None:
                scale = min(1.0, REDUCTION * max(size) / min(self.size))
            within = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
            pixels = to_srgb(self._array("rgb48le", matrix, within), coding)
            if any(part.is_alpha for part in frame.format.components):
                pixels = _on_white(pixels, self._array("rgba", matrix, within)[..., 3])
        if not self._is_square:
            height, width = pixels.shape[:2]
            wide = max(1, round(width * self.aspect)), height
            pixels = np.asarray(Image.fromarray(pixels).resize(wide, Image.Resampling.BICUBIC))
        quarters, mirrored = self._turns
        turned = np.rot90(pixels, quarters)
        return np.ascontiguousarray(turned[:, ::-1] if mirrored else turned)

    @property
    def _is_square(self) -> bool:
        return math.isclose(self.aspect, 1, rel_tol=ASPECT)

    @property
    def _turns(self) -> tuple[int, bool]:
        """Quarter turns counterclockwise that bring the frame upright, and whether it is mirrored after them."""
        # the frame's own attribute would hold the frame in a cycle for ever
        data = cast(Any, SideDataContainer)(self.frame).get("DISPLAYMATRIX")
        if data is None:
            return 0, False
        a, b, _, c, d = struct.unpack("9i", bytes(cast(Any, data)))[:5]
        largest = max(abs(a), abs(b), abs(c), abs(d))
        if not largest:  # it says nothing
            return 0, False
        signs = tuple(0 if abs(value) < SLANT * largest else (1 if value > 0 else -1) for value in (a, b, c, d))
        if signs not in TURNS:
            raise MediaError("has a display matrix that turns or shears by other than quarter turns")
        if not signs[0] and not math.isclose(abs(b), abs(c), rel_tol=ASPECT):
            raise MediaError("has a display matrix that both turns and stretches")  # its aspect is told ambiguously
        return TURNS[signs]

    def _matrix(self) -> int:
        """The code point of the colour matrix, guessed as players do where the file names none."""
        matrix = int(self.frame.colorspace)
        if self.frame.format.is_rgb or self.frame.format.has_palette:
            return 0
        if matrix not in MATRICES:
            name = MATRIX_NAMES.get(matrix, str(matrix))
            raise MediaError(f"has the colour matrix {name}: expected BT.709, BT.601, BT.2020 or RGB")
        if matrix in (2, 3):
            return 1 if self.frame.width >= HD[0] or self.frame.height > HD[1] else 5
        return matrix

    def _array(self, kind: str, matrix: int, within: tuple[int, int] | None = None) -> NDArray[Any]:
        """The frame as an array of RGB values in its own coding, of `within` (W, H) if given."""
        width, height = within or (self.frame.width, self.frame.height)
        return self.frame.to_ndarray(
            format=kind, width=width, height=height, src_colorspace=matrix if matrix in SWS else None
        )


def _on_white(pixels: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.uint8]:
    shown = Image.merge("RGBA", (*Image.fromarray(np.ascontiguousarray(pixels)).split(), Image.fromarray(alpha)))
    return np.asarray(Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB"))


def _check_boxes(file: BinaryIO) -> None:
    """Refuses encryption and Dolby Vision that only its own players can show.

    The boxes of the file tell them; its frames do not.
    """
    file.seek(0)
    head = file.read(HEAD)
    boxes = _mp4_index(file) if head[4:8] in (b"ftyp", b"moov", b"free", b"wide", b"mdat", b"skip") else head
    if b"encv" in boxes and b"sinf" in boxes and boxes is not head:
        raise MediaError("is encrypted")
    for name in DOLBY_VISION:
        start = boxes.find(name) + 4
        if start >= 4 and boxes is head:  # Matroska names the kind in one element and has the box in the next
            start = boxes.find(b"\x41\xed", start, start + 64) + 3
        if start < 4 or len(boxes) < start + 5 or boxes[start] > 2:
            continue
        profile, compatible = boxes[start + 2] >> 1, boxes[start + 4] >> 4
        if profile == 5 or (profile > 7 and not compatible):
            raise MediaError(f"is Dolby Vision of profile {profile}, which has no picture for other players")


def _mp4_index(file: BinaryIO) -> bytes:
    """The box `moov` of an mp4 or mov file; empty where there is none."""
    place = 0
    while True:
        file.seek(place)
        head = file.read(16)
        if len(head) < 8:
            return b""
        size = int.from_bytes(head[:4])
        size = int.from_bytes(head[8:16]) if size == 1 else size
        if head[4:8] == b"moov":
            file.seek(place)
            return file.read(min(size or INDEX, INDEX))
        if size < 8:
            return b""
        place += size
