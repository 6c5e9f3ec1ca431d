"""Where encoding begins: a folder, tar files or a Hugging Face dataset, as items with captions, in the same order in
every run.

    open_source(SourceSettings("clips/")).items()  ->  Iterator[Item]

A source has parts, read one after the other: a folder is one, and so is a tar or a Parquet file. The items of a part
are numbered in groups, which is what encoding finishes, and takes up again after a stop. What is wrong with a single
item is its `problem`; what is wrong with the source as a whole is an InputError before the work.
Every place is a path or a URL that fsspec opens.
"""

import os
import posixpath
import re
import tarfile
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any
from urllib.parse import quote, unquote

from nova_video.common.checks import check_number
from nova_video.common.errors import InputError, first_line
from nova_video.common.extras import install_command
from nova_video.data.dataset import file_mark, is_local, join, open_place, read_file
from nova_video.data.sidecars import (
    FILE_NAME,
    MOST_TEXT,
    Row,
    Stem,
    caption_from,
    caption_text,
    check_unicode,
    kind_of,
    read_table,
    shorten,
    stem,
    suffix,
)
from nova_video.data.stages import MEDIA, NO_RANGES, Item, is_pointer
from nova_video.io.decode import VIDEOS
from nova_video.io.folders import A_FOLDER, walk
from nova_video.io.text import LFS_POINTER, POINTED, decode_text, parse_json, printable

CAPTION = "caption"  # the column or key, unless another is named
TEXTS = (".txt", ".json")
TABLES = ("metadata.csv", "metadata.jsonl")
HUB = re.compile(r"hf://(?:datasets/)?([\w-][\w.-]*(?:/[\w-][\w.-]*)?)/?")
CONFIGS = re.compile(r"(?:available configs|not found\. Available): \[(.+?)\]")  # of what `datasets` says
PEEKED = 16  # items that are looked into before the work
HEADERS = 1 << 16  # bytes that are read at once where a tar is elsewhere: its members are asked for by themselves
ROWS = 1024  # of a saved dataset, in a part
LONGEST_NAME = 200  # letters of a name that is no file's, in a list of problems
WEB = ("http://", "https://")
DAMAGED_TAR = "the tar cannot be read on"
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")
WHAT_THERE_IS = (
    "a folder of media with captions (.txt or .json beside each, or metadata.csv or .jsonl), .tar or .parquet files, a"
    " folder written by save_to_disk, or hf://OWNER/NAME"
)


@dataclass(frozen=True)
class SourceSettings:
    """What is read, and how."""

    place: str
    """A folder, a file or several by * or {000..010}, or hf://OWNER/NAME; local, or a URL for fsspec."""
    caption_column: str | None = None
    """Column of a table, or key of JSON files; None: caption."""
    media_column: str | None = None
    """Of a Hugging Face dataset; None: the only one that holds media."""
    split: str = "train"
    """Of a Hugging Face dataset that has several."""
    group: int = 256
    """Items of a group: their samples are written together."""
    config: str | None = None
    """Of a dataset on the Hugging Face hub that has several configurations."""

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
    def caption(self) -> str:
        return self.caption_column or CAPTION

    @property
    def order(self) -> Sequence[str]:
        """Extensions of captions, the first one first: .json where its key is named."""
        return TEXTS if self.caption_column is None else TEXTS[::-1]

    def check_no(self, **options: str) -> None:
        """Raises for an option that is given, and that the source does not have: {its field: what it has none of}."""
        for name, what in options.items():
            if (value := getattr(self, name)) != getattr(SourceSettings, name):  # its default
                raise InputError(f"{name} is {value!r}, and {self.place} has no {what}: expected none to be named")


class Source(ABC):
    """Items in parts."""

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
        """What it is made of, to know it again: names of files, or columns and rows."""

    @abstractmethod
    def read(self, part: int, start: int = 0) -> Iterator[Item]:
        """The items of a part from number `start` on."""

    def part_name(self, part: int) -> str:
        """Name of a part, where its items have none that stands by itself; empty in a folder."""
        return ""

    def part_mark(self, part: int) -> str:
        """What tells that nothing of a part has changed, where all of it is one file; empty where nothing does."""
        return ""

    @abstractmethod
    def find(self, source: str) -> Item:
        """The item of that name, for looking at what a sample was made from."""

    def items(self, finished: Mapping[str, bool] | None = None) -> Iterator[Item]:
        """All items with their groups, but for those of the groups that are `finished`: group -> whether it was the
        final one of its part."""
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


def open_source(settings: SourceSettings) -> Source:
    """The source at a place, checked as far as can be seen from its beginning."""
    place = settings.place
    if place.startswith("hf://") and (match := HUB.fullmatch(place)) is not None:
        return TableSource(settings, _load_hub(match[1], settings), f"hf://datasets/{match[1]}")
    settings.check_no(config="configurations (hf://OWNER/NAME has)")
    system, root = open_place(place)
    try:
        if system.isdir(root):
            return _open_folder(settings, system, root)
        if system.isfile(root):
            urls = [_url(system, root)]
        else:
            found = {pattern: _matches(system, pattern) for pattern in expand_braces(root)}
            urls = [_url(system, path) for paths in found.values() for path in paths]
            if urls and (missing := [pattern for pattern, paths in found.items() if not paths]):
                names = [pattern.rpartition("/")[2] for pattern in missing]
                raise InputError(f"{place}: there is no {_some(names)}: expected all that it names")
    except InputError:
        raise
    except Exception as error:  # file systems elsewhere have errors of their own
        raise InputError(f"{place}: cannot be read: {_said(error)}") from None
    if not urls:
        raise InputError(f"{place}: there is nothing there: expected {WHAT_THERE_IS}")
    return _open_files(settings, urls)


def expand_braces(pattern: str) -> list[str]:
    """part-{000..002}.tar -> part-000.tar, part-001.tar, part-002.tar; {a,b} is either."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    low, high, words = match.groups()
    if words is None:
        choices = [f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1)]
    else:
        choices = words.split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [before + choice + rest for choice in choices for rest in expand_braces(after)]


def _matches(system: Any, pattern: str) -> list[str]:
    """Existing files of a pattern; what has no * is taken as it is if there is such a file."""
    if any(sign in pattern for sign in "*?["):
        return sorted(path for path in system.glob(pattern) if system.isfile(path))
    return [pattern] if system.isfile(pattern) else []


def _open_folder(settings: SourceSettings, system: Any, root: str) -> Source:
    place = settings.place
    found = _files_below(system, root)
    odd = {name: problem for name, problem in found.items() if problem is not None}
    names = [name for name in found if name not in odd]
    if "dataset.json" in names and any(name.startswith("data/") for name in names):
        raise InputError(f"{place}: is a dataset that `nova encode` wrote: expected {WHAT_THERE_IS}")
    if "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= set(names):
        return TableSource(settings, _load_saved(settings), place)
    kinds = {kind: [name for name in names if suffix(name) == kind] for kind in (".tar", ".parquet")}
    packed = {kind: files for kind, files in kinds.items() if files}
    has_media = any(suffix(name) in MEDIA for name in names)
    there = ["media"] * has_media + [f"{kind} files" for kind in packed]
    if len(there) > 1:
        raise InputError(f"{place}: holds {' and '.join(there)}: name one kind, such as {join(place, '*.tar')}")
    for files in packed.values():
        return _open_files(settings, [_url(system, f"{root.rstrip('/')}/{name}") for name in files])
    root = _url(system, root)
    if root.startswith(WEB):  # it lists names as they stand in URLs
        names = [unquote(name) for name in names]
    return FolderSource(settings, root, names, odd)


def _files_below(system: Any, root: str) -> dict[str, str | None]:
    """Paths below a folder, in order, each with the reason why it cannot be read, if there is one.

    Left out are hidden files and folders, and those that macOS adds to archives. Of what is no file, only the names of
    media and captions count.
    """
    if is_local(system):
        found = dict(walk(root))
    else:
        found = dict.fromkeys(path[len(root.rstrip("/")) + 1 :] for path in system.find(root))
    kept = {}
    for name, problem in sorted(found.items()):
        if any(part.startswith(".") or part == "__MACOSX" for part in name.split("/")):
            continue
        is_media = suffix(name) in MEDIA
        if problem == A_FOLDER and not is_media:
            continue
        kept[name] = problem or (name_problem(name) if is_media or suffix(name) in TEXTS else None)
    return kept


def name_problem(name: str) -> str | None:
    """Why a dataset cannot hold a file of that name."""
    try:
        check_unicode(name)
    except ValueError:
        return "its name is not UTF-8: expected one that is"
    return None


def _open_files(settings: SourceSettings, urls: list[str]) -> Source:
    kinds = {suffix(url) for url in urls}
    if kinds == {".tar"}:
        return TarSource(settings, urls)
    if kinds == {".parquet"}:
        base = settings.place if suffix(settings.place) != ".parquet" else settings.place.rpartition("/")[0]
        settings.check_no(split="splits")
        return TableSource(settings, _load_parquet(urls), base, urls)
    found = next(url for url in urls if suffix(url) not in (".tar", ".parquet") or len(kinds) > 1)
    if suffix(found) in COMPRESSED:
        raise InputError(f"{found}: is compressed: expected a folder of what is in it, or a .tar file")
    raise InputError(f"{settings.place}: got the file {found}: expected {WHAT_THERE_IS}")


def _url(system: Any, path: str) -> str:
    """What opens a path again: itself if it is local."""
    return path if is_local(system) else system.unstrip_protocol(path)


def _said(error: Exception) -> str:
    """In one line."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return first_line(error)


def _some(names: Collection[str]) -> str:
    shown = [shorten(name) for name in sorted(names)[:5]]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# A folder ------------------------------------------------------------------------------------------------------------


class FolderSource(Source):
    """Media files in a folder and all folders in it, with a caption beside each, or with tables of captions."""

    parts = 1

    def __init__(self, settings: SourceSettings, root: str, names: Collection[str], odd: Mapping[str, str]) -> None:
        """`names` are files, and `odd` those that cannot be read, with the reason."""
        super().__init__(settings)
        settings.check_no(media_column="columns", split="splits")
        self.root, self._odd = root, odd
        self._media = [name for name in names if suffix(name) in MEDIA]
        composed = {unicodedata.normalize("NFC", name): name for name in self._media}
        self._there = composed | {name: name for name in self._media}  # as a table may spell it -> media
        self._listed: set[str] = set()  # media that have a row in a table
        tables = [name for name in names if posixpath.basename(name).lower() in TABLES]
        tables.sort(key=lambda name: (name.count("/"), name))
        items: list[Item] = []
        read: list[str] = []
        for table in tables:
            try:
                items += self._table_items(table, tables)
                read.append(table)
            except InputError as error:
                if "/" not in table:
                    raise
                items.append(Item(table, problem=str(error).removeprefix(self._url(table)).lstrip(": ")))
        by_folder = {_folder(table): table for table in read}
        above = {name: _nearest(_folder(name), by_folder) for name in names}
        items += [
            self._rejected(name, f"no caption: it is not in {above[name]}")
            for name in self._media
            if above[name] and name not in self._listed
        ]
        media = [name for name in self._media if not above[name] and name not in self._listed]
        texts = [name for name in names if suffix(name) in TEXTS and not above[name]]
        if not items:
            self._check_beside(names, media, texts)
        items += self._beside(media, texts)
        items += [self._rejected(name, problem) for name, problem in odd.items() if name not in self._listed]
        self._items = sorted(items, key=lambda item: item.source)
        self._by_name = {item.source: item for item in reversed(self._items)}
        self.total = len(self._items)
        self.files = [
            *(self._url(table) for table in tables),
            *(url for item in self._items for url in (item.url, item.caption_url) if url),
        ]

    @property
    def content(self) -> list[str]:
        return [item.source for item in self._items]

    def read(self, part: int, start: int = 0) -> Iterator[Item]:
        return islice(self._items, start, None)

    def find(self, source: str) -> Item:
        if source not in self._by_name:
            raise InputError(f"{self.settings.place}: has no {source}")
        return self._by_name[source]

    def _url(self, name: str) -> str:
        return join(self.root, quote(name) if self.root.startswith(WEB) else name)

    def _rejected(self, name: str, problem: str) -> Item:
        return Item(printable(name), problem=problem)

    # Captions beside media

    def _check_beside(self, names: Collection[str], media: Sequence[str], texts: Sequence[str]) -> None:
        """Raises for a folder of which nothing can be encoded: no media, no captions, or none under the key."""
        place = self.settings.place
        if not media and not self._odd:
            if texts:
                raise InputError(
                    f"{place}: has {len(texts)} captions and no media: expected a picture or video beside each, such as"
                    f" {stem(texts[0])}.mp4 for {texts[0]}"
                )
            raise InputError(
                f"{place}: is empty: expected {WHAT_THERE_IS}"
                if not names
                else f"{place}: holds no media ({_some(names)}): expected {WHAT_THERE_IS}"
            )
        stems = {stem(name) for name in media}
        used = [text for text in texts if stem(text) in stems]
        if media and not used and not self._odd:
            raise InputError(
                f"{place}: has {len(media)} media files and no captions: expected a .txt or .json beside each"
                f" ({stem(media[0])}.txt for {media[0]}), or metadata.csv with {FILE_NAME} and {self.settings.caption}"
            )
        self._check_keys([text for text in used if suffix(text) == ".json"])

    def _check_keys(self, texts: list[str]) -> None:
        """Raises if no JSON file looked into has the key."""
        keys: set[str] = set()
        for text in texts[:PEEKED]:
            try:
                values = parse_json(decode_text(read_file(self._url(text))))
            except (OSError, ValueError):
                return
            if not isinstance(values, dict) or self.settings.caption in values:
                return
            keys |= set(values)
        if texts:
            raise InputError(_no_column(f"{self.settings.place}: {texts[0]}", "key", self.settings.caption, keys))

    def _beside(self, media: Sequence[str], texts: Sequence[str]) -> Iterator[Item]:
        """Media with the .txt or .json of their stem, and captions that have no media."""
        stems: dict[str, Stem] = {}
        for name in media:
            stems.setdefault(stem(name), Stem()).media.append(name)
        for name in (*texts, *(name for name in self._odd if suffix(name) in TEXTS)):
            stems.setdefault(stem(name), Stem()).texts.append(name)
        known = {stem(name) for name in (*self._odd, *self._listed)}
        for name, found in stems.items():
            if found.media:
                yield from self._stem_items(found)
            elif name not in known:
                for text in found.texts:
                    yield self._rejected(text, "a caption without media: nothing of its name is beside it")

    def _stem_items(self, found: Stem) -> Iterator[Item]:
        owner = found.owner(VIDEOS)
        try:
            text = found.caption(self.settings.order)
            if text is None:
                raise ValueError("there is no .txt or .json of its name beside it")
            if text in self._odd:
                raise ValueError(f"{text} {self._odd[text]}")
            yield Item(owner, url=self._url(owner), caption_url=self._url(text), caption_key=self.settings.caption)
        except ValueError as error:
            yield self._rejected(owner, f"no caption: {error}")
        for name in found.media:
            if name != owner:
                yield self._rejected(name, shared_name(owner))

    # Captions in tables

    def _table_items(self, table: str, tables: Collection[str]) -> list[Item]:
        """The items of a table's rows; raises InputError for a table that cannot be used at all."""
        where, caption = self._url(table), self.settings.caption
        if others := [name for name in tables if name != table and _folder(name) == _folder(table)]:
            raise InputError(f"{where}: its folder has {posixpath.basename(others[0])} too: expected one of them")
        found = read_table(read_file(where), where, (FILE_NAME, caption))
        if not found.rows:
            raise InputError(f"{where}: has no rows: expected {FILE_NAME} and {caption} of each file")
        for column in (FILE_NAME, caption):
            if column not in found.columns:
                hint = "" if column == FILE_NAME else None
                raise InputError(_no_column(where, "column", column, found.columns, hint))
        names = [row.values.get(FILE_NAME) for row in found.rows]
        if not self._media and not self._odd and not any(_is_elsewhere(str(name)) for name in names):
            raise InputError(
                f"{self.settings.place}: {table} has {len(names)} captions, and there are no media: expected the files"
                f" that it names, such as {shorten(str(names[0]))}"
            )
        if all(row.problem is None and not row.values.get(caption) for row in found.rows):
            raise InputError(f"{where}: the column {caption} is empty: expected a caption in each row")
        return [self._row_item(table, row) for row in found.rows]

    def _row_item(self, table: str, row: Row) -> Item:
        """The item of a row; a problem has the row's number where it names no file."""
        numbered = f"{table}:{row.number}"
        value = row.values.get(FILE_NAME, "")
        try:
            if value == "":
                raise ValueError(f"its row has no {FILE_NAME}")
            if not isinstance(value, str):
                raise ValueError(f"{FILE_NAME} is {kind_of(value)}: expected text")
            if name_problem(value):
                raise ValueError(f"{FILE_NAME} is {shorten(value)}: expected a name in UTF-8, without NUL")
        except ValueError as error:
            return Item(numbered, problem=row.problem or str(error))
        name = self._resolve(table, value)
        is_elsewhere = _is_elsewhere(name)
        is_there = name in self._odd or self._there.get(name) == name
        if row.problem is not None and not is_there:
            return Item(numbered, problem=row.problem)
        if name in self._listed:
            return Item(numbered, problem=f"{shorten(name)} has a row before this one")
        self._listed.add(name)
        if not is_there and not is_elsewhere:
            return Item(shorten(name, LONGEST_NAME), problem=f"is in {table}, but {_no_such_media(name)}")
        try:
            if row.problem is not None or name in self._odd:
                raise ValueError(row.problem or self._odd[name])
            return Item(name, self._row_caption(table, row), url=name if is_elsewhere else self._url(name))
        except ValueError as error:
            return self._rejected(name, str(error))

    def _row_caption(self, table: str, row: Row) -> str:
        """The caption of a row; ValueError for none, or for one that has swallowed the rows behind it."""
        column = self.settings.caption
        value = row.values.get(column, "")
        try:
            caption = caption_text(value)
        except ValueError as error:
            raise ValueError(f"no caption: the column {column} {error}") from None
        for line in str(value).split("\n")[1:]:
            name = self._resolve(table, re.split(r"[,;\t]", line)[0].strip(' "'))
            if self._there.get(name) == name:
                raise ValueError(f"no caption: it goes on over the row of {name}: expected its quote to be closed")
        return caption

    def _resolve(self, table: str, name: str) -> str:
        """The path below the root that a table means; a URL or a whole path elsewhere stays."""
        folder = _folder(table)
        if name.startswith(f"{self.root}/"):
            name, folder = name[len(self.root) + 1 :], ""
        if _is_elsewhere(name):
            return name
        paths = [posixpath.normpath(posixpath.join(folder, path)) for path in (name, name.replace("\\", "/"))]
        for path in paths:  # the second is what Windows means
            if path in self._odd:
                return path
            for spelt in (path, unicodedata.normalize("NFC", path)):
                if spelt in self._there:
                    return self._there[spelt]
        return paths[0]


def _no_such_media(name: str) -> str:
    """Why a path in a table is not that of media in the folder."""
    if name.startswith("../"):
        return "is not below the folder: expected a path in it, or a whole one"
    if suffix(name) in MEDIA:
        return "there is no such file"
    return f"{shorten(suffix(name)) or 'no extension'} is no known format"


def shared_name(owner: str) -> str:
    """What is said of media whose caption belongs to other media."""
    return f"no caption: {posixpath.basename(owner)} has the same name, and the caption: expected a name of its own"


def _folder(name: str) -> str:
    """The folder of a path, with a slash at its end unless it is the root."""
    return name[: name.rfind("/") + 1]


def _nearest(folder: str, tables: Mapping[str, str]) -> str | None:
    """The table in a folder, or in the nearest one above it."""
    while folder not in tables and folder:
        folder = _folder(folder.rstrip("/"))
    return tables.get(folder)


def _is_elsewhere(path: str) -> bool:
    """Whether it is a URL or a whole path, not one below the source."""
    return "://" in path or path.startswith("/")


def _no_column(where: str, what: str, name: str, there: Iterable[str], hint: str | None = None) -> str:
    hint = ": name the one of the captions with --caption-column" if hint is None else hint
    return f"{where}: has no {what} {name!r}, it has {_some([str(key) for key in there]) or 'none'}{hint}"


# Tar files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """Media or a caption in a tar; without a name, what is wrong with the tar."""

    name: str
    offset: int = 0
    size: int = 0
    text: bytes = b""
    """Of a caption, its content."""
    problem: str | None = None


class TarSource(Source):
    """WebDataset: members of a tar that have one name but for the extension are a sample. Only headers and captions are
    read here; what decodes a sample asks for its bytes alone.

    The extension is what follows the last dot, so that "take 1.0.mp4" and "take 1.5.mp4" are two samples. A sample is
    given when the next one begins, or as soon as both media and caption have come where others are between them.
    """

    def __init__(self, settings: SourceSettings, urls: list[str]) -> None:
        super().__init__(settings)
        settings.check_no(media_column="columns", split="splits")
        self.urls = self.files = urls
        self.parts = len(urls)
        self._names = _short_names(urls)
        self._check()

    @property
    def content(self) -> list[str]:
        return self._names

    def part_name(self, part: int) -> str:
        return self._names[part]

    def part_mark(self, part: int) -> str:
        return file_mark(self.urls[part])

    def read(self, part: int, start: int = 0) -> Iterator[Item]:
        return islice(self._read(part), start, None)

    def find(self, source: str) -> Item:
        for part, name in enumerate(self._names):
            if source.startswith(f"{name}/"):
                for item in self._read(part):
                    if item.source == source:
                        return item
        raise InputError(f"{self.settings.place}: has no {source}")

    def _read(self, part: int) -> Iterator[Item]:
        tar = self._names[part]
        waiting: dict[str, dict[str, Member]] = {}  # by stem and name: samples that lack media or caption
        given: dict[str, set[str]] = {}  # by stem: names of samples that are given
        before = None
        damage: list[Item] = []
        for member in self._members(part):
            if not member.name:
                damage.append(Item(tar, problem=member.problem))
                continue
            if member.problem is not None and suffix(member.name) in TEXTS:
                yield Item(f"{tar}/{printable(member.name)}", problem=member.problem)
                continue
            now = stem(member.name)
            if before is not None and before != now and _is_whole(waiting.get(before, {})):
                given[before] = set(waiting[before])
                yield from self._sample_items(part, waiting.pop(before))
            before = now
            if member.name in given.get(now, ()) or member.name in waiting.get(now, ()):
                yield Item(f"{tar}/{printable(member.name)}", problem="the tar has it twice")
            elif now in given:
                problem = "comes after the sample of its name: expected all files of a sample one behind the other"
                yield Item(f"{tar}/{printable(member.name)}", problem=problem)
            else:
                waiting.setdefault(now, {})[member.name] = member
        for members in waiting.values():
            yield from self._sample_items(part, members)
        yield from damage

    def _members(self, part: int) -> Iterator[Member]:
        """Media and captions in their order, then what is wrong with the tar."""
        try:
            system, path = open_place(self.urls[part])
            with system.open(path, "rb", block_size=HEADERS) as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    yield Member("", problem=f"the tar {POINTED}")
                    return
                total = file.seek(0, os.SEEK_END)
                file.seek(0)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    count = 0
                    while (header := tar.next()) is not None:
                        tar.members.clear()  # type: ignore[attr-defined]  # else a long tar fills the memory
                        count += 1
                        if (member := _member(tar, header, total)) is not None:
                            yield member
                    if problem := _ending(file, tar.offset, count):
                        yield Member("", problem=f"{DAMAGED_TAR}: {problem}")
        except (tarfile.TarError, EOFError) as error:
            yield Member("", problem=f"{DAMAGED_TAR}: {first_line(error)}")
        except Exception as error:  # of where it is
            whole = "range requests" in str(error)
            yield Member("", problem=f"the tar cannot be fetched: {NO_RANGES if whole else _said(error)}")

    def _sample_items(self, part: int, members: Mapping[str, Member]) -> Iterator[Item]:
        """The item of a sample, and those of media that share its name."""
        tar = self._names[part]
        found = Stem(
            [name for name in members if suffix(name) in MEDIA], [name for name in members if suffix(name) in TEXTS]
        )
        if not found.media:
            name = posixpath.splitext(found.texts[0])[0]
            yield Item(f"{tar}/{name}", problem="a caption without media: the tar has no picture or video of its name")
            return
        owner = found.owner(VIDEOS)
        member = members[owner]
        item = Item(f"{tar}/{owner}", url=self.urls[part], offset=member.offset, size=member.size)
        try:
            if member.problem is not None:
                raise ValueError(member.problem)
            text = found.caption(self.settings.order)
            if text is None:
                raise ValueError("no caption: the tar has no .txt or .json of its name")
            yield replace(item, caption=_caption_of(members[text], self.settings.caption))
        except ValueError as error:
            yield Item(f"{tar}/{printable(owner)}", problem=str(error))
        for name in found.media:
            if name != owner:
                yield Item(f"{tar}/{printable(name)}", problem=members[name].problem or shared_name(owner))

    def _check(self) -> None:
        """Raises if the beginning of the first tar that can be read shows that all is wrong."""
        place = self.settings.place
        for part in range(min(self.parts, PEEKED)):
            if found := list(islice(self._read(part), PEEKED)):
                break
        else:
            raise InputError(f"{place}: is empty: its {self.parts} tar files have no members")
        problems = [item.problem for item in found]
        if all(problem is not None and problem.startswith("the tar ") for problem in problems):
            hint = ": expected a tar file, not compressed" if str(problems[0]).startswith(DAMAGED_TAR) else ""
            raise InputError(f"{self._names[part]}: {problems[0]}{hint}")
        if all(problem is not None and problem.startswith("a caption") for problem in problems):
            raise InputError(f"{self._names[part]}: has captions and no media: expected 000.mp4 or .jpg with 000.txt")
        if all(problem is not None and problem.startswith("no caption") for problem in problems):
            hint = "" if "expected the key" not in str(problems[0]) else ", or another --caption-column"
            raise InputError(f"{found[0].source}: {problems[0]}: expected a caption with each media file{hint}")


def _member(tar: tarfile.TarFile, header: tarfile.TarInfo, total: int) -> Member | None:
    """What a header stands for; None for folders, hidden files, and what is neither media nor a caption."""
    name = posixpath.normpath(header.name) if header.name else ""
    is_text = suffix(name) in TEXTS
    if header.size < 0:
        raise tarfile.ReadError(f"{shorten(name)} has a size of {header.size}")
    if any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in name.split("/")):
        return None
    if not (is_text or suffix(name) in MEDIA) or header.isdir():
        return None
    if header.issym() or header.islnk():
        return Member(name, problem=f"is a link in the tar, to {shorten(header.linkname)}: expected a file")
    if not header.isfile() or header.issparse():
        return Member(name, problem="is no plain file in the tar: expected one")
    if problem := name_problem(name):
        return Member(name, problem=problem)
    if header.offset_data + header.size > total:
        return Member(name, problem="the tar breaks off in it: expected the whole file")
    content = tar.extractfile(header) if is_text else None
    text = b"" if content is None else content.read(MOST_TEXT + 1)
    return Member(name, header.offset_data, header.size, text)


def _ending(file: Any, offset: int, members: int) -> str | None:
    """What is wrong behind a tar's last member, where tarfile stops without a word."""
    file.seek(offset)
    rest = file.read(HEADERS)
    if not rest.strip(b"\0"):
        return None if len(rest) >= tarfile.BLOCKSIZE else f"it breaks off after {members} members"
    if rest[: tarfile.BLOCKSIZE].strip(b"\0"):
        return f"no header is behind the first {members} members"
    return f"more is behind its end, after {members} members: expected one tar, not several in one file"


def _is_whole(members: Collection[str]) -> bool:
    """Whether media and a caption are among the members of a sample."""
    kinds = {suffix(name) for name in members}
    return not kinds.isdisjoint(MEDIA) and not kinds.isdisjoint(TEXTS)


def _caption_of(member: Member, key: str) -> str:
    try:
        return caption_from(member.text, member.name, key)
    except ValueError as error:
        raise ValueError(f"no caption: {error}") from None


def _short_names(urls: list[str]) -> list[str]:
    """Paths below the folder that all share."""
    folders = [url.split("/")[:-1] for url in urls]
    shared = 0
    while all(len(parts) > shared for parts in folders) and len({parts[shared] for parts in folders}) == 1:
        shared += 1
    return ["/".join(url.split("/")[shared:]) for url in urls]


# Tables of Hugging Face datasets -------------------------------------------------------------------------------------


class TableSource(Source):
    """A dataset that `datasets` opens: streamed Parquet, local or remote, or what save_to_disk wrote. Media are bytes,
    paths or both, as its Image and Video columns hold them, never decoded by it."""

    def __init__(self, settings: SourceSettings, table: Any, base: str, files: Sequence[str] = ()) -> None:
        """Relative paths in the table are below `base`; `files` that it is read from."""
        super().__init__(settings)
        self.base, self.files = base, files
        self.streamed = not hasattr(table, "__len__")
        features = table.features or table._resolve_features().features
        self.media, self.caption = self._columns(features)
        if type(features[self.media]).__name__ in ("Image", "Video"):
            table = table.cast_column(self.media, type(features[self.media])(decode=False))
        self.table = table.select_columns([self.media, self.caption])
        self.parts = table.num_shards if self.streamed else max(1, -(-len(table) // ROWS))
        self.total = None if self.streamed else len(table)
        first: list[Item] = []
        for part in range(min(self.parts, PEEKED)):
            first += islice(self.read(part), PEEKED)
            if any(item.problem is None for item in first):
                break
        if not first:
            raise InputError(f"{settings.place}: is empty: expected rows with {self.media} and {self.caption}")
        if all(item.problem is not None for item in first):
            raise InputError(f"{settings.place}: {first[0].problem} in its first {len(first)} rows")

    @property
    def content(self) -> list[str]:
        names = _short_names(list(self.files))
        return [self.media, self.caption, f"{self.parts} parts", f"{self.total} rows", *names]

    def part_name(self, part: int) -> str:
        return f"{part:05d}"

    def part_mark(self, part: int) -> str:
        """Of a dataset of the hub, that it has as many parts and rows: it is not streamed again to look."""
        if len(self.files) == self.parts:
            return file_mark(self.files[part])
        return f"elsewhere:{'/'.join(self.content)}" if self.streamed else ""

    def read(self, part: int, start: int = 0) -> Iterator[Item]:
        if self.streamed:
            rows = self.table.shard(self.parts, part)
            rows = rows.skip(start) if start else rows
        else:
            rows = self.table.select(range(min(len(self.table), part * ROWS + start), self._end(part)))
        number = start
        try:
            for number, row in enumerate(rows, start=start):
                yield self._item(f"{part:05d}:{number:05d}", row)
        except Exception as error:  # of the file or of where it is
            name = f"{_short_names(list(self.files))[part]} " if len(self.files) == self.parts else ""
            yield Item(f"{part:05d}", problem=f"{name}cannot be read on after row {number}: {_said(error)}")

    def find(self, source: str) -> Item:
        part, _, number = source.partition(":")
        if part.isdecimal() and number.isdecimal() and int(part) < self.parts:
            for item in self.read(int(part), int(number)):
                return item
        raise InputError(f"{self.settings.place}: has no {source}")

    def _end(self, part: int) -> int:
        return min(len(self.table), (part + 1) * ROWS)

    def _item(self, source: str, row: Mapping[str, Any]) -> Item:
        try:
            caption = caption_text(row[self.caption])
        except ValueError as error:
            return Item(source, problem=f"no caption: the column {self.caption} {error}")
        value = row[self.media]
        if isinstance(value, str):
            value = {"path": value}
        elif isinstance(value, bytes):
            value = {"bytes": value}
        if isinstance(value, dict) and value.get("bytes"):
            return Item(source, caption, data=value["bytes"])
        if isinstance(value, dict) and value.get("path"):
            return self._path_item(source, caption, value["path"])
        what = "is empty" if not value or isinstance(value, dict) else f"is {kind_of(value)}: expected bytes or a path"
        return Item(source, problem=f"no media: the column {self.media} {what}")

    def _path_item(self, source: str, caption: str, path: object) -> Item:
        """The item of a row that names its file."""
        if not isinstance(path, str) or name_problem(path):
            return Item(source, problem=f"no media: its path is {shorten(str(path))}: expected a name in UTF-8")
        if _is_elsewhere(path):
            return Item(source, caption, url=path)
        path = posixpath.normpath(path.replace("\\", "/"))
        if path.startswith("../"):
            return Item(source, problem=f"no media: {shorten(path)} is not below the dataset: expected a path in it")
        return Item(source, caption, url=join(self.base, path))

    def _columns(self, features: Mapping[str, Any]) -> tuple[str, str]:
        place, settings = self.settings.place, self.settings
        if settings.caption not in features:
            raise InputError(_no_column(place, "column", settings.caption, features))
        if settings.media_column is not None:
            if settings.media_column not in features:
                hint = ": name the one of the media with --media-column"
                raise InputError(_no_column(place, "column", settings.media_column, features, hint))
            return settings.media_column, settings.caption
        found = [name for name, kind in features.items() if _holds_media(kind)]
        named = ("video", "image", FILE_NAME)
        found = found or [name for name in named if getattr(features.get(name), "dtype", None) == "string"]
        if len(found) != 1:
            what = (
                f"several columns of media ({', '.join(found)})" if found else f"no column of media ({_some(features)})"
            )
            raise InputError(f"{place}: has {what}: name one with --media-column")
        return found[0], settings.caption


def _holds_media(kind: Any) -> bool:
    """Whether a column is of pictures, videos, bytes, or bytes with a path."""
    if type(kind).__name__ in ("Image", "Video"):
        return True
    if isinstance(kind, dict):
        return {"bytes", "path"} <= set(kind)
    return getattr(kind, "dtype", None) in ("binary", "large_binary")


def _load_parquet(urls: list[str]) -> Any:
    """With the columns of the first file that tells them: one that is damaged is found out when it is read."""
    import pyarrow.parquet as pq

    if is_pointer(Item(urls[0], url=urls[0])):
        raise InputError(f"{urls[0]}: {POINTED}")

    def load(datasets: Any) -> Any:
        features = None
        for url in urls[:PEEKED]:
            system, path = open_place(url)
            with suppress(Exception), system.open(path, "rb") as file:
                features = datasets.Features.from_arrow_schema(pq.read_schema(file))
                break
        return datasets.load_dataset("parquet", data_files=urls, features=features, split="train", streaming=True)

    return _loaded(urls[0], load)


def _load_hub(name: str, settings: SourceSettings) -> Any:
    return _loaded(
        f"hf://{name}",
        lambda datasets: datasets.load_dataset(name, settings.config, split=settings.split, streaming=True),
    )


def _load_saved(settings: SourceSettings) -> Any:
    place, split = settings.place, settings.split
    table = _loaded(place, lambda datasets: datasets.load_from_disk(place))
    if not isinstance(table, dict):
        settings.check_no(split="splits")
        return table
    if split not in table:
        raise InputError(f"{place}: has no split {split!r}, it has {_some(list(table))}: name one with --split")
    return table[split]


def _loaded(place: str, load: Any) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{place}: needs the package datasets: {install_command('data')}") from error
    try:
        return load(datasets)
    except Exception as error:  # of many kinds: no such name, no network, no such split, a damaged file
        if (match := CONFIGS.search(str(error))) is not None:
            there = match[1].replace("'", "")
            raise InputError(f"{place}: has the configurations {there}: name one of them with --config") from None
        raise InputError(f"{place}: cannot be opened as a Hugging Face dataset: {_said(error)}") from None
