"""An encoded dataset follows its source: captions change, files come, go and get other names; stopped anywhere."""

import csv
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from nova_video.cli import main as cli
from nova_video.common.errors import InputError
from nova_video.data import dataset as dataset_module
from nova_video.data import encode as encode_module
from nova_video.data import follow
from nova_video.data.dataset import EncodedSample, list_shards, read_shard
from nova_video.data.encode import encode_dataset
from nova_video.data.encode_settings import EncodeSettings
from nova_video.data.follow import Counts
from nova_video.data.sources import SourceSettings
from nova_video.data.stages import DecodeSettings, Item

SIZE = (64, 96)
Pictures = dict[str, tuple[int, str]]
"""Name -> which picture, and its caption."""

BEFORE: Pictures = {f"{name}.png": (number, f"the whale {name}. On blue.") for number, name in enumerate("abcdefg")}
AFTER: Pictures = {
    "0.png": (10, "the whale 0. On blue."),  # new, before all others
    "a.png": (0, "the whale A. On blue."),  # another caption, as long as before
    "b.png": (11, "the whale b. On blue."),  # another picture
    "d.png": (3, "the whale d. On blue."),  # c is gone, d as it was
    "e2.png": (4, "the whale e. On blue."),  # another name
    "f2.png": (5, "the apple f."),  # another name and caption
    "g.png": (6, "the whale g. On blue."),
    "h.png": (12, "the whale h. On blue."),  # new
}
COUNTS = Counts(new=2, changed=2, renamed=2, removed=1, unchanged=2)


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (8, 12, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(SIZE[::-1], Image.Resampling.NEAREST).save(file, "png")
    return file.getvalue()


def write_beside(place: Path, pictures: Pictures) -> None:
    place.mkdir(exist_ok=True)
    for old in place.iterdir():
        if old.name not in pictures and old.with_suffix(".png").name not in pictures:
            old.unlink()
    for name, (number, caption) in pictures.items():
        for path, data in ((place / name, png(number)), ((place / name).with_suffix(".txt"), caption.encode())):
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)


def write_csv(place: Path, pictures: Pictures) -> None:
    write_beside(place, pictures)
    for path in place.glob("*.txt"):
        path.unlink()
    with (place / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "caption"), *((name, pictures[name][1]) for name in pictures)])


def write_tar(place: Path, pictures: Pictures) -> None:
    place.mkdir(exist_ok=True)
    names = sorted(pictures)
    for number, part in enumerate((names[:4], names[4:])):
        with tarfile.open(place / f"{number}.tar", "w") as tar:
            for name in part:
                for member, data in (
                    (f"{name[:-4]}.txt", pictures[name][1].encode()),
                    (name, png(pictures[name][0])),
                ):
                    header = tarfile.TarInfo(member)
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))


def write_parquet(place: Path, pictures: Pictures) -> None:
    place.mkdir(exist_ok=True)
    rows = [{"image": png(number), "caption": caption} for number, caption in (pictures[n] for n in sorted(pictures))]
    pq.write_table(pa.Table.from_pylist(rows), place / "clips.parquet")


def write_paths(place: Path, pictures: Pictures) -> None:
    """Parquet that names files: they change, and the table does not."""
    place.mkdir(exist_ok=True)
    write_beside(place / "media", pictures)
    rows = [{"file_name": f"media/{name}", "caption": pictures[name][1]} for name in sorted(pictures)]
    pq.write_table(pa.Table.from_pylist(rows), place / "clips.parquet")


FORMS: dict[str, Callable[[Path, Pictures], None]] = {
    "beside": write_beside,
    "csv": write_csv,
    "tar": write_tar,
    "parquet": write_parquet,
}


@pytest.fixture(scope="module")
def stages(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> encode_module.Stages:
    folder = tmp_path_factory.mktemp("stages")
    return encode_module.Stages.load(settings(folder, folder, tiny_checkpoint))


@pytest.fixture(autouse=True)
def quick(stages: encode_module.Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights load once, and there is no card."""
    monkeypatch.setattr(encode_module, "write_card", lambda *_: None)
    monkeypatch.setattr(encode_module.Stages, "load", classmethod(lambda cls, settings: stages))


def settings(source: Path, output: Path, model: Path) -> EncodeSettings:
    place = str(next(iter(source.glob("*.parquet")), source))
    return EncodeSettings(
        SourceSettings(place, group=3),
        DecodeSettings((1,), 8.0, SIZE),
        output,
        model=str(model),
        text=str(model),
        device="cpu",
    )


def rows_of(output: Path) -> dict[str, EncodedSample]:
    shards = list_shards(output)
    samples = [sample for found in shards.values() for shard in found for sample in read_shard(shard.url)]
    assert len({sample.id for sample in samples}) == len(samples)
    return {sample.id: sample for sample in samples}


def assert_same_rows(found: dict[str, EncodedSample], expected: dict[str, EncodedSample]) -> None:
    assert found.keys() == expected.keys()
    for name, sample in found.items():
        other = expected[name]
        assert (sample.caption, sample.source) == (other.caption, other.source)
        torch.testing.assert_close(sample.moments.float(), other.moments.float(), rtol=0.02, atol=0.02)
        torch.testing.assert_close(sample.text, other.text, rtol=0.01, atol=0.01)
        assert (sample.text_short is None) == (other.text_short is None)


def content(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("form", FORMS)
def test_a_dataset_is_that_of_its_source(form: str, tmp_path: Path, tiny_checkpoint: Path) -> None:
    """As if it had been encoded anew; what is as it was is not decoded again."""
    source, output = tmp_path / "source", tmp_path / "dataset"
    FORMS[form](source, BEFORE)
    first = encode_dataset(settings(source, output, tiny_checkpoint))
    assert first.counts == Counts(new=7)
    before = content(output)
    again = encode_dataset(settings(source, output, tiny_checkpoint))
    assert (again.counts, again.encoded, content(output)) == (Counts(unchanged=7), 0, before)
    FORMS[form](source, AFTER)
    summary = encode_dataset(settings(source, output, tiny_checkpoint))
    assert summary.encoded == 3  # 0, b and h
    assert sum(summary.clips.values()) == summary.items == 8
    if form != "parquet":  # whose rows have numbers for names
        assert summary.counts == COUNTS
    encode_dataset(settings(source, tmp_path / "fresh", tiny_checkpoint))
    assert_same_rows(rows_of(output), rows_of(tmp_path / "fresh"))
    before = content(output)
    again = encode_dataset(settings(source, output, tiny_checkpoint))
    assert (again.counts, content(output)) == (Counts(unchanged=8), before)


def test_files_that_a_table_names(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """The table is as it was, and one of them is not."""
    source, output = tmp_path / "source", tmp_path / "dataset"
    write_paths(source, BEFORE)
    encode_dataset(settings(source, output, tiny_checkpoint))
    (source / "media" / "b.png").write_bytes(png(11))
    summary = encode_dataset(settings(source, output, tiny_checkpoint))
    assert summary.counts == Counts(changed=1, unchanged=6)


def test_a_caption_of_the_same_length_and_time(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Its media are not decoded again, whatever the file system says of it."""
    source, output = tmp_path / "source", tmp_path / "dataset"
    write_beside(source, BEFORE)
    encode_dataset(settings(source, output, tiny_checkpoint))
    before = rows_of(output)
    caption = source / "c.txt"
    was = caption.stat()
    caption.write_text("the apple c. On blue.")
    os.utime(caption, ns=(was.st_atime_ns, was.st_mtime_ns))
    summary = encode_dataset(settings(source, output, tiny_checkpoint))
    assert (summary.counts, summary.encoded) == (Counts(changed=1, unchanged=6), 0)
    after = rows_of(output)
    assert {name for name in after if after[name].caption != before[name].caption} == {"c.png#0"}
    assert torch.equal(after["c.png#0"].moments, before["c.png#0"].moments)
    assert not torch.equal(after["c.png#0"].text, before["c.png#0"].text)


def test_media_of_the_same_size_and_time(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """The time of its last change of status tells."""
    source, output = tmp_path / "source", tmp_path / "dataset"
    write_beside(source, {name: BEFORE[name] for name in ("a.png", "b.png")})
    for name in ("a", "b"):
        Image.new("RGB", SIZE[::-1], (0, 0, 1 + (name == "b"))).save(source / f"{name}.bmp")
        (source / f"{name}.png").unlink()
    encode_dataset(settings(source, output, tiny_checkpoint))
    before, was = rows_of(output), (source / "a.bmp").stat()
    (source / "a.bmp").write_bytes((source / "b.bmp").read_bytes())
    os.utime(source / "a.bmp", ns=(was.st_atime_ns, was.st_mtime_ns))
    assert (source / "a.bmp").stat().st_size == was.st_size
    assert encode_dataset(settings(source, output, tiny_checkpoint)).counts == Counts(changed=1, unchanged=1)
    assert not torch.equal(rows_of(output)["a.bmp#0"].moments, before["a.bmp#0"].moments)


def test_files_that_were_not_written_to_are_not_read(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the clock is past the last change; files that were only touched are known by then again."""
    monkeypatch.setattr(follow, "SETTLE_TIME", -(10**18))
    digest, read = follow.media_digest, list[str]()

    def note(item: Item) -> str:
        read.append(item.source)
        return digest(item)

    for form in ("beside", "tar"):
        source, output = tmp_path / form, tmp_path / f"dataset-{form}"
        FORMS[form](source, BEFORE)
        encode_dataset(settings(source, output, tiny_checkpoint))
        monkeypatch.setattr(follow, "media_digest", note)
        assert encode_dataset(settings(source, output, tiny_checkpoint)).counts == Counts(unchanged=7)
        assert read == []
        for path in source.glob("[a0].*"):
            path.touch()
        for expected in (["a.png"] if form == "beside" else [f"0.tar/{name}.png" for name in "abcd"], []):
            assert encode_dataset(settings(source, output, tiny_checkpoint)).counts == Counts(unchanged=7)
            assert sorted(read) == expected
            read.clear()
        monkeypatch.setattr(follow, "media_digest", digest)


class KilledError(BaseException):
    """In the place of kill -9: nothing catches it."""


@pytest.mark.parametrize("form", ["beside", "tar"])
def test_stopped_anywhere(form: str, tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before every file that an update writes or removes: the next run ends with the same files."""
    source, begun = tmp_path / "source", tmp_path / "begun"
    FORMS[form](source, BEFORE)
    encode_dataset(settings(source, begun, tiny_checkpoint))
    FORMS[form](source, AFTER)
    write, unlink = dataset_module.write_file, Path.unlink
    stop, count = -1, 0

    def die() -> None:
        nonlocal count
        if count == stop:
            raise KilledError
        count += 1

    def write_or_die(place: object, data: object) -> None:
        die()
        write(place, data)  # type: ignore[arg-type]

    def unlink_or_die(self: Path, missing_ok: bool = False) -> None:
        if begun not in self.parents and tmp_path in self.parents:
            die()
        unlink(self, missing_ok)

    for module in (encode_module, dataset_module):
        monkeypatch.setattr(module, "write_file", write_or_die)
    monkeypatch.setattr(Path, "unlink", unlink_or_die)
    shutil.copytree(begun, tmp_path / "whole", symlinks=True)
    encode_dataset(settings(source, tmp_path / "whole", tiny_checkpoint))
    expected, total = content(tmp_path / "whole"), count
    assert total > 12
    for stop in range(total):
        output, count = tmp_path / "stopped", 0
        shutil.copytree(begun, output)
        with pytest.raises(KilledError):
            encode_dataset(settings(source, output, tiny_checkpoint))
        kept, stop = stop, -1
        encode_dataset(settings(source, output, tiny_checkpoint))
        assert content(output) == expected, kept
        stop = kept
        shutil.rmtree(output)


def test_older_datasets_follow_too(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they know are captions, names and sizes: with those as they were, fingerprints are taken now."""
    source, output = tmp_path / "source", tmp_path / "dataset"
    write_beside(source, BEFORE)
    (source / "broken.png").write_bytes(b"broken")
    (source / "broken.txt").write_text("the whale")
    encode_dataset(settings(source, output, tiny_checkpoint))
    for path in (output / "progress").glob("*.json"):
        values = json.loads(path.read_text())
        path.write_text(json.dumps({name: values[name] for name in ("items", "final", "shards", "rejected")}))
    noted = encode_module._content(encode_module.open_source(SourceSettings(str(source))))
    (output / "progress" / "source.json").write_text(json.dumps(noted))
    (source / "c.txt").write_text("the whale C. On blue.")
    before = rows_of(output)
    summary = encode_dataset(settings(source, output, tiny_checkpoint))
    assert (summary.counts, summary.encoded) == (Counts(changed=1, unchanged=7), 0)
    assert rows_of(output).keys() == before.keys()
    assert not (output / "progress" / "source.json").exists()
    (source / "b.png").write_bytes(png(11))
    assert encode_dataset(settings(source, output, tiny_checkpoint)).counts == Counts(changed=1, unchanged=7)

    (output / "progress" / "source.json").write_text(json.dumps(noted | {"sizes": "other"}))
    for path in (output / "progress").glob("0*.json"):
        values = json.loads(path.read_text())
        path.write_text(json.dumps({name: values[name] for name in ("items", "final", "shards", "rejected")}))
    with pytest.raises(InputError, match="was encoded by an older version, and its source has changed since: expected"):
        encode_dataset(settings(source, output, tiny_checkpoint))


def test_a_part_that_breaks_off_costs_no_rows(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "dataset"
    write_tar(source, BEFORE)
    encode_dataset(settings(source, output, tiny_checkpoint))
    before, whole = content(output), (source / "1.tar").read_bytes()
    (source / "1.tar").write_bytes(whole[: len(whole) // 4])
    with pytest.raises(InputError, match=r"1.tar: the tar cannot be read on: .* expected all of it, as when it was"):
        encode_dataset(settings(source, output, tiny_checkpoint))
    assert {name: data for name, data in content(output).items() if name in before} == before
    (source / "1.tar").write_bytes(whole)
    assert encode_dataset(settings(source, output, tiny_checkpoint)).counts == Counts(unchanged=7)


def test_damaged_records_are_named(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "dataset"
    write_beside(source, BEFORE)
    encode_dataset(settings(source, output, tiny_checkpoint))
    path = output / "progress" / "00000-00001.json"
    for text in (
        '{"items": 3}',
        '{"items": 1, "final": true, "entries": [1]}',
        "[]",
        '{"items": 1, "final": true, "x": 1}',
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=r"00000-00001.json"):
            encode_dataset(settings(source, output, tiny_checkpoint))
    path.unlink()
    assert encode_dataset(settings(source, output, tiny_checkpoint)).counts == Counts(new=3, unchanged=4)


def test_what_the_command_says(
    tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = tmp_path / "source", tmp_path / "dataset"

    def encode(pictures: Pictures) -> str:
        write_beside(source, pictures)
        arguments = ["encode", source, "-o", output, "--no-ray", "--model", tiny_checkpoint, "--device", "cpu"]
        assert cli.main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out.removeprefix(f"{output}: ")

    assert encode(BEFORE) == "7 pictures from 7 sources\n"
    assert encode(BEFORE) == "7 pictures from 7 sources; all was there, nothing was encoded\n"
    counts = "2 new, 2 changed, 2 renamed, 1 removed, 2 unchanged"
    assert encode(AFTER) == f"8 pictures from 8 sources; since the last time {counts}\n"
