"""Where encoding begins: a folder, tar files or a Hugging Face dataset, as items with captions, in the same order in
every run.

    open_source(SourceSettings("clips/")).items()  ->  Iterator[Item]

A source has parts, read one after the other: a folder is one, and so is a tar or a Parquet file. The items of a part
are numbered in groups, which is what encoding finishes, and takes up again after a stop. What is wrong with a single
item is its `problem`; what is wrong with the source as a whole is an InputError before the work.
Every place is a path or a URL that fsspec opens.
"""

import csv
import io
import json
import os
import posixpath
import re
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, islice
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, unquote

from nova_video.data.dataset import is_local, join, open_place, read_file
from nova_video.data.stages import MEDIA, NO_RANGES, VIDEOS, Item, caption_from, clean_caption
from nova_video.errors import InputError, first_line
from nova_video.settings import check_number

CAPTION, FILE_NAME = "caption", "file_name"  # columns, unless others are named
TEXTS = (".txt", ".json")
TABLES = ("metadata.csv", "metadata.jsonl")
HUB = re.compile(r"hf://(?:datasets/)?([\w-][\w.-]*(?:/[\w-][\w.-]*)?)/?")
CONFIGS = re.compile(r"(?:available configs|not found\. Available): \[(.+?)\]")  # of what `datasets` says
PEEKED = 16  # items that are looked into before the work
HEADERS = 1 << 16  # bytes that are read at once where a tar is elsewhere: its members are asked for by themselves
ROWS = 1024  # of a saved dataset, in a part
WEB = ("http://", "https://")
DAMAGED_TAR = "the tar cannot be read on"
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
        object.__setattr__(self, "place", self.place.rstrip("/") or self.place)  # the same place, and known as that
        first, chained, _ = self.place.partition("::")
        if chained and "://" in first:  # what is in it would be named without the rest
            raise InputError(f"{self.place}: is in an archive: expected {WHAT_THERE_IS}, none of them in another file")

    @property
    def caption(self) -> str:
        return self.caption_column or CAPTION

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
    found = _walk(root) if is_local(system) else system.find(root)
    names = sorted(path[len(root.rstrip("/")) + 1 :] for path in found)
    names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    if "dataset.json" in names and any(name.startswith("data/") for name in names):
        raise InputError(f"{place}: is a dataset that `nova encode` wrote: expected {WHAT_THERE_IS}")
    if "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= set(names):
        return TableSource(settings, _load_saved(settings), place)
    media = [name for name in names if _suffix(name) in MEDIA]
    packed = {kind: [name for name in names if _suffix(name) == kind] for kind in (".tar", ".parquet")}
    kinds = [*(["media"] if media else []), *(f"{kind} files" for kind, found in packed.items() if found)]
    if len(kinds) > 1:
        raise InputError(f"{place}: holds {' and '.join(kinds)}: name one kind, such as {join(place, '*.tar')}")
    for found in packed.values():
        if found:
            return _open_files(settings, [_url(system, f"{root.rstrip('/')}/{name}") for name in found])
    root = _url(system, root)
    if root.startswith(WEB):  # it lists names as they stand in URLs
        names, media = [unquote(name) for name in names], [unquote(name) for name in media]
    return FolderSource(settings, root, names, media)


def _walk(root: str) -> Iterator[str]:
    """All files in a local folder and those in it, links to folders too: each folder once, whatever leads to it."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (f"{folder.rstrip('/')}/{name}" for name in files)


def _open_files(settings: SourceSettings, urls: list[str]) -> Source:
    kinds = {_suffix(url) for url in urls}
    if kinds == {".tar"}:
        return TarSource(settings, urls)
    if kinds == {".parquet"}:
        base = settings.place if _suffix(settings.place) != ".parquet" else settings.place.rpartition("/")[0]
        settings.check_no(split="splits")
        return TableSource(settings, _load_parquet(urls), base, urls)
    found = next(url for url in urls if _suffix(url) not in (".tar", ".parquet") or len(kinds) > 1)
    raise InputError(f"{settings.place}: got the file {found}: expected {WHAT_THERE_IS}")


def _url(system: Any, path: str) -> str:
    """What opens a path again: itself if it is local."""
    return path if is_local(system) else system.unstrip_protocol(path)


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _said(error: Exception) -> str:
    """In one line."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return first_line(error)


def _some(names: Collection[str]) -> str:
    shown = sorted(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# A folder ------------------------------------------------------------------------------------------------------------


class FolderSource(Source):
    """Media files in a folder and all folders in it, with a caption beside each, or a table of captions."""

    parts = 1

    def __init__(self, settings: SourceSettings, root: str, names: list[str], media: list[str]) -> None:
        super().__init__(settings)
        settings.check_no(media_column="columns", split="splits")
        self.root = root
        tables = [name for name in names if name in TABLES]
        if len(tables) > 1:
            raise InputError(f"{settings.place}: has {' and '.join(tables)}: expected one of them")
        found = self._listed(tables[0], media) if tables else self._beside(names, media)
        self._items = {item.source: item for item in sorted(found, key=lambda item: item.source)}
        self.total = len(self._items)
        self.files = [
            *(self._url(table) for table in tables),
            *(url for item in self._items.values() for url in (item.url, item.caption_url) if url is not None),
        ]

    @property
    def content(self) -> list[str]:
        return list(self._items)

    def read(self, part: int, start: int = 0) -> Iterator[Item]:
        return islice(self._items.values(), start, None)

    def find(self, source: str) -> Item:
        if source not in self._items:
            raise InputError(f"{self.settings.place}: has no {source}")
        return self._items[source]

    def _url(self, name: str) -> str:
        return join(self.root, quote(name) if self.root.startswith(WEB) else name)

    def _item(self, name: str) -> Item:
        return Item(name, url=self._url(name))

    def _beside(self, names: list[str], media: list[str]) -> Iterable[Item]:
        """Each with the .txt or .json of its stem, the .json first if a key is named."""
        place = self.settings.place
        texts = {name for name in names if _suffix(name) in TEXTS}
        named = {_stem(name) + _suffix(name): name for name in sorted(texts)}  # cameras and Windows write A.TXT
        if not media:
            if texts:
                raise InputError(
                    f"{place}: has {len(texts)} captions and no media: expected a picture or video beside each, such as"
                    f" {_stem(min(texts))}.mp4 for {min(texts)}"
                )
            raise InputError(
                f"{place}: is empty: expected {WHAT_THERE_IS}"
                if not names
                else f"{place}: holds no media ({_some(names)}): expected {WHAT_THERE_IS}"
            )
        order = TEXTS if self.settings.caption_column is None else tuple(reversed(TEXTS))
        captions = {
            name: next((named[text] for suffix in order if (text := _stem(name) + suffix) in named), None)
            for name in media
        }
        used = [text for text in captions.values() if text is not None]
        if not used:
            example = media[0]
            raise InputError(
                f"{place}: has {len(media)} media files and no captions: expected a .txt or .json beside each"
                f" ({_stem(example)}.txt for {example}), or metadata.csv with {FILE_NAME} and {self.settings.caption}"
            )
        self._check_keys([text for text in used if _suffix(text) == ".json"])
        for name, beside in captions.items():
            if beside is None:
                yield replace(self._item(name), problem="no caption: there is no .txt or .json of its name beside it")
            else:
                yield replace(self._item(name), caption_url=self._url(beside), caption_key=self.settings.caption)
        stems = {_stem(name) for name in media}
        for orphan in texts:
            if _stem(orphan) not in stems:
                yield Item(orphan, problem="a caption without media: nothing of its name is beside it")

    def _check_keys(self, texts: list[str]) -> None:
        """Raises if no JSON file looked into has the key."""
        keys: set[str] = set()
        for text in texts[:PEEKED]:
            try:
                values = json.loads(read_file(self._url(text)))
            except (OSError, ValueError):
                return
            if not isinstance(values, dict) or self.settings.caption in values:
                return
            keys |= set(values)
        if texts:
            raise InputError(_no_column(f"{self.settings.place}: {texts[0]}", "key", self.settings.caption, keys))

    def _listed(self, table: str, media: list[str]) -> Iterable[Item]:
        """Those of a table with columns for file and caption."""
        where = self._url(table)
        rows = _read_csv(where) if table.endswith(".csv") else _read_json_lines(where)
        columns = {key: None for row in rows for key in row}
        for column in (FILE_NAME, self.settings.caption):
            if rows and column not in columns:
                hint = "" if column == FILE_NAME else None
                raise InputError(_no_column(where, "column", column, columns, hint))
        if not rows:
            raise InputError(f"{where}: has no rows: expected {FILE_NAME} and {self.settings.caption} of each file")
        there = set(media)
        if not there and not any(_is_elsewhere(str(row.get(FILE_NAME))) for row in rows):
            raise InputError(
                f"{self.settings.place}: {table} has {len(rows)} captions, and there are no media: expected the files"
                f" that it names, such as {rows[0].get(FILE_NAME)}"
            )
        if all(not clean_caption(row.get(self.settings.caption)) for row in rows):
            raise InputError(f"{where}: the column {self.settings.caption} is empty: expected a caption in each row")
        listed = set()
        for number, row in enumerate(rows, start=1):
            name = row.get(FILE_NAME)
            if not isinstance(name, str) or not name:
                yield Item(f"{table}:{number}", problem=f"its row has no {FILE_NAME}")
                continue
            elsewhere = _is_elsewhere(name)
            name = name if elsewhere else posixpath.normpath(name)
            if name in listed:
                yield Item(f"{table}:{number}", problem=f"{name} has a row before this one")
                continue
            listed.add(name)
            item = Item(name, clean_caption(row.get(self.settings.caption)), name) if elsewhere else self._item(name)
            item = replace(item, caption=clean_caption(row.get(self.settings.caption)))
            if not elsewhere and name not in there:
                if name.startswith("../"):
                    reason = "is not below the folder: expected a path in it, or a whole one"
                elif _suffix(name) in MEDIA:
                    reason = "there is no such file"
                else:
                    reason = f"{_suffix(name) or 'no extension'} is no known format"
                item = replace(item, problem=f"is in {table}, but {reason}")
            yield item
        for name in there - listed:
            yield replace(self._item(name), problem=f"no caption: it is not in {table}")


def _is_elsewhere(path: str) -> bool:
    """Whether it is a URL or a whole path, not one below the source."""
    return "://" in path or path.startswith("/")


def _stem(name: str) -> str:
    """A path without its extension."""
    return str(PurePosixPath(name).with_suffix(""))


def _no_column(where: str, what: str, name: str, there: Iterable[str], hint: str | None = None) -> str:
    hint = ": name the one of the captions with --caption-column" if hint is None else hint
    return f"{where}: has no {what} {name!r}, it has {_some([str(key) for key in there]) or 'none'}{hint}"


def _read_csv(where: str) -> list[dict[str, Any]]:
    try:
        rows = list(csv.DictReader(io.StringIO(read_file(where).decode("utf-8-sig"), newline="")))
    except (ValueError, csv.Error) as error:
        raise InputError(f"{where}: not readable as CSV ({error})") from None
    return [{key: value for key, value in row.items() if key is not None} for row in rows]


def _read_json_lines(where: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(read_file(where).decode("utf-8-sig", "replace").split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{where}: line {number} is not JSON ({error})") from None
            if not isinstance(row, dict):
                raise InputError(f"{where}: line {number} is {line[:40]}: expected an object")
            rows.append(row)
    return rows


# Tar files -----------------------------------------------------------------------------------------------------------


class TarSource(Source):
    """WebDataset: the members of a tar with the same name up to its first dot are one sample. Only headers and captions
    are read here; what decodes a sample asks for its bytes alone."""

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
        name, seen = self._names[part], set()
        try:
            for key, members in groupby(self._members(part), key=lambda member: _sample_key(member[0])):
                item = self._item(part, f"{name}/{key}", list(members))
                if item.source in seen:
                    item = replace(item, problem="the tar has it twice, and not one behind the other")
                seen.add(item.source)
                yield item
        except tarfile.TarError as error:
            yield Item(name, problem=f"{DAMAGED_TAR}: {first_line(error)}")
        except Exception as error:  # of where it is
            whole = "range requests" in str(error)
            yield Item(name, problem=f"the tar cannot be fetched: {NO_RANGES if whole else _said(error)}")

    def _members(self, part: int) -> Iterator[tuple[str, tarfile.TarInfo, bytes | None]]:
        """Name, header and, of captions, content."""
        system, path = open_place(self.urls[part])
        with system.open(path, "rb", block_size=HEADERS) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else a long tar fills the memory
                name = member.name.removeprefix("./")
                if not member.isfile() or PurePosixPath(name).name.startswith("."):
                    continue
                content = tar.extractfile(member) if _suffix(name) in TEXTS else None
                yield name, member, None if content is None else content.read()

    def _item(self, part: int, source: str, members: list[tuple[str, tarfile.TarInfo, bytes | None]]) -> Item:
        media = [(name, member) for name, member, _ in members if _suffix(name) in MEDIA]
        texts = {_suffix(name): (name, content) for name, _, content in members if content is not None}
        if not media:
            return Item(source, problem="a caption without media: the tar has no picture or video of its name")
        name, member = min(media, key=lambda pair: _suffix(pair[0]) not in VIDEOS)
        item = Item(f"{self._names[part]}/{name}", url=self.urls[part], offset=member.offset_data, size=member.size)
        order = TEXTS if self.settings.caption_column is None else tuple(reversed(TEXTS))
        text = next((texts[suffix] for suffix in order if suffix in texts), None)
        if text is None:
            return replace(item, problem="no caption: the tar has no .txt or .json of its name")
        try:
            return replace(item, caption=caption_from(text[1] or b"", text[0], self.settings.caption))
        except ValueError as error:
            return replace(item, problem=f"no caption: {error}")

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


def _sample_key(name: str) -> str:
    """A member's name up to the first dot after the last slash."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.split(".")[0]


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
        value, caption = row[self.media], clean_caption(row[self.caption])
        if not caption:
            return Item(source, problem=f"no caption: the column {self.caption} is empty")
        if isinstance(value, str):
            value = {"path": value}
        elif isinstance(value, bytes):
            value = {"bytes": value}
        if isinstance(value, dict) and value.get("bytes"):
            return Item(source, caption, data=value["bytes"])
        if isinstance(value, dict) and value.get("path"):
            path = value["path"]
            return Item(source, caption, url=path if _is_elsewhere(path) else join(self.base, path))
        return Item(source, problem=f"no media: the column {self.media} is empty")

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
        raise InputError(f"{place}: needs the package datasets: pip install 'nova-video[data]'") from error
    try:
        return load(datasets)
    except Exception as error:  # of many kinds: no such name, no network, no such split, a damaged file
        if (match := CONFIGS.search(str(error))) is not None:
            there = match[1].replace("'", "")
            raise InputError(f"{place}: has the configurations {there}: name one of them with --config") from None
        raise InputError(f"{place}: cannot be opened as a Hugging Face dataset: {_said(error)}") from None
