"""Text files of users: what is text, what is refused, and what a terminal gets to see."""

from collections.abc import Callable
from pathlib import Path

import pytest

from nova_video.common.errors import InputError
from nova_video.data.dataset import DatasetInfo
from nova_video.io.text import decode_text, parse_json, printable, read_text, read_toml
from nova_video.io.weights import read_json
from nova_video.pipeline.settings import CheckpointSettings

SENTENCE = "a whale, ein Hügel, 鲸鱼\nsecond"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unicode_is_read_by_its_mark(encoding: str, tmp_path: Path) -> None:
    """Line ends of Windows and of old Macs become line feeds."""
    path = tmp_path / "a.txt"
    path.write_bytes(SENTENCE.replace("\n", "\r\n").encode(encoding))
    assert read_text(path) == SENTENCE
    assert decode_text(SENTENCE.replace("\n", "\r").encode(encoding)) == SENTENCE


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("one\ncafé".encode("cp1252"), "is not a text file in UTF-8, line 2 has the byte 0xe9: expected UTF-8, or"),
        ("cafe".encode("utf-16-le"), "is not a text file, it holds NUL characters: expected UTF-8"),
        (b"\xff\xfea", "is not a text file in utf-16-le, as its byte order mark says"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "is a Git LFS pointer"),
    ],
)
def test_other_bytes_are_refused(data: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(data)
    with pytest.raises(InputError) as error:
        read_toml(path)
    assert str(error.value).startswith(f"{path} {expected}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = " + "[" * 5000 + "]" * 5000, "is nested too deeply"),
        ("a = " + "1" * 5000, "is not TOML: Exceeds the limit"),
        ("a = ", "is not TOML: "),
    ],
)
def test_toml_that_is_none(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=expected):
        read_toml(path)
    with pytest.raises(InputError, match="none.toml: No such file"):
        read_toml(tmp_path / "none.toml")


def test_json_that_is_none() -> None:
    assert parse_json('{"a": [1, {"a": 2}]}') == {"a": [1, {"a": 2}]}
    for text, expected in [
        ("[" * 100_000, "it is nested too deeply"),
        ('{"b": {"a": 1, "a": 2}}', "it has the key 'a' twice"),
        ("1" * 5000, "Exceeds the limit"),
        ("{", "Expecting property name"),
    ]:
        with pytest.raises(ValueError, match=expected):
            parse_json(text)


def test_nothing_that_a_terminal_obeys_is_shown() -> None:
    assert printable("ein Hügel, 鲸鱼, 👩‍🚀 \u3000") == "ein Hügel, 鲸鱼, 👩‍🚀 \u3000"
    assert printable("\x1b[31mred\x07\n\u202etxt\x9b") == "\\x1b[31mred\\x07\\n\\u202etxt\\x9b"
    assert printable("a\n\tb", keep="\n") == "a\n\\tb"
    assert printable(b"caf\xe9.png".decode("utf-8", "surrogateescape")) == "caf\\xe9.png"
    assert printable("\ud83d") == "\\ud83d"


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("nova.json", CheckpointSettings.load),
        ("config.json", lambda folder: read_json(folder / "config.json")),
        ("dataset.json", DatasetInfo.load),
    ],
)
def test_json_beside_weights(name: str, read: Callable[[Path], object], tmp_path: Path) -> None:
    """A byte order mark, as editors on Windows write it, does no harm; endless nesting is one line."""
    (tmp_path / name).write_text("\ufeff{}", encoding="utf-8")
    if name == "dataset.json":
        with pytest.raises(InputError, match="expected a JSON object with format"):
            read(tmp_path)
    else:
        read(tmp_path)
    (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(InputError, match="nested too deeply"):
        read(tmp_path)
