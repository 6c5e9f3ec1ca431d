"""The base of every source: items with captions, in the same order in every run.

A source has parts, read one after the other: a folder is one, and so is a tar or a Parquet file. The items of a part
are numbered in groups, which is what encoding finishes, and takes up again after a stop. What is wrong with a single
item is its `problem`; what is wrong with the source as a whole is an InputError before the work.
Every place is a path or a URL that fsspec opens.
"""

import os
import posixpath
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from nova_video.common.checks import check_number
from nova_video.common.errors import InputError, first_line
from nova_video.common.extensions import names_extension
from nova_video.data.dataset import local_path
from nova_video.data.sidecars import check_unicode, shorten
from nova_video.data.stages import Item

CAPTION = "caption"  # the column or key, unless another is named
TEXTS = (".txt", ".json")
MOST_LOOKS = 16  # items that are looked into before the work
WHAT_THERE_IS = (
    "a folder of media with captions (.txt or .json beside each, or metadata.csv or .jsonl), .tar or .parquet files, a"
    " folder written by save_to_disk, or hf://OWNER/NAME"
)


@dataclass(frozen=True)
class SourceSettings:
    """The place to read from, and how."""

    place: str
    """A folder, a file or several by * or {000..010}, hf://OWNER/NAME, or a user's own as `module:Class`."""
    caption_column: str | None = None
    """Column of a table, or key of JSON files; None: caption."""
    media_column: str | None = None
    """Column of the media in a Hugging Face dataset; None: the only one that holds media."""
    split: str = "train"
    """Split of a Hugging Face dataset that has several."""
    group: int = 256
    """Items of a group: their samples are written together."""
    config: str | None = None
    """Configuration of a dataset on the Hugging Face hub that has several."""

    def __post_init__(self) -> None:
        check_number("group", self.group, 1, integer=True)
        if not self.place.strip():
            raise InputError(f"the source is {self.place!r}: expected a folder, a file or a URL")
        object.__setattr__(self, "place", self.place.rstrip("/") or self.place)  # the same place, and known as that
        if name_problem(self.place):
            raise InputError(f"{self.place}: its name is not UTF-8: expected a place that a dataset can name")
        first, chained, _ = self.place.partition("::")
        if chained and "://" in first:  # what is in it would be named without the rest
            raise InputError(f"{self.place}: is in an archive: expected {WHAT_THERE_IS}, none of them in another file")

    @property
    def lasting_place(self) -> str:
        """The place as it is known from any working directory."""
        return self.place if names_extension(self.place) else str(local_path(self.place) or self.place)

    @property
    def caption(self) -> str:
        return self.caption_column or CAPTION

    @property
    def order(self) -> Sequence[str]:
        """Extensions of captions, the first one first: .json where its key is named."""
        return TEXTS if self.caption_column is None else TEXTS[::-1]

    def check_no(self, **options: str) -> None:
        """Raises InputError for a given option that the source has no use for: {its field: what it has none of}."""
        for name, what in options.items():
            if (value := getattr(self, name)) != getattr(SourceSettings, name):  # its default
                raise InputError(f"{name} is {value!r}, and {self.place} has no {what}: expected none to be named")


class MediaSource(ABC):
    """A source of media: items with captions, in parts."""

    parts: int
    total: int | None = None
    """Items of all parts, where that is known."""

    files: Sequence[str] = ()
    """All that are read."""

    def __init__(self, settings: SourceSettings) -> None:
        self.settings = settings

    @cached_property
    def sizes(self) -> list[int]:
        """Bytes of all local files, -1 where there is none."""
        return [_size(file) for file in self.files if "://" not in file]

    @property
    @abstractmethod
    def content(self) -> list[str]:
        """Names of files, or columns and rows, by which the source is known again."""

    @abstractmethod
    def read(self, part: int, start: int = 0) -> Iterator[Item]:
        """The items of a part from number `start` on."""

    def part_name(self, part: int) -> str:
        """Name of a part, where its items have none that stands by itself; empty in a folder."""
        return ""

    def part_mark(self, part: int) -> str:
        """A mark that changes with a part, where all of it is one file; empty where there is none."""
        return ""

    @abstractmethod
    def find(self, source: str) -> Item:
        """The item of that name, for looking at what a sample was made from."""

    def items(self, finished: Mapping[str, bool] | None = None) -> Iterator[Item]:
        """All items with their groups, without those of `finished` groups.

        `finished` maps a group to True if it was the final one of its part.
        """
        finished = finished or {}
        for part in range(self.parts):
            first = 0
            while (name := group_name(part, first)) in finished and not finished[name]:
                first += 1
            if name not in finished:
                for item in self._numbered(part, first):
                    if item.group not in finished:
                        yield item

    def _numbered(self, part: int, first: int) -> Iterator[Item]:
        """The items of a part from group `first` on, each one telling whether it is the last of its group."""
        size = self.settings.group
        waiting: Item | None = None
        for number, item in enumerate(self.read(part, first * size), start=first * size):
            if waiting is not None:
                yield replace(waiting, last=number % size == 0)
            waiting = replace(item, group=group_name(part, number // size), index=number % size)
        if waiting is not None:
            yield replace(waiting, last=True, final=True)


def _size(file: str) -> int:
    try:
        return os.path.getsize(file)
    except OSError:
        return -1


def group_name(part: int, group: int) -> str:
    return f"{part:05d}-{group:05d}"


# What several kinds share ------------------------------------------------------------------------------------------


def name_problem(name: str) -> str | None:
    """Why a dataset cannot hold a file of that name."""
    try:
        check_unicode(name)
    except ValueError:
        return "its name is not UTF-8: expected one that is"
    return None


def one_line(error: Exception) -> str:
    """In one line."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return first_line(error)


def some_names(names: Collection[str]) -> str:
    shown = [shorten(name) for name in sorted(names)[:5]]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def shared_name(owner: str) -> str:
    """The problem of media whose caption belongs to other media."""
    return f"no caption: {posixpath.basename(owner)} has the same name, and the caption: expected a name of its own"


def is_elsewhere(path: str) -> bool:
    """True for a URL or a whole path, which are not below the source."""
    return "://" in path or path.startswith("/")


def no_column(where: str, what: str, name: str, there: Iterable[str], hint: str | None = None) -> str:
    hint = ": name the one of the captions with --caption-column" if hint is None else hint
    return f"{where}: has no {what} {name!r}, it has {some_names([str(key) for key in there]) or 'none'}{hint}"


def short_names(urls: list[str]) -> list[str]:
    """Paths below the folder that all share."""
    folders = [url.split("/")[:-1] for url in urls]
    shared = 0
    while all(len(parts) > shared for parts in folders) and len({parts[shared] for parts in folders}) == 1:
        shared += 1
    return ["/".join(url.split("/")[shared:]) for url in urls]
