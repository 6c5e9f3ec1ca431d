"""Encodes a clip as fragments of mp4, each playable as soon as it is there, and joins them.

`FragmentEncoder.init` is the head of the stream: a player reads it once, and then fragments from any one on. Each
fragment is encoded by itself: it begins with a keyframe, needs no other, and has the same bytes whenever it is made.
Joining encodes nothing again.
Legend: F frames, H W pixels.
"""

import io
import json
import struct
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import av
from av.bitstream import BitStreamFilterContext

from nova_video.common.errors import InputError
from nova_video.io.media import MP4_OPTIONS, Frames, add_stream, check_frames, encode_frame, frame_rate

# Four frames gain nothing from a slower preset. One thread: the bytes do not depend on the machine's cores.
FRAGMENT_OPTIONS = MP4_OPTIONS | {"preset": "veryfast", "bf": "0", "threads": "1"}
FRAGMENT_FLAGS = "+empty_moov+default_base_moof+frag_custom+frag_discont+skip_trailer"
CONTAINER_OPTIONS = {"movflags": FRAGMENT_FLAGS, "use_editlist": "0", "avoid_negative_ts": "make_non_negative"}
HEAD = ("ftyp", "moov")  # boxes before the first fragment
WITHOUT_NOTES = "filter_units=remove_types=6"  # x264 writes its settings into each fragment: more bytes than a frame


class FragmentEncoder:
    """Encodes frames of one size and rate, (height, width) and frames per second, as fragments."""

    def __init__(self, size: tuple[int, int], fps: float, metadata: dict[str, Any] | None = None) -> None:
        if any(side % 2 or side < 2 for side in size):
            raise InputError(f"size is {size[1]}x{size[0]}: expected even numbers")
        self.size = size
        self.fps = fps
        self.init = b"".join(data for kind, data in boxes(self._write(None, 0, metadata)) if kind in HEAD)
        """The head of the stream, with the metadata as JSON inside."""
        self.mime_type = mime_type(self.init)

    def encode(self, frames: Frames, first: int) -> bytes:
        """Encodes frames (F, H, W, 3) as one fragment, which plays from frame `first` of the clip on."""
        check_frames(frames, self.fps)
        if frames.shape[1:3] != self.size:
            height, width = self.size
            raise InputError(f"a frame is {frames.shape[2]}x{frames.shape[1]}: expected {width}x{height}")
        return b"".join(data for kind, data in boxes(self._write(frames, first, None)) if kind not in HEAD)

    def _write(self, frames: Frames | None, first: int, metadata: dict[str, Any] | None) -> bytes:
        """Returns a whole file of one fragment, or of none."""
        file = io.BytesIO()
        options = CONTAINER_OPTIONS | {"fragment_index": str(first + 1)}  # it counts from 1, and only has to grow
        with av.open(file, "w", format="mp4", options=options) as container:
            if metadata is not None:
                container.metadata["comment"] = json.dumps(metadata)
            stream = add_stream(container, "libx264", self.size, self.fps, FRAGMENT_OPTIONS)
            container.start_encoding()
            if frames is not None:
                stream.codec_context.gop_size = len(frames)
                packets = [packet for frame in frames for packet in encode_frame(stream, frame)] + stream.encode()
                container.mux([_later(packet, first, self.fps) for packet in _without_notes(packets, stream)])
        return file.getvalue()


def join_fragments(init: bytes, fragments: Iterable[bytes], metadata: dict[str, Any] | None = None) -> bytes:
    """Returns a plain mp4 of the fragments, which begins with the first of them, with `metadata` as JSON inside."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "joined.mp4"
        _join(io.BytesIO(init + b"".join(fragments)), path, metadata)
        return path.read_bytes()


def _join(source: io.BytesIO, path: Path, metadata: dict[str, Any] | None) -> None:
    flags = {"movflags": "+faststart"}  # it needs a file that can be read again
    with av.open(source, "r", format="mp4") as fragmented, av.open(str(path), "w", format="mp4", options=flags) as file:
        if metadata is not None:
            file.metadata["comment"] = json.dumps(metadata)
        stream = fragmented.streams.video[0]
        copy = file.add_stream_from_template(stream)
        start = None
        for packet in fragmented.demux(stream):
            if packet.dts is None or packet.pts is None:  # the end
                continue
            start = packet.dts if start is None else start
            packet.dts, packet.pts = packet.dts - start, packet.pts - start
            packet.stream = copy
            file.mux(packet)


def mime_type(init: bytes) -> str:
    """Returns the type of a stream with this head, as browsers ask for it: video/mp4; codecs="avc1.64000C"."""
    at = init.find(b"avcC")
    profile, compatible, level = init[at + 5 : at + 8]
    return f'video/mp4; codecs="avc1.{profile:02X}{compatible:02X}{level:02X}"'


def boxes(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yields the outermost boxes of an mp4 with their names: ftyp, moov, moof, mdat."""
    at = 0
    while at < len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        yield name.decode("latin-1"), data[at : at + size]
        at += size


def _without_notes(packets: list[av.Packet], stream: av.VideoStream) -> list[av.Packet]:
    """Returns the packets without what the encoder says about itself."""
    notes = BitStreamFilterContext(WITHOUT_NOTES, stream)
    return [part for packet in [*packets, None] for part in notes.filter(packet)]


def _later(packet: av.Packet, first: int, fps: float) -> av.Packet:
    """Moves a packet behind `first` frames: the encoder counts from 0."""
    assert packet.pts is not None
    assert packet.dts is not None
    start = round(first / frame_rate(fps) / packet.time_base)
    packet.pts, packet.dts = packet.pts + start, packet.dts + start
    return packet
