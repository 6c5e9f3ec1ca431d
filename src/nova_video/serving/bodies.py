"""Reads the bodies of requests, JSON or a form, into plain values: texts, numbers, lists, objects and files."""

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Any

from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from nova_video.common.checks import quote, shorten
from nova_video.common.errors import InputError
from nova_video.serving.guard import read_json
from nova_video.serving.schemas import WordError

FORM = ("multipart/form-data", "application/x-www-form-urlencoded")
MAX_FILES = 4
MAX_FIELDS = 200
BRACKETS = re.compile(r"([^\[\]]+)\[([^\[\]]*)\]")
DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(;[\w.+-]+=[^;,]*)*(;base64)?,", re.ASCII)
KINDS = (
    (b"\x89PNG\r\n\x1a\n", 0, ".png"),
    (b"\xff\xd8\xff", 0, ".jpg"),
    (b"GIF8", 0, ".gif"),
    (b"WEBP", 8, ".webp"),
    (b"ftypavif", 4, ".avif"),
    (b"ftyp", 4, ".mp4"),
    (b"\x1a\x45\xdf\xa3", 0, ".webm"),
)
"""The bytes that files of a kind have, where they have them, and the suffix."""
EXPECTED_KINDS = "PNG, JPEG, WebP, GIF, AVIF, MP4 or WebM"
PICTURES = (".png", ".jpg", ".webp", ".avif", ".gif")


@dataclass(frozen=True)
class SentFile:
    """A file of a request."""

    word: str
    data: bytes
    suffix: str
    """The one of its content, whatever its name says."""

    @property
    def is_picture(self) -> bool:
        return self.suffix in PICTURES


async def read_body(request: Request, largest: int, form_alone: bool = False) -> dict[str, Any]:
    """The words of a body; `largest` bounds a field of a form, in bytes. With `form_alone`, JSON is refused."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in FORM:
        found = await _read_form(request, largest)
        if len(found) == 1 and next(iter(found)).lstrip().startswith("{"):
            raise InputError(f"content-type is {kind}, and the body is JSON: expected content-type application/json")
        return found
    if form_alone:
        raise InputError(
            f"content-type is {quote(kind)}: expected multipart/form-data, a form with a field for each word"
        )
    if kind not in ("application/json", ""):
        raise InputError(f"content-type is {quote(kind)}: expected application/json or multipart/form-data")
    return read_object(await request.body())


def read_object(text: str | bytes, word: str | None = None) -> dict[str, Any]:
    """The object that a JSON text holds: the body, or one word of it."""
    what = "the body" if word is None else word
    try:
        values = read_json(text if isinstance(text, bytes) else text.encode())
    except InputError as error:
        raise WordError(str(error).replace("the body", what), word) from None
    if not isinstance(values, dict):
        raise WordError(f"{what} is {quote(values)}: expected a JSON object", word)
    return values


async def _read_form(request: Request, largest: int) -> dict[str, Any]:
    """The fields of a form: name[key] is a part of an object, name[] the same as name."""
    found: dict[str, Any] = {}
    try:
        multipart = request.headers["content-type"].strip().lower().startswith(FORM[0])
        taken = _with_bytes(request) if multipart else request
        async with taken.form(max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=largest) as form:
            for sent, value in form.multi_items():
                name = _text(sent, "a name", multipart)
                if isinstance(value, UploadFile):
                    _put(found, name, await _content(name, value))
                else:
                    _put(found, name, _text(value, name, multipart))
    except WordError:
        raise
    except (MultiPartException, FormParserError, HTTPException, UnicodeError) as error:
        reason = error.detail if isinstance(error, HTTPException) else getattr(error, "message", "") or str(error)
        raise InputError(
            f"the form cannot be read ({shorten(str(reason), 100)}): expected multipart/form-data"
        ) from None
    return found


def _with_bytes(request: Request) -> Request:
    """The request of a form, whose texts are then read as Latin 1. That keeps every byte for `_text` to see."""
    kind = re.sub(r";\s*charset=[^;]*", "", request.headers["content-type"], flags=re.IGNORECASE)
    headers = [pair for pair in request.scope["headers"] if pair[0] != b"content-type"]
    headers.append((b"content-type", f"{kind}; charset=latin-1".encode("latin-1")))
    return Request({**request.scope, "headers": headers}, request.receive)


def _text(sent: str, word: str, as_bytes: bool) -> str:
    """A text of a form, whose bytes are to be UTF-8."""
    try:
        text = sent.encode("latin-1").decode("utf-8") if as_bytes else sent
    except UnicodeDecodeError:
        raise WordError(f"{shorten(word, 60)} is no text in UTF-8: expected that", shorten(word, 60)) from None
    if "\0" in text or "\ufffd" in text:
        raise WordError(f"{shorten(word, 60)} has letters that are none: expected a text in UTF-8", shorten(word, 60))
    return text


async def _content(name: str, sent: UploadFile) -> SentFile:
    return sent_file(name.partition("[")[0], await sent.read())


def _put(found: dict[str, Any], name: str, value: Any) -> None:
    """Add one field of a form to those before it."""
    inner = BRACKETS.fullmatch(name)
    if inner is None and "[" in name[1:]:
        word = shorten(name.partition("[")[0], 60)
        raise WordError(f"{word} came as {shorten(name, 60)}: expected JSON in the one field {word}", word)
    if inner is None or not inner[2]:
        word = name if inner is None else inner[1]
        if word in found:
            raise WordError(f"got {shorten(word, 60)} twice: expected it once", shorten(word, 60))
        found[word] = value
        return
    parts = found.setdefault(inner[1], {})
    if not isinstance(parts, dict) or inner[2] in parts:
        raise WordError(f"got {shorten(inner[1], 60)} twice: expected it once", shorten(inner[1], 60))
    parts[inner[2]] = value


# Files ----------------------------------------------------------------------------------------------------------------


def sent_file(word: str, data: bytes) -> SentFile:
    """A file of a known kind, by its content."""
    if not data:
        raise WordError(f"{word} is an empty file: expected a picture or a clip", word)
    for mark, place, suffix in KINDS:
        if data[place : place + len(mark)] == mark:
            return SentFile(word, data, suffix)
    raise WordError(f"{word} is a file of an unknown kind: expected {EXPECTED_KINDS}", word)


def file_of_url(word: str, url: object) -> SentFile:
    """The file inside a data: URL. Nothing is ever fetched, from this machine or another."""
    if not isinstance(url, str):
        raise WordError(f"{word} is {quote(url)}: expected a file or a data: URL", word)
    head = DATA_URL.match(url[:400])
    if head is None:
        raise WordError(f"{word} is {quote(url)}: expected a file or a data: URL, nothing is fetched", word)
    if head[3] is None:
        raise WordError(f"{word} is a data: URL without base64: expected data:image/png;base64,...", word)
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise WordError(
            f"{word} is a data: URL whose base64 is damaged: expected data:image/png;base64,...", word
        ) from None
    return sent_file(word, data)
