"""Tables of Hugging Face datasets: streamed Parquet, datasets of the hub, or what save_to_disk wrote."""

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

from nova_video.common.errors import InputError
from nova_video.common.extras import install_command
from nova_video.data.dataset import file_mark, join, open_place
from nova_video.data.sidecars import FILE_NAME, caption_text, kind_of, shorten
from nova_video.data.sources.source import (
    MOST_LOOKS,
    MediaSource,
    SourceSettings,
    is_elsewhere,
    name_problem,
    no_column,
    one_line,
    short_names,
    some_names,
)
from nova_video.data.stages import Item, is_pointer
from nova_video.io.text import POINTER_ERROR

CONFIGS = re.compile(r"(?:available configs|not found\. Available): \[(.+?)\]")  # of what `datasets` says
ROWS = 1024  # of a saved dataset, in a part


class TableSource(MediaSource):
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
        for part in range(min(self.parts, MOST_LOOKS)):
            first += islice(self.read(part), MOST_LOOKS)
            if any(item.problem is None for item in first):
                break
        if not first:
            raise InputError(f"{settings.place}: is empty: expected rows with {self.media} and {self.caption}")
        if all(item.problem is not None for item in first):
            raise InputError(f"{settings.place}: {first[0].problem} in its first {len(first)} rows")

    @property
    def content(self) -> list[str]:
        names = short_names(list(self.files))
        return [self.media, self.caption, f"{self.parts} parts", f"{self.total} rows", *names]

    def part_name(self, part: int) -> str:
        return f"{part:05d}"

    def part_mark(self, part: int) -> str:
        """The mark of a part's file; for a dataset of the hub the number of its parts and rows."""
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
            name = f"{short_names(list(self.files))[part]} " if len(self.files) == self.parts else ""
            yield Item(f"{part:05d}", problem=f"{name}cannot be read on after row {number}: {one_line(error)}")

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
        if is_elsewhere(path):
            return Item(source, caption, url=path)
        path = posixpath.normpath(path.replace("\\", "/"))
        if path.startswith("../"):
            return Item(source, problem=f"no media: {shorten(path)} is not below the dataset: expected a path in it")
        return Item(source, caption, url=join(self.base, path))

    def _columns(self, features: Mapping[str, Any]) -> tuple[str, str]:
        place, settings = self.settings.place, self.settings
        if settings.caption not in features:
            raise InputError(no_column(place, "column", settings.caption, features))
        if settings.media_column is not None:
            if settings.media_column not in features:
                hint = ": name the one of the media with --media-column"
                raise InputError(no_column(place, "column", settings.media_column, features, hint))
            return settings.media_column, settings.caption
        found = [name for name, kind in features.items() if _holds_media(kind)]
        named = ("video", "image", FILE_NAME)
        found = found or [name for name in named if getattr(features.get(name), "dtype", None) == "string"]
        if len(found) != 1:
            what = (
                f"several columns of media ({', '.join(found)})"
                if found
                else f"no column of media ({some_names(features)})"
            )
            raise InputError(f"{place}: has {what}: name one with --media-column")
        return found[0], settings.caption


def _holds_media(kind: Any) -> bool:
    """True for a column of pictures, videos, bytes, or bytes with a path."""
    if type(kind).__name__ in ("Image", "Video"):
        return True
    if isinstance(kind, dict):
        return {"bytes", "path"} <= set(kind)
    return getattr(kind, "dtype", None) in ("binary", "large_binary")


def load_parquet(urls: list[str]) -> Any:
    """The table of Parquet files, with the columns of the first one that can be read."""
    import pyarrow.parquet as pq

    if is_pointer(Item(urls[0], url=urls[0])):
        raise InputError(f"{urls[0]}: {POINTER_ERROR}")

    def load(datasets: Any) -> Any:
        features = None
        for url in urls[:MOST_LOOKS]:
            system, path = open_place(url)
            with suppress(Exception), system.open(path, "rb") as file:
                features = datasets.Features.from_arrow_schema(pq.read_schema(file))
                break
        return datasets.load_dataset("parquet", data_files=urls, features=features, split="train", streaming=True)

    return _load_table(urls[0], load)


def load_hub(name: str, settings: SourceSettings) -> Any:
    return _load_table(
        f"hf://{name}",
        lambda datasets: datasets.load_dataset(name, settings.config, split=settings.split, streaming=True),
    )


def load_saved(settings: SourceSettings) -> Any:
    place, split = settings.place, settings.split
    table = _load_table(place, lambda datasets: datasets.load_from_disk(place))
    if not isinstance(table, dict):
        settings.check_no(split="splits")
        return table
    if split not in table:
        raise InputError(f"{place}: has no split {split!r}, it has {some_names(list(table))}: name one with --split")
    return table[split]


def _load_table(place: str, load: Any) -> Any:
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
        raise InputError(f"{place}: cannot be opened as a Hugging Face dataset: {one_line(error)}") from None
