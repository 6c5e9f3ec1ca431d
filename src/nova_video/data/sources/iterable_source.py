"""A user's own source: any object that gives samples in the same order each time it is iterated over."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Protocol

from nova_video.common.errors import InputError, first_line
from nova_video.common.extensions import check_members
from nova_video.data.sources.source import MediaSource, SourceSettings, name_problem
from nova_video.data.stages import Item
from nova_video.io.text import printable


class SampleSource(Protocol):
    """The members of a user's own source."""

    fingerprint: str
    """Another one for other samples; where it stays the same, `nova encode` does not compare them again."""

    def __iter__(self) -> Iterator[tuple[str, bytes | str | Path, str]]:
        """Samples: a name of its own, the media (a file's bytes, its path or its URL), and the caption."""
        ...


class IterableSource(MediaSource):
    """The items of a `SampleSource`, as one part."""

    parts = 1

    def __init__(self, settings: SourceSettings, own: SampleSource) -> None:
        super().__init__(settings)
        nothing = "such option"
        settings.check_no(caption_column=nothing, media_column=nothing, split=nothing)
        check_members(own, "source", SampleSource)
        if not isinstance(own.fingerprint, str) or not hasattr(own, "__iter__"):
            raise InputError(f"source is {type(own).__name__}: expected one with a text fingerprint and __iter__")
        self.own = own

    @property
    def content(self) -> list[str]:
        return [self.own.fingerprint]

    def part_mark(self, part: int) -> str:
        return f"own:{self.own.fingerprint}"

    def read(self, part: int, start: int = 0) -> Iterator[Item]:
        number = start
        try:
            for number, sample in enumerate(islice(iter(self.own), start, None), start=start):
                yield _make_item(number, sample)
        except Exception as error:  # of the user's own code
            yield Item("", problem=f"{self.settings.place} fails after sample {number}: {first_line(error)}")

    def find(self, source: str) -> Item:
        for item in self.read(0):
            if item.source == source:
                return item
        raise InputError(f"{self.settings.place}: has no {source}")


def _make_item(number: int, sample: object) -> Item:
    """The item of a sample, with a problem where the sample has another form."""
    if not isinstance(sample, tuple) or len(sample) != 3:
        return Item(f"{number:05d}", problem=f"is {type(sample).__name__}: expected (name, media, caption)")
    name, media, caption = sample
    if not isinstance(name, str) or not name or name_problem(name):
        return Item(f"{number:05d}", problem=f"its name is {printable(str(name))!r}: expected text")
    if not isinstance(caption, str) or not caption.strip():
        return Item(name, problem="no caption: expected text")
    if isinstance(media, bytes):
        return Item(name, caption, data=media)
    if isinstance(media, str | Path) and str(media):
        return Item(name, caption, url=str(media))
    return Item(name, problem=f"its media is {type(media).__name__}: expected bytes, a path or a URL")
