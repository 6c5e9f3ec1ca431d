"""What happens to a source file on its way into a dataset: the records that pass between the stages, and the stages
that need no model.

    Item  -- Decode -->  Clip or Rejected  -- Motion -->  Clip  -- EncodeLatents, EncodeText -->  Sample

Each stage is a plain callable made from settings that pickle; `encode.py` calls them one after the other, and the
actors of `encode_ray.py` wrap them:

    Decode(settings)(item)           -> Iterator[Clip | Rejected]: never raises for a broken file
    Motion()(clip)                   -> Clip with its score
    EncodeLatents(model, device, ...)(clips of one bucket) -> [moments (2C, F, h, w) bf16], in encoders.py
    EncodeText(name, device, ...)(captions)                -> [features (T, D) fp16], in encoders.py

Legend: F frames, H W pixels.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nova_video.data.dataset import Bucket


@dataclass(frozen=True)
class Item:
    """A source file with its caption, and where its bytes are. Items of a group are numbered, and the last one says so:
    a group's shards can be written when that many items have gone through."""

    source: str
    """What it is called in the dataset: a relative path, TAR/MEMBER or PART:ROW."""
    caption: str = ""
    url: str = ""
    """A path, or what fsspec opens."""
    offset: int = 0
    """Where in the file at `url` it begins: more than 0 in a tar."""
    size: int | None = None
    """In bytes; None: to the end of that file."""
    data: bytes | None = None
    """The bytes themselves, where the source gives them with the caption."""
    problem: str | None = None
    """Why it is rejected, where that is known from the listing."""
    group: str = ""
    """Name of the group of items that share shards."""
    index: int = 0
    """In its group."""
    last: bool = False
    """Of its group."""


@dataclass(frozen=True, eq=False)
class Clip:
    """A stretch of one scene, or a picture, at its bucket's size and rate."""

    id: str
    """SOURCE#NUMBER, alike in every run."""
    source: str
    start: float
    """Seconds in the source, as `end`."""
    end: float
    fps: float
    caption: str
    frames: NDArray[np.uint8]
    """(F, H, W, 3)."""
    motion: float = 0.0
    """Set by Motion."""
    group: str = ""

    @property
    def bucket(self) -> Bucket:
        return Bucket(*self.frames.shape[:3])


@dataclass(frozen=True)
class Rejected:
    """A source that gave nothing, or less than there is in it: a line of rejected.jsonl."""

    source: str
    reason: str
    group: str = ""
