"""Text files of users: from bytes to text, and text from files to a terminal.

Every prompt file, script, recipe and caption is read by `decode_text`: UTF-8, or UTF-16 and UTF-32 with a byte order
mark. Other encodings are refused, since a guess would turn letters into others without a word.
"""

import codecs
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nova_video.common.errors import InputError

EXPECTED_TEXT = "expected UTF-8, or UTF-16 with a byte order mark"
MARKS = (  # byte order marks; that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
POINTER_ERROR = "is a Git LFS pointer, not the file itself: expected the file, which `git lfs pull` fetches"
BIDI_CONTROLS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
LINE_ENDS = frozenset("\u2028\u2029\x85")
SHORT_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def decode_text(data: bytes, lenient: bool = False) -> str:
    """The text in a file's bytes, its lines ended by a line feed; ValueError says why they are no text.

    If `lenient`, bytes that are not UTF-8 become lone surrogates, and NUL stays, for a caller that checks each part.
    """
    if data.startswith(LFS_POINTER):
        raise ValueError(POINTER_ERROR)
    mark, encoding = next(((mark, name) for mark, name in MARKS if data.startswith(mark)), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding, "surrogateescape" if lenient and not mark else "strict")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        if mark:
            raise ValueError(
                f"is not a text file in {encoding}, as its byte order mark says: {EXPECTED_TEXT}"
            ) from None
        raise ValueError(
            f"is not a text file in UTF-8, line {line} has the byte 0x{data[error.start]:02x}: {EXPECTED_TEXT}"
        ) from None
    if "\0" in text and not lenient:
        raise ValueError(f"is not a text file, it holds NUL characters: {EXPECTED_TEXT}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: Path) -> str:
    """The text of a local file; InputError says in one line why there is none."""
    try:
        return decode_text(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path} {error}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """The values in a TOML file."""
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise InputError(f"{path} is nested too deeply: expected at most a few levels") from None
    except ValueError as error:  # TOMLDecodeError is one, and Python has others for long integers
        raise InputError(f"{path} is not TOML: {error}") from None


def parse_json(text: str) -> Any:
    """The value of a JSON text; ValueError for what is none, is nested too deeply, or has a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"it has the key {twice!r} twice")
    return values


def printable(text: str, keep: str = "") -> str:
    """Text without anything that a terminal would obey: control characters and lone surrogates become escapes.

    A byte of a file name that is not UTF-8 becomes \\xNN, and so does a control character; `keep` lists exceptions.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(letter if letter in keep or _is_harmless(letter) else _escape(letter) for letter in text)


def _is_harmless(letter: str) -> bool:
    code = ord(letter)
    is_control = code < 0x20 or 0x7F <= code < 0xA0
    return not (is_control or 0xD800 <= code <= 0xDFFF or letter in BIDI_CONTROLS or letter in LINE_ENDS)


def _escape(letter: str) -> str:
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:  # a byte, as Python holds file names that are not UTF-8
        code -= 0xDC00
    return SHORT_ESCAPES.get(letter) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def list_some(names: Sequence[str], most: int = 5) -> str:
    """The first names in one line, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
