"""Rows of an encoded dataset, streamed: Parquet shards (`data/dataset.py`) to batches of samples, for ever.

Hugging Face `datasets` streams the shards from a folder or a URL; torchdata's loader knows where it is, so that a
resumed run reads on with the very next row. A pass reads the shards in an order of its own and mixes neighbouring rows;
both follow from the seed and the number of the pass. Every micro batch of a step has rows of its own, the same however
many processes there are, and a process reads those of all its micro batches with one loader.
"""

import hashlib
import os
import random
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from datasets import IterableDataset, load_dataset
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import IterableDataset as TorchDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from nova_video.common.checks import check_number
from nova_video.common.errors import InputError
from nova_video.data.dataset import EncodedSample, Shard, to_sample

EMPTY_PASSES = 8
"""In a row, without a single row: more would find none either. Passes share the shards out differently."""

MICRO = "micro_batches"
"""Marks the stream's own state within that of its loader."""


def is_held_out(source: str, share: float) -> bool:
    """True if a source's clips are kept for validation, by the hash of its name."""
    return int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big") < share * 2**64


class Rows:
    """Samples of one bucket for one of `count` micro batches, pass after pass, without end."""

    def __init__(
        self, shards: Sequence[Shard], seed: int, micro: int, count: int, window: int, held_out: float
    ) -> None:
        """`window` neighbouring rows are mixed; a share of `held_out` of the sources is left out."""
        self.urls = [shard.url for shard in shards]
        self.seed, self.micro, self.count, self.window, self.held_out = seed, micro, count, window, held_out
        self.number = 0  # of the pass
        self.rows: IterableDataset | None = None
        self.place: dict[str, Any] | None = None  # within the pass, where to go on from

    def one_pass(self, number: int) -> IterableDataset:
        """The rows of a pass that belong to this micro batch.

        They are whole shards if there are enough of them. Otherwise all micro batches read all shards, and each takes
        its share of the rows.
        """
        urls, enough = list(self.urls), len(self.urls) >= self.count
        random.Random(f"{self.seed}-{number}").shuffle(urls)
        if enough:
            urls = urls[self.micro :: self.count]
        files = [url.replace("[", "[[]") for url in urls]  # which are taken as patterns
        rows = load_dataset("parquet", data_files=files, split="train", streaming=True)
        if not enough:
            rows = split_dataset_by_node(rows, self.micro, self.count)
        return rows.map(Mix(f"{self.seed}-{number}"), batched=True, batch_size=self.window)

    def __iter__(self) -> Iterator[EncodedSample]:
        empty = 0
        while empty < EMPTY_PASSES:
            self.rows = self.one_pass(self.number)
            empty += self.place is None
            if self.place is not None:
                self.rows.load_state_dict(self.place)
                self.place = None
            try:
                for row in self.rows:
                    if not is_held_out(row["source"], self.held_out):
                        empty = 0
                        yield to_sample(row)
            except InputError:
                raise
            except Exception as error:  # of many kinds: a damaged shard, one that is gone, no network
                said = " ".join(str(error).split()) or type(error).__name__
                folder = self.urls[0].rpartition("/")[0]
                raise InputError(f"{folder}: unreadable shard ({said}): `nova data inspect` tells which") from None
            self.number += 1
        raise InputError(
            f"{self.urls[0]} and {len(self.urls) - 1} more shards have nothing for micro batch"
            f" {self.micro + 1} of {self.count}: expected more rows, fewer micro batches or a smaller"
            " dataset.held_out"
        )

    def state_dict(self) -> dict[str, Any]:
        place = self.place
        if place is None and self.rows is not None:
            place = self.rows.state_dict()
        return {"pass": self.number, "rows": place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number, self.place = state["pass"], state["rows"]


class Stream(TorchDataset):
    """The samples that a process learns from in every step: those of its micro batches in turn."""

    def __init__(self, rows: Sequence[Rows], batch: int) -> None:
        self.rows = {str(each.micro): each for each in rows}
        self.batch = batch
        self.before: dict[str, Any] | None = None  # the state before samples that are being put together

    def __iter__(self) -> Iterator["LoadedBatch"]:
        samples = [iter(rows) for rows in self.rows.values()]
        while True:
            self.before = self.state_dict()
            loaded = collate([sample for each in samples for sample in islice(each, self.batch)])
            self.before = None
            yield loaded

    def state_dict(self) -> dict[str, Any]:
        return self.before or {MICRO: {micro: rows.state_dict() for micro, rows in self.rows.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for micro, rows in self.rows.items():
            rows.load_state_dict(state[MICRO][micro])


def state_of(state: Any, micro: int) -> Any:
    """The part of a loader's state that belongs to one micro batch."""
    if not isinstance(state, dict):
        return state
    if MICRO in state:
        return {MICRO: {str(micro): state[MICRO][str(micro)]}}
    return {name: state_of(value, micro) for name, value in state.items()}


def join_states(states: Sequence[Any]) -> Any:
    """The state of a loader that has the micro batches of all of these."""
    first = states[0]
    if not isinstance(first, dict):
        return first
    if MICRO in first:
        return {MICRO: {micro: rows for state in states for micro, rows in state[MICRO].items()}}
    return {name: join_states([state[name] for state in states]) for name in first}


def check_state(state: Any) -> None:
    """Raises ValueError if this is no state of a loader: each place is a pass and a place within it."""
    if not isinstance(state, dict) or not state:
        raise ValueError(f"is {type(state).__name__}, of nothing")
    for name, value in state.items():
        if name != MICRO:
            if isinstance(value, dict) and value:
                check_state(value)
            continue
        for place in value.values() if isinstance(value, dict) else [value]:
            if not isinstance(place, dict) or not {"pass", "rows"} <= place.keys():
                raise ValueError("has a micro batch without pass and rows")
            check_number("has a pass that", place["pass"], 0, integer=True)
            if place["rows"] is not None and not (isinstance(place["rows"], dict) and place["rows"]):
                raise ValueError("has rows that are no place")


class Mix:
    """Puts rows that come together in another order, fixed by the pass and by which rows they are."""

    def __init__(self, seed: str) -> None:
        self.seed = seed

    def __call__(self, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        order = list(range(len(columns["id"])))
        random.Random(f"{self.seed}-{columns['id'][0]}").shuffle(order)
        return {name: [values[i] for i in order] for name, values in columns.items()}


@dataclass(frozen=True, eq=False)
class LoadedBatch:
    """A batch as the shards hold it, on the CPU."""

    moments: Tensor
    """(B, 2C, F, h, w) bf16."""
    motion: Tensor
    """(B,) pixels a frame, float32."""
    fps: Tensor
    """(B,) float32."""
    captions: list[str]
    whole: tuple[Tensor, Tensor] | None
    """Features of the captions, (B, T, D) padded with zeros, and how many tokens each has, (B,); None: not stored."""
    short: tuple[Tensor, Tensor] | None
    """Text features of their first sentences."""

    def parts(self, count: int) -> "list[LoadedBatch]":
        """So many equal parts."""
        size = len(self.captions) // count
        places = [slice(start, start + size) for start in range(0, count * size, size)]
        return [
            LoadedBatch(
                self.moments[place],
                self.motion[place],
                self.fps[place],
                self.captions[place],
                None if self.whole is None else (self.whole[0][place], self.whole[1][place]),
                None if self.short is None else (self.short[0][place], self.short[1][place]),
            )
            for place in places
        ]


def collate(samples: list[EncodedSample]) -> LoadedBatch:
    """Few tensors, since each is handed from process to process by itself, with a file handle of its own."""
    whole = short = None
    if all(sample.text is not None for sample in samples):
        whole = pad([sample.text for sample in samples])
        short = pad([sample.text if sample.text_short is None else sample.text_short for sample in samples])
    return LoadedBatch(
        torch.stack([sample.moments for sample in samples]),
        torch.tensor([sample.motion for sample in samples]),
        torch.tensor([sample.fps for sample in samples]),
        [sample.caption for sample in samples],
        whole,
        short,
    )


def as_it_is(loaded: LoadedBatch) -> LoadedBatch:
    """A stream's samples are put together already."""
    return loaded


def pad(texts: list[Any]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(text) for text in texts])
    return torch.nn.utils.rnn.pad_sequence(texts, batch_first=True), lengths


def leave_signals_to_the_main_process(worker: int) -> None:
    """Ignores Ctrl-C and SIGTERM here: the main process stops the run in order and ends this worker.

    A terminal or a cluster sends the signals to all processes of a run.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # where one cannot know who sends it, SIGTERM ends this process
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_when_told_by, args=(os.getppid(),), daemon=True).start()


def end_when_told_by(main: int) -> None:
    """Wait for SIGTERM of the process `main`, as multiprocessing ends its own."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main:
        pass
    os._exit(0)


def open_loader(
    shards: Sequence[Shard],
    seed: int,
    micro: Sequence[int],
    count: int,
    batch: int,
    workers: int,
    shuffle: int,
    held_out: float,
) -> StatefulDataLoader:
    """Yields `Loaded` samples for these of the `count` micro batches, `batch` for each, in their order.

    Worker processes share the shards of a micro batch, so that there are at most as many as it has shards. As many as
    `shuffle` neighbouring rows are mixed by all micro batches and workers together, a batch's by each at least.
    """
    workers = min(workers, max(1, len(shards) // count))
    window = max(min(batch, shuffle), shuffle // (count * max(1, workers)))
    stream = Stream([Rows(shards, seed, number, count, window, held_out) for number in micro], batch)
    ahead = {"prefetch_factor": 2 if len(micro) == 1 else 1} if workers else {}  # batches that wait in memory
    with warnings.catch_warnings():  # torchdata calls something of torch that is going away
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
        return StatefulDataLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            collate_fn=as_it_is,
            worker_init_fn=leave_signals_to_the_main_process,
            **ahead,
        )
