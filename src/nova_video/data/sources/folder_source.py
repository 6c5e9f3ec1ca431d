"""A folder of media: with a caption beside each file, or with tables of captions (metadata.csv or .jsonl)."""

import posixpath
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from urllib.parse import quote

from nova_video.common.errors import InputError
from nova_video.data.dataset import join, read_file
from nova_video.data.sidecars import (
    FILE_NAME,
    Stem,
    TableRow,
    caption_text,
    kind_of,
    read_table,
    shorten,
    stem,
    suffix,
)
from nova_video.data.sources.source import (
    MOST_LOOKS,
    TEXTS,
    WHAT_THERE_IS,
    MediaSource,
    SourceSettings,
    is_elsewhere,
    name_problem,
    no_column,
    shared_name,
    some_names,
)
from nova_video.data.stages import MEDIA, Item
from nova_video.io.decode import VIDEOS
from nova_video.io.text import decode_text, parse_json, printable

TABLES = ("metadata.csv", "metadata.jsonl")
LONGEST_NAME = 200  # letters of a name that is no file's, in a list of problems
WEB = ("http://", "https://")


class FolderSource(MediaSource):
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
                else f"{place}: holds no media ({some_names(names)}): expected {WHAT_THERE_IS}"
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
        for text in texts[:MOST_LOOKS]:
            try:
                values = parse_json(decode_text(read_file(self._url(text))))
            except (OSError, ValueError):
                return
            if not isinstance(values, dict) or self.settings.caption in values:
                return
            keys |= set(values)
        if texts:
            raise InputError(no_column(f"{self.settings.place}: {texts[0]}", "key", self.settings.caption, keys))

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
                raise InputError(no_column(where, "column", column, found.columns, hint))
        names = [row.values.get(FILE_NAME) for row in found.rows]
        if not self._media and not self._odd and not any(is_elsewhere(str(name)) for name in names):
            raise InputError(
                f"{self.settings.place}: {table} has {len(names)} captions, and there are no media: expected the files"
                f" that it names, such as {shorten(str(names[0]))}"
            )
        if all(row.problem is None and not row.values.get(caption) for row in found.rows):
            raise InputError(f"{where}: the column {caption} is empty: expected a caption in each row")
        return [self._row_item(table, row) for row in found.rows]

    def _row_item(self, table: str, row: TableRow) -> Item:
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
        is_url = is_elsewhere(name)
        is_there = name in self._odd or self._there.get(name) == name
        if row.problem is not None and not is_there:
            return Item(numbered, problem=row.problem)
        if name in self._listed:
            return Item(numbered, problem=f"{shorten(name)} has a row before this one")
        self._listed.add(name)
        if not is_there and not is_url:
            return Item(shorten(name, LONGEST_NAME), problem=f"is in {table}, but {_no_such_media(name)}")
        try:
            if row.problem is not None or name in self._odd:
                raise ValueError(row.problem or self._odd[name])
            return Item(name, self._row_caption(table, row), url=name if is_url else self._url(name))
        except ValueError as error:
            return self._rejected(name, str(error))

    def _row_caption(self, table: str, row: TableRow) -> str:
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
        if is_elsewhere(name):
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


def _folder(name: str) -> str:
    """The folder of a path, with a slash at its end unless it is the root."""
    return name[: name.rfind("/") + 1]


def _nearest(folder: str, tables: Mapping[str, str]) -> str | None:
    """The table in a folder, or in the nearest one above it."""
    while folder not in tables and folder:
        folder = _folder(folder.rstrip("/"))
    return tables.get(folder)
