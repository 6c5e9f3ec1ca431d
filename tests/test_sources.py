"""Sources of encoding: the same items from every kind of place, what is said of single ones, errors for the whole."""

import io
import json
import os
import re
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import fsspec
import numpy as np
import pytest
from PIL import Image

from nova_video.common.errors import InputError
from nova_video.data import dataset as dataset_module
from nova_video.data import stages as stages_module
from nova_video.data.sources import MediaSource, SourceSettings, TableSource, expand_braces, find_source, open_source
from nova_video.data.stages import Item, read_bytes, read_caption

NAMES = ["a.mp4", "b.png", "sub/c.webm"]
CAPTIONS = {"a.mp4": "an a", "b.png": "a b", "sub/c.webm": "a c. And more."}


def content(name: str) -> bytes:
    return f"bytes of {name}".encode()


def opened(place: Path | str, **settings: Any) -> MediaSource:
    return open_source(SourceSettings(str(place), **settings))


def fill(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def media() -> dict[str, bytes | str]:
    return {name: content(name) for name in NAMES}


def stem(name: str) -> str:
    return name.rpartition(".")[0]


def problems(source: MediaSource) -> dict[str, str]:
    return {item.source: item.problem for item in source.items() if item.problem is not None}


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def rows(names: list[str] = NAMES) -> list[dict[str, Any]]:
    return [{"video": {"bytes": content(name), "path": name}, "caption": CAPTIONS[name]} for name in names]


def make_txt(folder: Path) -> str:
    fill(folder, media() | {f"{stem(name)}.txt": f" {CAPTIONS[name]}\n" for name in NAMES})
    return str(folder)


def make_json(folder: Path) -> str:
    texts = {f"{stem(name)}.json": json.dumps({"caption": CAPTIONS[name], "other": 1}) for name in NAMES}
    fill(folder, media() | texts | {".hidden.mp4": "", "notes.md": ""})
    return str(folder)


def make_csv(folder: Path) -> str:
    lines = [f'{name},7,"{CAPTIONS[name]}"' for name in reversed(NAMES)]
    fill(folder, media() | {"metadata.csv": "\ufefffile_name,other,caption\n" + "\n".join(lines)})
    return str(folder)


def make_jsonl(folder: Path) -> str:
    lines = [json.dumps({"file_name": name, "caption": [CAPTIONS[name], "another"]}) for name in NAMES]
    fill(folder, media() | {"metadata.jsonl": "\n\n".join(lines)})
    return str(folder)


def make_tar(folder: Path) -> str:
    for number, name in enumerate(NAMES):
        text = (
            {f"{stem(name)}.txt": CAPTIONS[name].encode()}
            if number
            else {f"{stem(name)}.json": json.dumps({"caption": CAPTIONS[name]}).encode()}
        )
        write_tar(folder / f"part-{number:02d}.tar", text | {name: content(name), f"{stem(name)}.cls": b"7"})
    return f"{folder}/part-{{00..02}}.tar"


def make_parquet(folder: Path) -> str:
    write_parquet(folder / "data" / "0.parquet", rows(NAMES[:1]))
    write_parquet(folder / "data" / "1.parquet", rows(NAMES[1:]))
    return str(folder)


def make_saved(folder: Path) -> str:
    import datasets

    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows())}).save_to_disk(folder)
    return str(folder)


KINDS = [make_txt, make_json, make_csv, make_jsonl, make_tar, make_parquet, make_saved]


@pytest.mark.parametrize("make", KINDS)
def test_every_kind_gives_the_same(make: Callable[[Path], str], tmp_path: Path) -> None:
    """Bytes with their captions, in one order; each is found again by its name; groups go through all of a part."""
    options = {"group": 2} | ({"split": "test"} if make is make_saved else {})
    source = opened(make(tmp_path / "source"), **options)
    items = list(source.items())
    assert sorted((read_bytes(item), read_caption(item)) for item in items) == [
        (content(name), CAPTIONS[name]) for name in NAMES
    ]
    again = opened(make(tmp_path / "source"), **options)
    assert list(again.items()) == items
    assert again.content == source.content
    for item in items:
        found = source.find(item.source)
        assert (read_bytes(found), read_caption(found)) == (read_bytes(item), read_caption(item))
    check_groups(items, 2)
    with pytest.raises(InputError, match="has no other"):
        source.find("other")


def check_groups(items: list[Item], size: int) -> None:
    """Numbered from 0, full but for a part's final one."""
    for group in {item.group for item in items}:
        members = [item for item in items if item.group == group]
        assert [item.index for item in members] == list(range(len(members)))
        assert [item.last for item in members] == [False] * (len(members) - 1) + [True]
        assert len(members) == size or members[-1].final
    for part in {item.group.split("-")[0] for item in items}:
        assert [item.final for item in items if item.group.split("-")[0] == part][-1]


@pytest.mark.parametrize("count", [1, 4, 7, 8])
def test_groups_and_going_on(count: int, tmp_path: Path) -> None:
    """What is finished is left out, wherever it is; a source that is finished is not read."""
    for part in range(2):
        members = {f"{number:03d}.{kind}": b"x" for number in range(count) for kind in ("mp4", "txt")}
        write_tar(tmp_path / f"{part}.tar", members)
    source = opened(tmp_path, group=4)
    items = list(source.items())
    assert len(items) == 2 * count
    check_groups(items, 4)
    finals = {item.group: item.final for item in items if item.last}
    for finished in ({name} for name in finals):
        left = list(source.items({name: finals[name] for name in finished}))
        assert left == [item for item in items if item.group not in finished]
    source.urls = []  # type: ignore[attr-defined]
    assert list(source.items(finals)) == []


def test_elsewhere(tmp_path: Path) -> None:
    """The same through fsspec: here its file system in memory."""
    memory = fsspec.filesystem("memory")
    for make in (make_txt, make_csv, make_tar, make_parquet):
        here = make(tmp_path / make.__name__)
        memory.put(str(tmp_path / make.__name__), f"/{make.__name__}", recursive=True)
        items = list(opened(here, group=2).items())
        there = list(opened(here.replace(str(tmp_path), "memory:/"), group=2).items())
        assert [(item.source, read_bytes(item), read_caption(item)) for item in there] == [
            (item.source, read_bytes(item), read_caption(item)) for item in items
        ]
        assert [(item.group, item.index, item.last) for item in there] == [
            (item.group, item.index, item.last) for item in items
        ]
        if make is not make_parquet:
            assert all("memory://" in item.url for item in there)


def test_captions_as_others_write_them(tmp_path: Path) -> None:
    """With endings in capitals, and with line breaks that are none in JSON."""
    cameras = fill(tmp_path / "camera", {"A.MP4": b"1", "A.TXT": "an a", "b.mp4": b"2", "b.Json": '{"caption": "a b"}'})
    items = list(opened(cameras).items())
    assert [(item.source, item.problem, Path(item.caption_url or "").name) for item in items] == [
        ("A.MP4", None, "A.TXT"),
        ("b.mp4", None, "b.Json"),
    ]
    lines = "\n".join(f'{{"file_name": "{name}", "caption": "one\u2028two\u0085three"}}' for name in NAMES)
    found = opened(fill(tmp_path / "lines", media() | {"metadata.jsonl": lines})).items()
    assert [item.caption for item in found] == ["one two three"] * 3


def test_the_first_of_two_rows_counts(tmp_path: Path) -> None:
    table = "file_name,caption\na.mp4,first\na.mp4,\nb.png,b\nsub/c.webm,c"
    source = opened(f"{fill(tmp_path, media() | {'metadata.csv': table})}/")
    assert problems(source) == {"metadata.csv:2": "a.mp4 has a row before this one"}
    assert {item.source: item.caption for item in source.items()}["a.mp4"] == "first"
    assert source.settings.place == str(tmp_path)


def test_a_table_may_name_files_anywhere(tmp_path: Path) -> None:
    """By whole paths."""
    fill(tmp_path / "far", {"d.mp4": b"d"})
    table = f"file_name,caption\n{tmp_path}/far/d.mp4,d\n./a.mp4,a\nb.png,b\nsub/c.webm,c"
    source = opened(fill(tmp_path / "near", media() | {"metadata.csv": table}))
    assert problems(source) == {}
    assert {item.source: item.url for item in source.items()} == {
        f"{tmp_path}/far/d.mp4": f"{tmp_path}/far/d.mp4",
        **{name: f"{tmp_path}/near/{name}" for name in NAMES},
    }
    alone = opened(fill(tmp_path / "alone", {"metadata.csv": table.replace("./a.mp4,a\n", "")}))
    assert [item.source for item in alone.items() if item.problem is None] == [f"{tmp_path}/far/d.mp4"]


def test_other_parquet_files_are_another_source(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_parquet(tmp_path / f"{name}.parquet", rows())
    before = opened(tmp_path).content
    (tmp_path / "a.parquet").rename(tmp_path / "c.parquet")
    assert set(opened(tmp_path).content) ^ set(before) == {"a.parquet", "c.parquet"}


def test_patterns(tmp_path: Path) -> None:
    assert expand_braces("a-{008..010}-{x,y}.tar") == [
        f"a-{number}-{letter}.tar" for number in ("008", "009", "010") for letter in "xy"
    ]
    make_tar(tmp_path)
    assert [item.source for item in opened(f"{tmp_path}/*1.tar").items()] == ["part-01.tar/b.png"]
    assert len(list(opened(f"{tmp_path}/part-{{00..02}}.tar").items())) == 3
    with pytest.raises(InputError, match=r"tar: there is no part-03.tar, part-04.tar: expected all that it names"):
        opened(f"{tmp_path}/part-{{00..04}}.tar")


def test_links_are_followed(tmp_path: Path) -> None:
    """To files and folders; each folder once, though links lead round in a circle."""
    fill(tmp_path / "elsewhere" / "deep", {"b.png": content("b.png"), "b.txt": "b"})
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "clips")
    clips = fill(tmp_path / "clips", {"a.png": content("a.png"), "a.txt": "a"})
    (clips / "linked").symlink_to(tmp_path / "elsewhere")
    (clips / "twice").symlink_to(tmp_path / "elsewhere")
    items = list(opened(clips).items())
    assert [item.source for item in items] == ["a.png", "linked/deep/b.png"]
    assert [read_caption(item) for item in items] == ["a", "b"]


def test_options_that_a_source_does_not_have(tmp_path: Path) -> None:
    for make, options, expected in [
        (make_txt, {"split": "test"}, "split is 'test', and .* has no splits: expected none to be named"),
        (make_txt, {"media_column": "video"}, "media_column is 'video', and .* has no columns"),
        (make_tar, {"media_column": "video"}, "media_column is 'video', and .* has no columns"),
        (make_parquet, {"split": "test"}, "split is 'test', and .* has no splits"),
    ]:
        with pytest.raises(InputError, match=expected):
            opened(make(tmp_path / make.__name__), **options)
    with pytest.raises(InputError, match="zip://clips::/x/a.zip: is in an archive: expected a folder of media"):
        opened("zip://clips::/x/a.zip")


def test_named_columns(tmp_path: Path) -> None:
    """--caption-column is a column, and a key that goes before the text file of the same name."""
    fill(tmp_path / "a", {"x.mp4": "", "x.txt": "text", "x.json": json.dumps({"long": "a long one", "caption": "b"})})
    (item,) = opened(tmp_path / "a").items()
    assert read_caption(item) == "text"
    (item,) = opened(tmp_path / "a", caption_column="long").items()
    assert read_caption(item) == "a long one"
    fill(tmp_path / "b", {"x.mp4": "", "metadata.csv": "file_name,long\nx.mp4,a long one\n"})
    (item,) = opened(tmp_path / "b", caption_column="long").items()
    assert item.caption == "a long one"
    write_parquet(tmp_path / "c.parquet", [{"one": b"1", "two": b"2", "long": "a long one"}])
    (item,) = opened(tmp_path / "c.parquet", caption_column="long", media_column="two").items()
    assert (item.data, item.caption) == (b"2", "a long one")


def test_media_columns(tmp_path: Path) -> None:
    """Pictures as datasets' own Image column holds them, and paths beside the file."""
    import datasets

    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.png")
    table = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")], "caption": ["a"]})
    table = table.cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "saved")
    (item,) = opened(tmp_path / "saved").items()
    assert read_bytes(item) == (tmp_path / "a.png").read_bytes()
    write_parquet(tmp_path / "paths" / "a.parquet", [{"file_name": "media/x.png", "caption": "a"}])
    fill(tmp_path / "paths", {"media/x.png": "x"})
    (item,) = opened(tmp_path / "paths" / "a.parquet").items()
    assert read_bytes(item) == b"x"


def test_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hf://OWNER/NAME is streamed, and its Video column gives bytes."""
    import datasets

    real = datasets.load_dataset
    asked: list[object] = []

    def load(name: str, config: str | None, **settings: Any) -> Any:
        asked.append((name, settings))
        table = real("parquet", data_files=str(tmp_path / "data" / "*.parquet"), split="train", streaming=True)
        return table.cast_column("video", datasets.Video())

    make_parquet(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load)
    for place in ("hf://owner/name", "hf://datasets/owner/name"):
        items = list(opened(place, split="validation").items())
        assert [item.data for item in items] == [content(name) for name in NAMES]
        assert asked.pop() == ("owner/name", {"split": "validation", "streaming": True})

    def fail(name: str, config: str | None, **settings: Any) -> Any:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        InputError, match="^hf://owner/name: cannot be opened as a Hugging Face dataset: Couldn't reach"
    ):
        opened("hf://owner/name")


def test_configurations_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder stands in for the hub: its card tells of two configurations, and one has to be named."""
    import datasets

    real = datasets.load_dataset
    card = ["---", "configs:"]
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_parquet(tmp_path / name / "train.parquet", [{"caption": name, "video": name.encode()}])
        card += [f"- config_name: {name}", f"  data_files: {name}/*.parquet"]
    (tmp_path / "README.md").write_text("\n".join([*card, "---", ""]))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *given, **more: real(str(tmp_path), *given, **more))
    for name in ("first", "second"):
        assert [item.data for item in opened("hf://owner/name", config=name).items()] == [name.encode()]
    for wrong in (None, "third"):
        with pytest.raises(InputError) as error:
            opened("hf://owner/name", config=wrong)
        said = "hf://owner/name: has the configurations first, second: name one of them with --config"
        assert str(error.value) == said
    with pytest.raises(InputError, match="config is 'first', and .* has no configurations .hf://OWNER/NAME has."):
        opened(tmp_path / "first", config="first")


def test_reading_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is elsewhere may fail for a moment; what is not there is not asked for again."""
    asked = 0

    class Flaky:
        def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
            nonlocal asked
            asked += 1
            if path == "gone":
                raise FileNotFoundError(path)
            if asked < 3 or path == "down":
                raise ConnectionResetError("connection reset")
            return b"0123456789"[start:end]

    monkeypatch.setattr(stages_module, "open_place", lambda url: (Flaky(), url))
    monkeypatch.setattr(stages_module, "WAIT", 0.0)
    assert read_bytes(Item("a", url="up", offset=2, size=3)) == b"234"
    assert asked == 3
    for url, error, times in [("gone", FileNotFoundError, 1), ("down", ConnectionResetError, 3)]:
        asked = 0
        with pytest.raises(error):
            read_bytes(Item("a", url=url))
        assert asked == times


def test_problems_of_a_folder(tmp_path: Path) -> None:
    files = {"a.mp4": "", "a.txt": "a", "b.mp4": "", "c.txt": "c", "d.xyz": ""}
    assert problems(opened(fill(tmp_path, files))) == {
        "b.mp4": "no caption: there is no .txt or .json of its name beside it",
        "c.txt": "a caption without media: nothing of its name is beside it",
    }


def test_problems_of_a_table(tmp_path: Path) -> None:
    table = "file_name,caption\na.mp4,an a\nb.mp4,a b\n,nothing\nc.xyz,a c\nsub/../d.mp4,a d\n../e.mp4,an e\n"
    source = opened(fill(tmp_path, {"a.mp4": "", "d.mp4": "", "c.xyz": "", "metadata.csv": table}))
    assert problems(source) == {
        "b.mp4": "is in metadata.csv, but there is no such file",
        "metadata.csv:3": "its row has no file_name",
        "c.xyz": "is in metadata.csv, but .xyz is no known format",
        "../e.mp4": "is in metadata.csv, but is not below the folder: expected a path in it, or a whole one",
    }


def test_problems_of_tars(tmp_path: Path) -> None:
    """A tar that breaks off gives what it has."""
    members = {f"{number}.{kind}": b"x" * 600 for number in range(4) for kind in ("mp4", "txt")}
    write_tar(tmp_path / "a.tar", members)
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: 2 * 3 * 512 * 2 + 700])
    write_tar(
        tmp_path / "b.tar", {"0.mp4": b"", "1.txt": b"1", "2.mp4": b"", "2.json": b"{}", "3.jpg": b"", "3.txt": b"a"}
    )
    (tmp_path / "c.tar").write_bytes(b"no tar at all" * 100)
    found = problems(opened(tmp_path))
    assert found.pop("a.tar").startswith("the tar cannot be read on: ")
    assert found.pop("c.tar").startswith("the tar cannot be read on: ")
    assert found == {
        "a.tar/2.mp4": "the tar breaks off in it: expected the whole file",
        "b.tar/0.mp4": "no caption: the tar has no .txt or .json of its name",
        "b.tar/1": "a caption without media: the tar has no picture or video of its name",
        "b.tar/2.mp4": "no caption: 2.json has no keys: expected the key caption",
    }
    good = [item.source for item in opened(tmp_path).items() if item.problem is None]
    assert good[:2] == ["a.tar/0.mp4", "a.tar/1.mp4"]
    assert good[-1] == "b.tar/3.jpg"


def test_what_is_said_of_tars_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not said to be damaged, and what a server sends too much of is not taken for a member."""
    write_tar(tmp_path / "a.tar", {"0.mp4": b"0" * 40, "0.txt": b"a"})
    [item] = opened(tmp_path / "a.tar").items()
    monkeypatch.setattr(stages_module, "_patiently", lambda url, read: (tmp_path / "a.tar").read_bytes())
    with pytest.raises(Exception, match="its server gives files only as a whole: expected one that answers range"):
        read_bytes(item)

    class Whole(io.BytesIO):
        def read(self, *args: Any) -> bytes:
            raise ValueError("The HTTP server doesn't appear to support range requests. Open with block_size=0")

    monkeypatch.setattr(fsspec.implementations.local.LocalFileSystem, "open", lambda self, *args, **named: Whole())
    message = "a.tar: the tar cannot be fetched: its server gives files only as a whole: expected one that .* requests$"
    with pytest.raises(InputError, match=message):
        opened(tmp_path / "a.tar")


def test_names_on_web_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are listed as they stand in URLs, and are known and looked up by what they mean."""
    names = ["a b/häse.png", "100%.png", "#1.png", "plain.png"]
    rows = "\n".join(json.dumps({"file_name": name, "caption": f"this is {name}"}) for name in names)
    fill(tmp_path, {**{name: content(name) for name in names}, "metadata.jsonl": rows})

    class Web(fsspec.AbstractFileSystem):  # type: ignore[misc]
        protocol = ("http", "https")

        def isdir(self, path: str) -> bool:
            return True

        def find(self, path: str, **_: Any) -> list[str]:
            files = (file for file in tmp_path.rglob("*") if file.is_file())
            return [f"{path}/{quote(str(file.relative_to(tmp_path)))}" for file in files]

        def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
            return (tmp_path / unquote(path.removeprefix("http://host/clips/"))).read_bytes()[start:end]

        def unstrip_protocol(self, name: str) -> str:
            return name

    for module in (find_source, dataset_module, stages_module):
        monkeypatch.setattr(module, "open_place", lambda place: (Web(), place))
    items = list(opened("http://host/clips").items())
    assert {item.source: (item.problem, item.caption) for item in items} == {
        name: (None, f"this is {name}") for name in names
    }
    assert all(read_bytes(item) == content(item.source) for item in items)
    assert {item.url for item in items} >= {"http://host/clips/100%25.png", "http://host/clips/a%20b/h%C3%A4se.png"}


def test_the_first_of_two_members_of_a_name_counts(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("0.mp4", "0.txt", "1.mp4", "1.txt", "0.mp4", "0.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    found = [(item.source, item.problem) for item in opened(tmp_path).items()]
    assert found[:2] == [("a.tar/0.mp4", None), ("a.tar/1.mp4", None)]
    assert found[2:] == [("a.tar/0.mp4", "the tar has it twice"), ("a.tar/0.txt", "the tar has it twice")]


def test_problems_of_rows(tmp_path: Path) -> None:
    table = [
        {"video": {"bytes": b"x", "path": None}, "caption": "a"},
        {"video": {"bytes": b"x", "path": None}, "caption": " "},
        {"video": {"bytes": None, "path": None}, "caption": "a"},
        {"video": None, "caption": "a"},
    ]
    write_parquet(tmp_path / "a.parquet", table)
    assert list(problems(opened(tmp_path / "a.parquet")).values()) == [
        "no caption: the column caption is empty",
        "no media: the column video is empty",
        "no media: the column video is empty",
    ]


def test_a_table_that_breaks_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows before, and a line about the rest."""
    make_parquet(tmp_path)
    source = opened(tmp_path)
    whole = list(source.items())
    give = TableSource._item

    def fail(self: TableSource, name: str, row: Any) -> Item:
        if name == "00001:00001":
            raise ConnectionError("gone")
        return give(self, name, row)

    monkeypatch.setattr(TableSource, "_item", fail)
    items = list(source.items())
    assert [item.source for item in items[:2]] == [item.source for item in whole[:2]]
    assert (len(items), items[2].problem, items[2].last) == (3, "1.parquet cannot be read on after row 1: gone", True)


def test_a_damaged_table_is_not_all(tmp_path: Path) -> None:
    """Wherever it stands among them, the others are read."""
    for place in ("00-damaged.parquet", "zz-damaged.parquet"):
        folder = tmp_path / place
        make_parquet(folder)
        count = len(list(opened(folder).items()))
        whole = min(folder.rglob("*.parquet")).read_bytes()
        (folder / place).write_bytes(whole[: len(whole) // 2])
        items = list(opened(folder).items())
        wrong = [item for item in items if item.problem is not None]
        assert (len(items), len(wrong)) == (count + 1, 1)
        assert str(wrong[0].problem).startswith(f"{place} cannot be read on after row 0: ")
    only = tmp_path / "only"
    only.mkdir()
    (only / "a.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"a\.parquet: cannot be opened as a Hugging Face dataset: "):
        opened(only)


# Wrong input ---------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, bytes | str], dict[str, Any], str]] = [
    ({}, {}, "is empty: expected a folder of media with captions"),
    ({"notes.md": ""}, {}, "holds no media (notes.md): expected a folder"),
    (
        {"a.mp4": "", "b.png": ""},
        {},
        "has 2 media files and no captions: expected a .txt or .json beside each (a.txt for",
    ),
    (
        {"a.txt": "a"},
        {},
        "has 1 captions and no media: expected a picture or video beside each, such as a.mp4 for a.txt",
    ),
    ({"a.mp4": "", "a.json": '{"title": "x", "n": 1}'}, {}, "a.json: has no key 'caption', it has n, title: name the"),
    (
        {"a.mp4": "", "metadata.csv": "file_name,text\na.mp4,x\n"},
        {},
        "metadata.csv: has no column 'caption', it has file_",
    ),
    (
        {"a.mp4": "", "metadata.csv": "path,caption\na.mp4,x\n"},
        {},
        "metadata.csv: has no column 'file_name', it has caption",
    ),
    ({"a.mp4": "", "metadata.csv": "file_name,caption\n"}, {}, "metadata.csv: has no rows"),
    ({"a.mp4": "", "metadata.csv": "file_name,caption\na.mp4,\n"}, {}, "metadata.csv: the column caption is empty"),
    (
        {"metadata.csv": "file_name,caption\na.mp4,a\n"},
        {},
        "metadata.csv has 1 captions, and there are no media: expected",
    ),
    ({"a.mp4": "", "metadata.jsonl": "{"}, {}, "metadata.jsonl: line 1 is not JSON"),
    ({"a.mp4": "", "metadata.jsonl": "[1]"}, {}, "metadata.jsonl: line 1 is [1]: expected an object"),
    (
        {"a.mp4": "", "metadata.csv": "", "metadata.jsonl": ""},
        {},
        "metadata.csv: its folder has metadata.jsonl too: exp",
    ),
    ({"a.mp4": "", "b.tar": ""}, {}, "holds media and .tar files: name one kind"),
    ({"a.tar": bytes(10240)}, {}, "is empty: its 1 tar files have no members"),
    ({"a.tar": b""}, {}, "a.tar: the tar cannot be read on: empty file"),
    ({"a.tar": b"no tar"}, {}, "a.tar: the tar cannot be read on"),
    ({"a.parquet": b"no parquet"}, {}, "a.parquet: cannot be opened as a Hugging Face dataset"),
    ({"dataset.json": "{}", "data/x": ""}, {}, "is a dataset that `nova encode` wrote"),
    ({"a.mp4": "", "a.txt": ""}, {"group": 0}, "group is 0: expected a whole number of at least 1"),
]


@pytest.mark.parametrize(("files", "settings", "expected"), WRONG, ids=[wrong[2][:40] for wrong in WRONG])
def test_wrong_folders(files: dict[str, bytes | str], settings: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        opened(fill(tmp_path, files), **settings)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_places(tmp_path: Path) -> None:
    fill(tmp_path, {"a.mp4": ""})
    for place, expected in [
        (tmp_path / "none", "none: there is nothing there: expected a folder of media"),
        (tmp_path / "*.tar", "*.tar: there is nothing there"),
        (tmp_path / "{0..2}.tar", "there is nothing there"),
        (tmp_path / "a.mp4", "got the file"),
        ("memory://nothing/here", "memory://nothing/here: there is nothing there"),
        ("nosuch://x/y", "nosuch://x/y: cannot be opened: Protocol not known: nosuch"),
        (os.fsdecode(b"caf\xe9"), "its name is not UTF-8: expected a place that a dataset can name"),
    ]:
        with pytest.raises(InputError) as error:
            opened(place)
        assert expected in str(error.value)


def test_wrong_tars(tmp_path: Path) -> None:
    for members, expected in [
        ({"a.txt": b"a"}, "a.tar: has captions and no media"),
        ({"a.mp4": b""}, "a.tar/a.mp4: no caption: the tar has no .txt or .json of its name"),
        (
            {"a.mp4": b"", "a.json": b'{"text": 1}'},
            "a.json has text: expected the key caption: expected a caption with",
        ),
    ]:
        write_tar(tmp_path / "a.tar", members)
        with pytest.raises(InputError) as error:
            opened(tmp_path / "a.tar")
        assert expected in str(error.value)


def test_wrong_tables(tmp_path: Path) -> None:
    place = tmp_path / "a.parquet"
    both = {"one": b"1", "two": b"2", "caption": "a"}
    for row, settings, expected in [
        ({"video": b"1", "text": "a"}, {}, "has no column 'caption', it has text, video: name the one of the captions"),
        (both, {}, "has several columns of media (one, two): name one with --media-column"),
        ({"caption": "a"}, {}, "has no column of media (caption): name one with --media-column"),
        (both, {"media_column": "three"}, "has no column 'three', it has caption, one, two: name the one of the media"),
        ({"video": b"", "caption": "a"}, {}, "no media: the column video is empty in its first 1 rows"),
    ]:
        write_parquet(place, [row])
        with pytest.raises(InputError) as error:
            opened(place, **settings)
        assert expected in str(error.value)
    make_saved(tmp_path / "saved")
    with pytest.raises(InputError, match="has no split 'train', it has test: name one with --split"):
        opened(tmp_path / "saved")


# Odd files -----------------------------------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


def test_what_is_no_file(tmp_path: Path) -> None:
    """Pipes, sockets, devices, folders and links in the place of media and captions: each is a line, none is opened."""
    fill(
        tmp_path,
        {"good.png": b"1", "good.txt": "good", "cap.png": b"2", "dir.mp4/in.png": b"3", "dir.mp4/in.txt": "in"},
    )
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "cap.txt")
    (tmp_path / "dead.png").symlink_to("nowhere")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "round").symlink_to(".")
    fill(tmp_path, {"dead.txt": "x", "__MACOSX/x.png": b"", "._good.png": b"\0", ".git/x.png": b""})
    source = opened(tmp_path)
    pipe, link = "is a pipe, a socket or a device: expected a file", "is a link that leads nowhere: expected a file"
    assert problems(source) == {
        "cap.png": f"no caption: cap.txt {pipe}",
        "cap.txt": pipe,
        "dead.png": link,
        "dir.mp4": "is a folder: expected a file",
        "loop.png": link,
        "pipe.png": pipe,
    }
    assert [item.source for item in source.items() if item.problem is None] == ["dir.mp4/in.png", "good.png"]


def test_names_that_are_not_unicode(tmp_path: Path) -> None:
    """They are rejected by a name that can be written down; line breaks and the like are names as others."""
    names = [b"caf\xe9.png", b"two\nlines.png", "\x1b[1m\u202e.png".encode(), "👩‍🚀.png".encode()]
    for name in names:
        for path in (name, name.replace(b".png", b".txt")):
            Path(os.fsdecode(bytes(tmp_path) + b"/" + path)).write_bytes(b"x")
    source = opened(tmp_path)
    wrong = "its name is not UTF-8: expected one that is"
    assert problems(source) == {"caf\\xe9.png": wrong, "caf\\xe9.txt": wrong}
    assert sorted(item.source.encode() for item in source.items() if item.problem is None) == sorted(names[1:])


def test_deep_folders(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["d"] * 1200)
    here = Path.cwd()
    os.chdir(tmp_path)
    for _ in range(1200):  # a path of them all is too long for one call on some systems
        Path("d").mkdir()
        os.chdir("d")
    Path("a.png").write_bytes(b"1")
    Path("a.txt").write_text("deep")
    os.chdir(here)
    [item] = opened(tmp_path).items()
    assert (item.source, read_caption(item)) == (str(deep.relative_to(tmp_path) / "a.png"), "deep")
    subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # shutil is too deep in itself


def test_one_caption_is_of_one_file(tmp_path: Path) -> None:
    """The video's before the picture's; two captions that differ in capitals alone are none."""
    fill(
        tmp_path,
        {"a.png": "", "a.mp4": "", "a.txt": "a", "b.png": "", "b.txt": "b", "b.TXT": "B", "c.png": "", "c.txt": "c"},
    )
    assert problems(opened(tmp_path)) == {
        "a.png": "no caption: a.mp4 has the same name, and the caption: expected a name of its own",
        "b.png": "no caption: there are b.TXT and b.txt: expected one of them",
    }


def test_letters_and_accents_apart(tmp_path: Path) -> None:
    """As macOS writes names: they are the same ones."""
    apart, together = "a\u0308", "\u00e4"
    fill(tmp_path / "beside", {f"{apart}.png": "", f"{together}.txt": "beside"})
    fill(tmp_path / "table", {f"{apart}.png": "", "metadata.csv": f"file_name,caption\n{together}.png,listed\n"})
    for folder, caption in (("beside", "beside"), ("table", "listed")):
        [item] = opened(tmp_path / folder).items()
        assert (item.source, item.problem, read_caption(item)) == (f"{apart}.png", None, caption)


def test_tables_in_folders_below(tmp_path: Path) -> None:
    """Each is of its folder and those below; media without a table above have their captions beside them."""
    fill(
        tmp_path,
        {
            "loose.png": "",
            "loose.txt": "loose",
            "orphan.txt": "x",
            "sub/metadata.csv": "file_name;caption\na.png;an a\ndeep\\b.png;a b\n../loose.png;again\n/../x.png;\n",
            "sub/a.png": "",
            "sub/deep/b.png": "",
            "sub/c.png": "",
            "sub/c.txt": "not read",
            "bad/metadata.csv": "name,text\n",
            "bad/d.png": "",
            "bad/d.txt": "a d",
        },
    )
    source = opened(tmp_path)
    assert {item.source: read_caption(item) for item in source.items() if item.problem is None} == {
        "sub/a.png": "an a",
        "sub/deep/b.png": "a b",
        "loose.png": "again",
        "bad/d.png": "a d",
    }
    assert problems(source) == {
        "bad/metadata.csv": "has no rows: expected file_name and caption of each file",
        "orphan.txt": "a caption without media: nothing of its name is beside it",
        "/../x.png": "no caption: the column caption is empty",
        "sub/c.png": "no caption: it is not in sub/metadata.csv",
    }


TABLE_ROWS = [
    (
        "a.png,A dog on a beach, running",
        "row 1 has 3 cells for 2 columns: expected quotes around text with a delimiter",
    ),
    ("a.png", "row 1 has 1 cell for 2 columns: expected a cell for each"),
    ('a.png,"A dog" runs', "metadata.csv:1: row 1 is not readable as CSV: ',' expected after '\"'"),
    ("a.png,first line\nsecond line", "row 2 behind it is no whole row: expected quotes around text of several lines"),
    ('a.png,"never closed\nb.png,b"', "no caption: it goes on over the row of b.png: expected its quote to be closed"),
    ("a.png,caf\udce9", "no caption: the column caption is not UTF-8 (\\xe9): expected UTF-8"),
    ("a.png,nul\0", "no caption: the column caption holds NUL characters: expected text"),
    ("a.png\0,nul", "metadata.csv:1: file_name is a.png\\x00: expected a name in UTF-8, without NUL"),
    (f"{'x' * 5000}.png,long", "there is no such file"),
    ("https://host/a.png,", "no caption: the column caption is empty"),
]


@pytest.mark.parametrize(("row", "expected"), TABLE_ROWS, ids=range(len(TABLE_ROWS)))
def test_rows_that_are_wrong(row: str, expected: str, tmp_path: Path) -> None:
    """Each costs itself alone, and is said of its file where that is known."""
    table = f"file_name,caption\n{row}\nc.png,a c\n"
    fill(tmp_path, {"a.png": "", "b.png": "", "c.png": "", "metadata.csv": table.encode("utf-8", "surrogateescape")})
    source = opened(tmp_path)
    said = [f"{name}: {problem}" for name, problem in problems(source).items()]
    assert any(expected in line for line in said), said
    assert [(item.source, item.caption) for item in source.items() if item.problem is None] == [("c.png", "a c")]
    assert all(len(line) < 400 for line in said)


def test_lines_that_are_wrong(tmp_path: Path) -> None:
    lines = ['{"file_name": "a.png", "caption": "a"}', "{", "[" * 100_000, "7", '{"file_name": 7}', '{"caption": "x"}']
    lines += ['{"file_name": "b.png", "caption": {"en": "b"}}', '{"file_name": "c.png"}']
    source = opened(fill(tmp_path, {"a.png": "", "b.png": "", "c.png": "", "metadata.jsonl": "\n".join(lines)}))
    found = problems(source)
    assert found.pop("metadata.jsonl:2").startswith("line 2 is not JSON (Expecting property name")
    assert found == {
        "b.png": "no caption: the column caption is an object (keys en): expected text",
        "c.png": "no caption: the column caption is empty",
        "metadata.jsonl:3": "line 3 is not JSON (it is nested too deeply)",
        "metadata.jsonl:4": "line 4 is 7: expected an object",
        "metadata.jsonl:5": "file_name is the number 7: expected text",
        "metadata.jsonl:6": "its row has no file_name",
    }


def test_odd_members_of_tars(tmp_path: Path) -> None:
    """Samples need not stand together; links, folders and bytes behind the end are said."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        long = "x" * 150
        for name in (
            "1.0.png",
            "1.5.png",
            "1.0.txt",
            "1.5.txt",
            f"{long}/a.PNG",
            f"{long}/a.TXT",
            "._1.png",
            "../up.png",
        ):
            info = tarfile.TarInfo(name)
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
        for name, kind in (("link.png", tarfile.SYMTYPE), ("fifo.mp4", tarfile.FIFOTYPE), ("dir.mp4", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else ""
            tar.addfile(info)
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar").read_bytes() * 2)
    (tmp_path / "c.tar").write_bytes(POINTER)
    source = opened(tmp_path)
    good = [(item.source, item.caption) for item in source.items() if item.problem is None]
    assert good[:3] == [
        ("a.tar/1.0.png", "1.0.txt"),
        ("a.tar/1.5.png", "1.5.txt"),
        (f"a.tar/{long}/a.PNG", f"{long}/a.TXT"),
    ]
    found = problems(source)
    assert found["a.tar/link.png"] == "is a link in the tar, to /etc/passwd: expected a file"
    assert found["a.tar/fifo.mp4"] == "is no plain file in the tar: expected one"
    assert found["a.tar/../up.png"] == "no caption: the tar has no .txt or .json of its name"
    assert "more is behind its end, after 11 members" in found["b.tar"]
    assert found["c.tar"].startswith("the tar is a Git LFS pointer, not the file itself")
    assert "a.tar" not in found


def test_pointers_and_archives_are_named(tmp_path: Path) -> None:
    fill(tmp_path, {"a.parquet": POINTER, "b.tar.gz": b"\x1f\x8b", "t/metadata.csv": POINTER, "t/a.png": ""})
    for name, expected in [
        ("a.parquet", "a.parquet: is a Git LFS pointer, not the file itself"),
        ("b.tar.gz", "b.tar.gz: is compressed: expected a folder of what is in it, or a .tar file"),
        ("t", "metadata.csv is a Git LFS pointer, not the file itself"),
    ]:
        with pytest.raises(InputError, match=expected):
            opened(tmp_path / name)


def test_captions_of_other_types(tmp_path: Path) -> None:
    for number, (value, what) in enumerate(
        [({"en": "x"}, "an object (keys en)"), (7, "the number 7"), ([7], "a list that")]
    ):
        write_parquet(tmp_path / f"{number}.parquet", [{"video": b"1", "caption": value}])
        with pytest.raises(InputError, match=re.escape(f"no caption: the column caption is {what}")):
            opened(tmp_path / f"{number}.parquet")
    rows = [
        {"video": {"bytes": b"1", "path": None}, "caption": "a"},
        {"video": {"bytes": None, "path": "../b"}, "caption": "b"},
    ]
    write_parquet(tmp_path / "paths.parquet", rows)
    assert problems(opened(tmp_path / "paths.parquet")) == {
        "00000:00001": "no media: ../b is not below the dataset: expected a path in it"
    }
    write_parquet(tmp_path / "number.parquet", [{"video": 7, "caption": "a"}])
    with pytest.raises(InputError, match="no media: the column video is the number 7: expected bytes or a path"):
        opened(tmp_path / "number.parquet", media_column="video")
