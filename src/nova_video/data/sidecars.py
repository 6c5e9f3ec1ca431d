"""Captions beside media: text and JSON files, and tables in CSV or JSON lines.

`sources.py` finds the files; here their bytes become captions. What is wrong with one file or row is a ValueError or
the row's `problem`, for its own media alone; what is wrong with a whole table is an InputError.
"""

import csv
import io
import posixpath
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from nova_video.common import checks
from nova_video.common.errors import InputError
from nova_video.io.text import EXPECTED_TEXT, decode_text, parse_json, printable

FILE_NAME = "file_name"  # the column of a table that names its media
DELIMITERS = ",;\t"  # of a CSV file, whichever its first row is written with
MOST_TEXT = 4 << 20  # bytes of one caption's file: a longer one is something else
MOST_SHOWN = 40  # letters of a wrong value that are shown


@dataclass(frozen=True)
class TableRow:
    """A row of a table by its columns."""

    number: int
    """Number of the row in a CSV file, without the header, or of the line in JSON lines."""
    values: dict[str, Any]
    problem: str | None = None
    """Why it cannot be used, if its values are wrong or cut."""
    is_short: bool = False
    """True if it has fewer cells than columns: it may belong to the row before."""


def caption_text(value: object) -> str:
    """A caption in one line; of a list, the first caption. ValueError says what the value is instead."""
    if isinstance(value, list | tuple) and value:
        if not isinstance(value[0], str):
            raise ValueError(f"is a list that begins with {kind_of(value[0])}: expected text")
        value = value[0]
    if not isinstance(value, str):
        raise ValueError(f"is {kind_of(value)}: expected text")
    check_unicode(value)
    text = " ".join(value.split())
    if not text:
        raise ValueError("is empty")
    return text


def check_unicode(text: str) -> None:
    """Raises ValueError for text that no file can hold: NUL, lone surrogates, bytes that are not UTF-8."""
    if "\0" in text:
        raise ValueError("holds NUL characters: expected text")
    if not text.isascii() and (wrong := re.search("[\ud800-\udfff]", text)):
        is_byte = 0xDC80 <= ord(wrong[0]) <= 0xDCFF
        what = "is not UTF-8" if is_byte else "holds half of a pair of surrogates"
        raise ValueError(f"{what} ({printable(wrong[0])}): {EXPECTED_TEXT if is_byte else 'expected text'}")


def kind_of(value: object) -> str:
    """The kind of a value, for a message."""
    if isinstance(value, dict):
        return f"an object (keys {shorten(', '.join(map(str, value)))})" if value else "an object without keys"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return f"the number {shorten(str(value))}"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    return f"of type {type(value).__name__}"


def shorten(text: str, letters: int = MOST_SHOWN) -> str:
    """Text for a message: printable, and cut where it is long."""
    return checks.shorten(printable(text), letters)


def caption_from(data: bytes, name: str, key: str) -> str:
    """The caption in a text file, or under a key of a JSON file; ValueError for what is none."""
    if len(data) > MOST_TEXT:
        raise ValueError(f"{name} has more than {MOST_TEXT >> 20} MB: expected a caption")
    try:
        text = decode_text(data)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None
    if suffix(name) != ".json":
        return _caption_named("it", text)
    try:
        values = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    if not isinstance(values, dict) or key not in values:
        has = f"has {shorten(', '.join(map(str, values))) or 'no keys'}" if isinstance(values, dict) else "is no object"
        raise ValueError(f"{name} {has}: expected the key {key}")
    return _caption_named(key, values[key])


def _caption_named(name: str, value: object) -> str:
    try:
        return caption_text(value)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


@dataclass(frozen=True)
class Table:
    """The contents of metadata.csv or metadata.jsonl."""

    columns: list[str]
    rows: list[TableRow]


def read_table(data: bytes, where: str, wanted: Collection[str]) -> Table:
    """The rows of a table that should have the wanted columns."""
    try:
        text = decode_text(data, lenient=True)  # what is wrong with a cell costs its row alone
    except ValueError as error:
        raise InputError(f"{where} {error}") from None
    return _read_csv(text, where, wanted) if where.lower().endswith(".csv") else _read_json_lines(text, where)


def _read_csv(text: str, where: str, wanted: Collection[str]) -> Table:
    """Rows by the delimiter that the header is written with; those with too many or too few cells are problems."""
    lines = (io.StringIO(text, newline="") for _ in DELIMITERS)
    readers = [
        csv.reader(line, delimiter=delimiter, strict=True, skipinitialspace=True)
        for line, delimiter in zip(lines, DELIMITERS, strict=True)
    ]
    headers = [_read_header(reader) for reader in readers]
    header = max(headers, key=lambda header: len({*header} & {*wanted}))
    if not header and text.strip():
        raise InputError(f"{where}: its first row is not readable as CSV: expected the names of columns")
    for column in wanted:
        if header.count(column) > 1:
            raise InputError(f"{where}: has the column {column!r} {header.count(column)} times: expected one")
    rows = list(_csv_rows(readers[headers.index(header)], header))
    for number, (row, following) in enumerate(pairwise(rows)):
        if row.problem is None and following.is_short:
            problem = f"row {following.number} behind it is no whole row: expected quotes around text of several lines"
            rows[number] = replace(row, problem=problem)
    return Table(header, rows)


def _read_header(reader: Iterator[list[str]]) -> list[str]:
    """The first row that is not empty; none where it cannot be read."""
    try:
        return next(([cell.strip() for cell in cells] for cells in reader if cells), [])
    except csv.Error:
        return []


def _csv_rows(reader: Iterator[list[str]], header: list[str]) -> Iterator[TableRow]:
    number = 0
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # reading goes on with the next line
            number += 1
            yield TableRow(number, {}, f"row {number} is not readable as CSV: {error}")
            continue
        if not cells:
            continue
        number += 1
        problem = None
        if len(cells) != len(header):
            what = "quotes around text with a delimiter in it" if len(cells) > len(header) else "a cell for each"
            counted = f"{len(cells)} cell{'s' if len(cells) > 1 else ''} for {len(header)} columns"
            problem = f"row {number} has {counted}: expected {what}"
        yield TableRow(number, dict(zip(header, cells, strict=False)), problem, len(cells) < len(header))


def _read_json_lines(text: str, where: str) -> Table:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = parse_json(line)
        except ValueError as error:
            rows.append(TableRow(number, {}, f"line {number} is not JSON ({error})"))
            continue
        if isinstance(values, dict):
            rows.append(TableRow(number, values))
        else:
            rows.append(TableRow(number, {}, f"line {number} is {shorten(line)}: expected an object"))
    if rows and all(row.problem is not None for row in rows):
        raise InputError(f"{where}: {rows[0].problem}")
    return Table(list(dict.fromkeys(key for row in rows for key in row.values)), rows)


@dataclass
class Stem:
    """Media and captions that have one name but for their extensions."""

    media: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def owner(self, preferred: Collection[str]) -> str:
        """The media that the caption is of: the first one with a preferred extension, else the first."""
        return min(self.media, key=lambda name: (suffix(name) not in preferred, name))

    def caption(self, order: Sequence[str]) -> str | None:
        """The caption with the first extension in the order; ValueError where two have it, in capitals or not."""
        for wanted in order:
            found = sorted(text for text in self.texts if suffix(text) == wanted)
            if len(found) > 1:
                raise ValueError(f"there are {found[0]} and {found[1]}: expected one of them")
            if found:
                return found[0]
        return None


def suffix(name: str) -> str:
    """The extension of a path in small letters, dot included."""
    return posixpath.splitext(name)[1].lower()


def stem(name: str) -> str:
    """A path without its extension, in Unicode's composed form: macOS writes letters and accents apart."""
    return unicodedata.normalize("NFC", posixpath.splitext(name)[0])
