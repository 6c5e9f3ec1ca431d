"""Captions beside media: whatever people write, media have exactly their own caption or a stated problem."""

import contextlib
import csv
import io
import json
import os
import tarfile
from collections.abc import Iterable
from typing import Any

import fsspec
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nova_video.common.errors import InputError
from nova_video.data.sidecars import caption_from
from nova_video.data.sources import MediaSource, SourceSettings, open_source
from nova_video.data.stages import read_caption
from nova_video.io.text import printable

DRAWN = settings(max_examples=int(os.environ.get("DRAWN_INPUTS", "300")), deadline=None)  # more in tests/slow
PLACE = "/sidecars"
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
CAPTIONS = TEXT.filter(lambda text: text.split() and "\0" not in text)
WORDS = st.text(st.sampled_from("ab ,;\t.é鲸'"), max_size=12).filter(lambda text: bool(text.split()))
NAMES = st.text(st.sampled_from("ab. é-"), min_size=1, max_size=5).filter(lambda name: name[0] != ".")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


def one_line(text: str) -> str:
    return " ".join(text.split())


def opened(files: dict[str, bytes], **named: Any) -> MediaSource:
    """A folder in memory."""
    memory = fsspec.filesystem("memory")
    if memory.exists(PLACE):
        memory.rm(PLACE, recursive=True)
    for name, data in files.items():
        memory.pipe_file(f"{PLACE}/{name}", data)
    return open_source(SourceSettings(f"memory:/{PLACE}", **named))


def outcome(files: dict[str, bytes]) -> dict[str, list[str | None]] | None:
    """Source -> its captions, None for a problem; nothing for a place that is refused as a whole, in one line."""
    try:
        found: dict[str, list[str | None]] = {}
        for item in opened(files).items():
            caption = None
            if item.problem is None:
                with contextlib.suppress(ValueError):
                    caption = read_caption(item)
            assert printable(item.problem or "") == (item.problem or "")
            found.setdefault(item.source, []).append(caption)
    except InputError:
        return None
    return found


def check(found: dict[str, list[str | None]] | None, captions: dict[str, str], tar: str = "") -> None:
    """Each media is there, with its own caption or a problem."""
    if found is not None:
        for name, caption in captions.items():
            assert any(source in found for source in (f"{tar}{name}", f"{tar}{name}".replace("\n", "\\n"))), name
            assert set(found.get(f"{tar}{name}", [None])) <= {one_line(caption), None}, name


# Tables --------------------------------------------------------------------------------------------------------------

CODECS = ("utf-8", "utf-8-sig", "utf-16")
ROWS = st.lists(st.sampled_from(["a.png", "b c.png", "sub/d.e.mp4"]), min_size=1, max_size=3, unique=True)


@DRAWN
@given(ROWS, st.data(), st.sampled_from(",;\t"), st.sampled_from(CODECS), st.booleans(), st.booleans())
def test_tables_in_csv(
    names: list[str], data: st.DataObject, delimiter: str, codec: str, quoted: bool, first: bool
) -> None:
    """Written by a program, or by hand without quotes; a table in a folder is of what is below."""
    captions = {name: data.draw(CAPTIONS if quoted else WORDS) for name in names}
    header, rows = ["file_name", "caption"], [[name, caption] for name, caption in captions.items()]
    lines = [header, *rows] if first else [row[::-1] for row in (header, *rows)]
    table = io.StringIO(newline="")
    if quoted:
        csv.writer(table, delimiter=delimiter).writerows(lines)
    else:
        table.write("\r\n".join(delimiter.join(line) for line in lines))
    found = outcome(dict.fromkeys(names, b"") | {"metadata.csv": table.getvalue().encode(codec)})
    check(found, captions)
    if quoted:
        assert found is not None
        assert [caption for name in names for caption in found[name]] == [one_line(captions[name]) for name in names]


@DRAWN
@given(ROWS, st.data())
def test_tables_in_json_lines(names: list[str], data: st.DataObject) -> None:
    captions = {name: data.draw(CAPTIONS | JSON) for name in names}
    lines = [json.dumps({"file_name": name, "caption": caption}) for name, caption in captions.items()]
    lines.insert(data.draw(st.integers(0, len(lines))), data.draw(TEXT.map(one_line)))
    found = outcome(dict.fromkeys(names, b"") | {"metadata.jsonl": "\n".join(lines).encode("utf-8", "replace")})
    texts = {name: first_text(caption) for name, caption in captions.items()}
    check(found, texts)
    if found is not None:
        good = {name for name, text in texts.items() if one_line(text) and "\0" not in text}
        assert all(found[name] == [one_line(texts[name])] for name in good)


def first_text(value: object) -> str:
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, str) else ""


@DRAWN
@given(st.binary(max_size=60), st.sampled_from(["metadata.csv", "sub/metadata.jsonl", "metadata.jsonl"]))
@example(b'file_name,caption\na.png,"A dog\nb.png,A cat"\n', "metadata.csv")
@example(b'file_name,caption\na.png,"never closed\nb.png,b\n', "metadata.csv")
@example(b"file_name,caption,caption\na.png,a,b\n", "metadata.csv")
@example(b"file_name,caption\na.png,caf\xe9\nb.png,b\n", "metadata.csv")
@example(b'{"file_name": "a.png", "caption": "x", "caption": "y"}\n', "metadata.jsonl")
@example(b"[" * 100_000, "metadata.jsonl")
def test_any_bytes_as_a_table(data: bytes, table: str) -> None:
    """All media are accounted for, and those of the examples have problems where two readings are possible."""
    head = b"file_name,caption\n" if table.endswith(".csv") and not data.startswith(b"file_name") else b""
    found = outcome({"a.png": b"", "b.png": b"", "sub/c.png": b"", "c.txt": b"c", table: head + data})
    if found is not None:
        assert {"a.png", "b.png", "sub/c.png"} <= set(found)
        assert found["a.png"] == [None] or b"a.png" in data


# Files beside media --------------------------------------------------------------------------------------------------


@DRAWN
@given(CAPTIONS, st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252", "shift_jis"]))
def test_text_in_any_encoding(caption: str, codec: str) -> None:
    """What is not Unicode is refused, unless its bytes happen to be UTF-8."""
    data = caption.encode(codec, "replace")
    found, problem = read(data, "a.txt")
    if problem:
        assert codec in ("cp1252", "shift_jis")
        assert problem.startswith("a.txt is not a text file in UTF-8, line ")
    else:
        assert found == one_line(caption if codec.startswith("utf") else data.decode())


@DRAWN
@given(JSON | CAPTIONS, st.booleans())
def test_captions_in_json(value: object, nested: bool) -> None:
    text = first_text(value)
    found, problem = read(json.dumps({"caption": {"en": value} if nested else value}).encode(), "a.json")
    if nested or not text.split() or "\0" in text:
        assert problem.startswith("caption ")
    else:
        assert found == one_line(text)


def read(data: bytes, name: str) -> tuple[str, str]:
    """The caption, or why there is none."""
    try:
        return caption_from(data, name, "caption"), ""
    except ValueError as error:
        return "", str(error)


MEMBERS = st.lists(
    st.tuples(NAMES, st.sampled_from([".png", ".MP4", ".txt", ".TXT", ".json", ".cls"])), min_size=1, max_size=8
)


def own_captions(names: Iterable[str]) -> dict[str, str]:
    """Media -> what its caption says, which is its own stem: the name but for the extension."""
    return {name: stem_of(name) for name in names if name.lower().endswith((".png", ".mp4"))}


def stem_of(name: str) -> str:
    return f"of {name.rpartition('.')[0]}"


def content(name: str) -> bytes:
    text = stem_of(name)
    return json.dumps({"caption": text}).encode() if name.endswith(".json") else text.encode()


@DRAWN
@given(MEMBERS)
def test_names_in_folders(members: list[tuple[str, str]]) -> None:
    names = {name + suffix for name, suffix in members}
    found = outcome({name: content(name) for name in names})
    check(found, own_captions(names))
    if found is not None:
        assert all(len(captions) == 1 for captions in found.values())
        with_text = {name for name in names if name.endswith((".txt", ".TXT", ".json"))}
        assert with_text <= {*found} | {text for text in with_text for name in found if stem_of(name) == stem_of(text)}


@DRAWN
@given(MEMBERS)
def test_names_in_tars(members: list[tuple[str, str]]) -> None:
    """In any order, some of them twice."""
    names = [name + suffix for name, suffix in members]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in names:
            header = tarfile.TarInfo(name)
            header.size = len(content(name))
            tar.addfile(header, io.BytesIO(content(name)))
    found = outcome({"a.tar": buffer.getvalue()})
    check(found, own_captions(names), "a.tar/")
    captions = [caption for several in (found or {}).values() for caption in several if caption is not None]
    assert len(captions) == len(set(captions))


@settings(DRAWN, max_examples=500)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=5), st.binary(min_size=1, max_size=5))
@example([1536], b"\x01")
def test_damaged_tars(places: list[int], data: bytes) -> None:
    """Bytes that are changed: what was read before is given, and the damage is said."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("a.png", "a.txt", "b.txt", "b.png"):
            header = tarfile.TarInfo(name)
            header.size = 4
            tar.addfile(header, io.BytesIO(b"of a" if name[0] == "a" else b"of b"))
    whole = bytearray(buffer.getvalue())
    for place in places:
        whole[place : place + len(data)] = data
    whole[1536:1540], whole[2560:2564] = b"of a", b"of b"  # a tar has no checksum of its members' contents
    found = outcome({"a.tar": bytes(whole)})
    if found is not None:
        good = {"a.tar/a.png": ["of a"], "a.tar/b.png": ["of b"]}
        assert good.items() <= found.items() or any(None in captions for captions in found.values())
