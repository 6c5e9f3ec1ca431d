"""The stream of an encoded dataset: every row once a pass, shared out over micro batches, and exactly gone on with."""

import itertools
import json

import pytest
import torch

from nova_video.data.dataset import Bucket, Sample, Shard, list_shards, write_shard
from nova_video.errors import InputError
from nova_video.training.stream import Stream, collate, is_held_out, open_loader

BUCKET = Bucket(5, 16, 16)
SHARDS, ROWS = 5, 7


def sample(number: int) -> Sample:
    moments = torch.full((8, 2, 2, 2), float(number)).bfloat16()
    text = torch.full((1 + number % 3, 4), float(number)).half()
    return Sample(f"c{number}", f"source{number}", 0.0, 1.0, f"Caption {number}.", 8.0, 0.5, BUCKET, moments, text)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Shard]:
    folder = tmp_path_factory.mktemp("dataset")
    for shard in range(SHARDS):
        rows = [sample(shard * ROWS + row) for row in range(ROWS)]
        write_shard(folder / "data" / BUCKET.name / f"{shard}.parquet", rows)
    return list_shards(folder)[BUCKET]


def stream(shards: list[Shard], micro: int = 0, count: int = 1, held_out: float = 0.0, seed: int = 0) -> Stream:
    return Stream(shards, seed, micro, count, window=4, held_out=held_out)


def ids(stream: Stream, count: int) -> list[str]:
    return [found.id for found in itertools.islice(stream, count)]


EVERY = {f"c{number}" for number in range(SHARDS * ROWS)}


def test_a_pass_has_every_row_once_and_each_pass_its_own_order(shards: list[Shard]) -> None:
    found = ids(stream(shards), 2 * len(EVERY))
    first, second = found[: len(EVERY)], found[len(EVERY) :]
    assert set(first) == set(second) == EVERY
    assert first != second
    assert first != sorted(first)
    assert ids(stream(shards), len(EVERY)) == first
    assert ids(stream(shards, seed=1), len(EVERY)) != first


@pytest.mark.parametrize("count", [2, 5])
def test_micro_batches_share_the_rows(shards: list[Shard], count: int) -> None:
    parts = []
    for micro in range(count):
        part = stream(shards, micro, count)
        parts.append([found.id for found in itertools.takewhile(lambda _: part.number == 0, part)])  # noqa: B023
    assert sorted(itertools.chain(*parts)) == sorted(EVERY)


def test_held_out_sources_never_come(shards: list[Shard]) -> None:
    kept = {f"c{n}" for n in range(SHARDS * ROWS) if not is_held_out(f"source{n}", 0.3)}
    assert 0 < len(kept) < len(EVERY)
    assert set(ids(stream(shards, held_out=0.3), 3 * len(kept))) == kept
    with pytest.raises(InputError, match="nothing for micro batch 1 of 1"):
        ids(stream(shards, held_out=1.0), 1)


@pytest.mark.parametrize(("workers", "micro", "count"), [(0, 0, 1), (0, 1, 2), (2, 0, 1)])
def test_a_loader_goes_on_with_the_very_next_rows(shards: list[Shard], workers: int, micro: int, count: int) -> None:
    def opened() -> torch.utils.data.DataLoader:
        return open_loader(stream(shards, micro, count, held_out=0.1), 3, workers)

    loader = opened()
    whole = [batch.captions for batch in itertools.islice(loader, 24)]
    loader = opened()
    for batch in itertools.islice(loader, 11):
        assert len(batch.captions) == 3
    place = json.loads(json.dumps(loader.state_dict()))
    resumed = opened()
    resumed.load_state_dict(place)
    assert [batch.captions for batch in itertools.islice(resumed, 13)] == whole[11:]


def test_batches_are_few_tensors() -> None:
    batch = collate([sample(number) for number in (4, 5)])
    assert batch.moments.shape == (2, 8, 2, 2, 2)
    assert batch.moments.dtype == torch.bfloat16
    assert batch.whole is not None
    text, lengths = batch.whole
    assert (text.shape, lengths.tolist()) == ((2, 3, 4), [2, 3])
    assert text[0].tolist() == [[4.0] * 4, [4.0] * 4, [0.0] * 4]
    assert batch.short is not None
    assert torch.equal(batch.short[0], text)  # there is one sentence alone


def test_batches_without_text_features() -> None:
    bare = Sample("a", "s", 0.0, 1.0, "A.", 8.0, 0.5, BUCKET, torch.zeros(8, 2, 2, 2).bfloat16())
    batch = collate([sample(1), bare])
    assert batch.whole is None
    assert batch.captions == ["Caption 1.", "A."]
