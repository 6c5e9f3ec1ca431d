"""The stream of an encoded dataset: every row once a pass, shared out over micro batches, and exactly gone on with."""

import itertools
import json
import multiprocessing
import signal
import subprocess
import sys

import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from nova_video.common.errors import InputError
from nova_video.data.dataset import Bucket, EncodedSample, Shard, list_shards, write_shard
from nova_video.training.stream import Rows, collate, is_held_out, join_states, open_loader, state_of

BUCKET = Bucket(5, 16, 16)
SHARDS, ROWS = 5, 7


def sample(number: int) -> EncodedSample:
    moments = torch.full((8, 2, 2, 2), float(number)).bfloat16()
    text = torch.full((1 + number % 3, 4), float(number)).half()
    return EncodedSample(
        f"c{number}", f"source{number}", 0.0, 1.0, f"Caption {number}.", 8.0, 0.5, BUCKET, moments, text
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Shard]:
    folder = tmp_path_factory.mktemp("dataset")
    for shard in range(SHARDS):
        samples = [sample(shard * ROWS + row) for row in range(ROWS)]
        write_shard(folder / "data" / BUCKET.name / f"{shard}.parquet", samples)
    return list_shards(folder)[BUCKET]


def rows(shards: list[Shard], micro: int = 0, count: int = 1, held_out: float = 0.0, seed: int = 0) -> Rows:
    return Rows(shards, seed, micro, count, window=4, held_out=held_out)


def ids(rows: Rows, count: int) -> list[str]:
    return [found.id for found in itertools.islice(rows, count)]


EVERY = {f"c{number}" for number in range(SHARDS * ROWS)}


def test_a_pass_has_every_row_once_and_each_pass_its_own_order(shards: list[Shard]) -> None:
    found = ids(rows(shards), 2 * len(EVERY))
    first, second = found[: len(EVERY)], found[len(EVERY) :]
    assert set(first) == set(second) == EVERY
    assert first != second
    assert first != sorted(first)
    assert ids(rows(shards), len(EVERY)) == first
    assert ids(rows(shards, seed=1), len(EVERY)) != first


@pytest.mark.parametrize("count", [2, 5, 6])
def test_micro_batches_share_the_rows(shards: list[Shard], count: int) -> None:
    parts = []
    for micro in range(count):
        part = rows(shards, micro, count)
        parts.append([found.id for found in itertools.takewhile(lambda _: part.number == 0, part)])  # noqa: B023
    assert sorted(itertools.chain(*parts)) == sorted(EVERY)


def test_held_out_sources_never_come(shards: list[Shard]) -> None:
    kept = {f"c{n}" for n in range(SHARDS * ROWS) if not is_held_out(f"source{n}", 0.3)}
    assert 0 < len(kept) < len(EVERY)
    assert set(ids(rows(shards, held_out=0.3), 3 * len(kept))) == kept
    with pytest.raises(InputError, match="nothing for micro batch 1 of 1"):
        ids(rows(shards, held_out=1.0), 1)


def loader(
    shards: list[Shard], micro: list[int], count: int, workers: int, held_out: float = 0.1
) -> StatefulDataLoader:
    return open_loader(shards, 0, micro, count, 3, workers, 8, held_out)


def captions(loader: StatefulDataLoader, count: int) -> list[dict[int, list[str]]]:
    """By micro batch."""
    micro = [rows.micro for rows in loader.dataset.rows.values()]
    rounds = [each.parts(len(micro)) for each in itertools.islice(loader, count)]
    return [{number: part.captions for number, part in zip(micro, parts, strict=True)} for parts in rounds]


@pytest.mark.parametrize(
    ("workers", "micro", "count"), [(0, [0], 1), (0, [1], 2), (2, [0], 1), (2, [0, 1], 2), (2, [1], 5), (2, [0, 8], 9)]
)
def test_a_loader_goes_on_with_the_very_next_rows(
    shards: list[Shard], workers: int, micro: list[int], count: int
) -> None:
    whole = captions(loader(shards, micro, count, workers), 24)
    assert all(list(each) == micro and len(told) == 3 for each in whole for told in each.values())
    stopped = loader(shards, micro, count, workers)
    assert captions(stopped, 11) == whole[:11]
    resumed = loader(shards, micro, count, workers)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert captions(resumed, 13) == whole[11:]


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="who sent a signal is not known here")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_workers_leave_signals_to_the_main_process(sent: signal.Signals, shards: list[Shard]) -> None:
    """Which stops the run in order, and them with it."""
    before = set(multiprocessing.active_children())
    told = iter(loader(shards, [0], 1, workers=2))
    read = [next(told).captions]
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    others = [sys.executable, "-c", "import os, sys; [os.kill(int(pid), int(sys.argv[1])) for pid in sys.argv[2:]]"]
    subprocess.run([*others, str(int(sent)), *(str(worker.pid) for worker in workers)], check=True)
    read += [next(told).captions for _ in range(9)]
    assert read == [each[0] for each in captions(loader(shards, [0], 1, workers=2), 10)]
    del told
    for worker in workers:
        worker.join(20)
        assert worker.exitcode == 0


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="who sent a signal is not known here")
def test_the_main_process_can_end_workers(shards: list[Shard]) -> None:
    """As multiprocessing does where a run ends with an error."""
    before = set(multiprocessing.active_children())
    told = iter(loader(shards, [0], 1, workers=2))
    next(told)
    for worker in set(multiprocessing.active_children()) - before:
        worker.terminate()
        worker.join(20)
        assert worker.exitcode == 0


def test_micro_batches_are_the_same_however_they_are_divided_and_go_on_so(shards: list[Shard]) -> None:
    together = loader(shards, [0, 1], 2, workers=2)
    whole = captions(together, 9)
    apart = [loader(shards, [micro], 2, workers=2) for micro in (0, 1)]
    begun = [captions(each, 4) for each in apart]
    assert [{**first, **second} for first, second in zip(*begun, strict=True)] == whole[:4]
    states = [state_of(each.state_dict(), micro) for micro, each in enumerate(apart)]
    united = loader(shards, [0, 1], 2, workers=2)
    united.load_state_dict(join_states(json.loads(json.dumps(states))))
    assert captions(united, 5) == whole[4:]
    for micro in (0, 1):
        single = loader(shards, [micro], 2, workers=2)
        single.load_state_dict(state_of(json.loads(json.dumps(together.state_dict())), micro))
        more = captions(loader(shards, [0, 1], 2, workers=2), 12)
        assert captions(single, 3) == [{micro: each[micro]} for each in more[9:]]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_any_number_of_micro_batches_and_workers_finds_rows(shards: list[Shard], count: int) -> None:
    found = captions(loader(shards, list(range(count)), count, workers=4, held_out=0.0), 12)
    assert {told for each in found for batch in each.values() for told in batch} <= {f"Caption {n}." for n in range(35)}


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


def test_a_batch_has_equal_parts() -> None:
    first, second = collate([sample(number) for number in (4, 5, 1, 2)]).parts(2)
    assert (first.captions, second.captions) == (["Caption 4.", "Caption 5."], ["Caption 1.", "Caption 2."])
    alone = collate([sample(1), sample(2)])
    assert torch.equal(second.moments, alone.moments)
    assert second.whole is not None
    assert alone.whole is not None
    assert torch.equal(second.whole[1], alone.whole[1])
    assert torch.equal(second.whole[0][:, : alone.whole[0].shape[1]], alone.whole[0])


def test_batches_without_text_features() -> None:
    bare = EncodedSample("a", "s", 0.0, 1.0, "A.", 8.0, 0.5, BUCKET, torch.zeros(8, 2, 2, 2).bfloat16())
    batch = collate([sample(1), bare])
    assert batch.whole is None
    assert batch.captions == ["Caption 1.", "A."]
