"""The encoded dataset: what is written is read again, bit for bit, and what is wrong with a shard is named."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nova_video.common.errors import InputError
from nova_video.data import dataset
from nova_video.data.dataset import Bucket, DatasetInfo, EncodedSample

BUCKET = Bucket(5, 16, 24)
INFO = DatasetInfo("emoji", "ab12", latent_channels=4, spatial_stride=8, text_encoder="MiniLM", text_dim=6)


def make_samples(count: int = 3, bucket: Bucket = BUCKET) -> list[EncodedSample]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return [
        EncodedSample(
            id=f"clip-{index}",
            source="films/ä b.mp4",
            start=index / 3,
            end=index / 3 + 0.1,
            caption="A dog runs. It is brown.",
            fps=8.0,
            motion=0.25 * index,
            bucket=bucket,
            moments=random(*INFO.moments_shape(bucket), dtype=torch.bfloat16),
            text=random(5 + index, 6, dtype=torch.float16),
            text_short=random(3, 6, dtype=torch.float16) if index else None,
        )
        for index in range(count)
    ]


def same(a: EncodedSample, b: EncodedSample) -> bool:
    for name in ("moments", "text", "text_short"):
        one, other = getattr(a, name), getattr(b, name)
        if (one is None) != (other is None):
            return False
        if one is not None and (one.dtype != other.dtype or not torch.equal(one, other)):
            return False
    plain = ("id", "source", "start", "end", "caption", "fps", "motion", "bucket")
    return all(getattr(a, name) == getattr(b, name) for name in plain)


@pytest.mark.parametrize("place", ["local", "memory", "odd"])
def test_shards_are_read_as_written(tmp_path: Path, place: str) -> None:
    """Here and elsewhere, and in a folder whose name is no chain of URLs and no pattern."""
    root = {"local": str(tmp_path), "memory": f"memory://{tmp_path.name}", "odd": str(tmp_path / "a::b [*x]?")}[place]
    samples, picture = make_samples(), make_samples(1, Bucket(1, 32, 16))
    INFO.save(root)
    dataset.write_shard(dataset.shard_url(root, BUCKET, "b"), samples, "ab12")
    dataset.write_shard(dataset.shard_url(root, BUCKET, "a"), samples[:1], "ab12")
    dataset.write_shard(dataset.shard_url(root, Bucket(1, 32, 16), "a"), picture)

    shards = dataset.list_shards(root)
    assert list(shards) == [Bucket(1, 32, 16), BUCKET]
    assert [(shard.url.rsplit("/", 1)[1], shard.rows) for shard in shards[BUCKET]] == [
        ("a.parquet", 1),
        ("b.parquet", 3),
    ]
    read = dataset.read_shard(shards[BUCKET][1].url)
    assert len(read) == 3
    assert all(same(one, other) for one, other in zip(read, samples, strict=True))
    assert same(dataset.read_shard(shards[Bucket(1, 32, 16)][0].url)[0], picture[0])
    assert dataset.read_footer(shards[BUCKET][0].url) == (1, "ab12")
    assert DatasetInfo.load(root) == INFO


def test_datasets_streams_the_same_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    samples = make_samples()
    place = dataset.shard_url(tmp_path, BUCKET, "a")
    dataset.write_shard(place, samples)
    rows = datasets.load_dataset("parquet", data_files=[place], split="train", streaming=True)
    read = [dataset.to_sample(row) for row in rows]
    assert all(same(one, other) for one, other in zip(read, samples, strict=True))
    read[0].moments.zero_()  # its own memory, not the reader's


def test_large_shards_have_several_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "ROW_GROUP_BYTES", 500)
    samples = make_samples(7)
    dataset.write_shard(tmp_path / "s.parquet", samples)
    assert pq.ParquetFile(tmp_path / "s.parquet").num_row_groups > 1
    assert [sample.id for sample in dataset.iter_shard(tmp_path / "s.parquet")] == [sample.id for sample in samples]


def test_a_shard_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "data" / BUCKET.name / "a.parquet"
    dataset.write_shard(place, make_samples(1))
    before = place.read_bytes()

    def fail(*paths: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dataset.os, "replace", fail)
    with pytest.raises(
        InputError, match="a.parquet could not be written: .*No space left on device; what is finished stays"
    ):
        dataset.write_shard(place, make_samples(3))
    assert place.read_bytes() == before
    assert [path.name for path in place.parent.iterdir()] == ["a.parquet"]


def test_unreadable_shards_are_named(tmp_path: Path) -> None:
    place = Path(dataset.shard_url(tmp_path, BUCKET, "a"))
    dataset.write_shard(place, make_samples())
    whole = place.read_bytes()
    place.write_bytes(whole[:-20])
    with pytest.raises(InputError, match="a.parquet: unreadable shard"):
        dataset.list_shards(tmp_path)
    with pytest.raises(InputError, match="a.parquet: unreadable shard"):
        dataset.read_shard(place)
    table = pq.read_table(pa.BufferReader(whole))
    pq.write_table(table.drop_columns(["shape"]), place)
    with pytest.raises(InputError, match="a.parquet: not a shard of an encoded dataset: it has no column shape"):
        dataset.read_shard(place)
    pq.write_table(table.set_column(5, "fps", table["fps"].cast(pa.float64())), place)
    with pytest.raises(InputError, match="column fps is of type double: expected float"):
        dataset.list_shards(tmp_path)
    pq.write_table(table.set_column(11, "shape", pa.array([[1, 2, 3, 4]] * 3, pa.list_(pa.int32()))), place)
    with pytest.raises(InputError, match="a.parquet: unreadable shard"):
        dataset.read_shard(place)


def test_wrong_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no dataset.json: expected a dataset written by `nova encode`"):
        DatasetInfo.load(tmp_path)
    with pytest.raises(InputError, match=r"holds no shards: expected data/BUCKET/\*.parquet"):
        dataset.list_shards(tmp_path)
    with pytest.raises(InputError, match="cannot be opened"):
        dataset.list_shards("nowhere://a/b")
    (tmp_path / "dataset.json").write_text('{"format": 7}')
    with pytest.raises(InputError, match="expected a JSON object with format 1"):
        DatasetInfo.load(tmp_path)
    (tmp_path / "dataset.json").write_text('{"format": 1, "autoencoder": "emoji", "fingerprint": "a"}')
    with pytest.raises(InputError, match="lacks latent_channels, spatial_stride"):
        DatasetInfo.load(tmp_path)


def test_a_shard_holds_one_bucket(tmp_path: Path) -> None:
    one = make_samples(1)[0]
    with pytest.raises(InputError, match="one bucket, got 5x16x24, 9x16x24"):
        dataset.write_shard(tmp_path / "a.parquet", [one, replace(one, bucket=Bucket(9, 16, 24))])
    with pytest.raises(InputError, match="one bucket, got none"):
        dataset.write_shard(tmp_path / "a.parquet", [])


def test_buckets() -> None:
    assert Bucket.parse(BUCKET.name) == BUCKET
    for name in ("17x128", "16x128x128", "0x8x8", "17X128x128"):
        with pytest.raises(InputError, match="expected frames x height x width"):
            Bucket.parse(name)


@pytest.mark.parametrize(
    ("caption", "first"),
    [
        ("A dog runs. It is brown.", "A dog runs."),
        ("  A dog runs  ", "A dog runs"),
        ("A 3.5 m wall? Yes.", "A 3.5 m wall?"),
        ("Mr. Smith and J. Doe talk. They sit.", "Mr. Smith and J. Doe talk."),
        ("一只狗在跑。它是棕色的。", "一只狗在跑。"),
        ('He says "go!" Then he goes.', 'He says "go!"'),
        ("", ""),
    ],
)
def test_first_sentences(caption: str, first: str) -> None:
    assert dataset.first_sentence(caption) == first


@pytest.mark.slow
def test_a_process_that_reads_ends_well(tmp_path: Path) -> None:
    """With Arrow's threads, every third such process was aborted when it ended."""
    for name in "abcde":
        dataset.write_shard(dataset.shard_url(tmp_path, BUCKET, name), make_samples())
    code = (
        "import sys; from nova_video.data.dataset import *; shards = list_shards(sys.argv[1]).values();"
        " [list(iter_shard(s.url)) + [read_columns(s.url, ['motion'])] for found in shards for s in found]"
    )
    for _ in range(10):
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_reading_rows_imports_nothing_heavy() -> None:
    heavy = "ray", "datasets", "pyarrow", "fsspec", "cv2", "av"
    code = f"import sys, nova_video.data.dataset; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
