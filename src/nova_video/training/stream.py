"""Rows of an encoded dataset, streamed: Parquet shards (`data/dataset.py`) to batches of samples, for ever.

Hugging Face `datasets` streams the shards from a folder or a URL and splits them over micro batches and worker
processes; torchdata's loader knows where it is, so that a resumed run reads on with the very next row. A pass reads the
shards in an order of its own and mixes neighbouring rows; both follow from the seed and the number of the pass.
"""

import hashlib
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from datasets import IterableDataset, load_dataset
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import IterableDataset as TorchDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from nova_video.data.dataset import Sample, Shard, to_sample
from nova_video.errors import InputError


def is_held_out(source: str, share: float) -> bool:
    """Whether clips of this source are kept for validation: by the hash of its name, the same in every run."""
    return int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big") < share * 2**64


class Stream(TorchDataset):
    """Samples of one bucket for one of `count` micro batches, pass after pass, without end."""

    def __init__(self, shards: list[Shard], seed: int, micro: int, count: int, window: int, held_out: float) -> None:
        """`window` neighbouring rows are mixed; a share of `held_out` of the sources is left out."""
        self.urls = [shard.url for shard in shards]
        self.seed, self.micro, self.count, self.window, self.held_out = seed, micro, count, window, held_out
        self.number = 0  # of the pass
        self.rows: IterableDataset | None = None
        self.place: dict[str, Any] | None = None  # within the pass, where to go on from

    def one_pass(self, number: int) -> IterableDataset:
        """The rows of a pass that belong to this micro batch."""
        urls = list(self.urls)
        random.Random(f"{self.seed}-{number}").shuffle(urls)
        rows = load_dataset("parquet", data_files=urls, split="train", streaming=True)
        rows = split_dataset_by_node(rows, self.micro, self.count)
        return rows.map(Mix(f"{self.seed}-{number}"), batched=True, batch_size=self.window)

    def __iter__(self) -> Iterator[Sample]:
        while True:
            self.rows = self.one_pass(self.number)
            found = 0 if self.place is None else 1
            if self.place is not None:
                self.rows.load_state_dict(self.place)
                self.place = None
            for row in self.rows:
                if not is_held_out(row["source"], self.held_out):
                    found += 1
                    yield to_sample(row)
            if not found:
                raise InputError(
                    f"{self.urls[0]} and {len(self.urls) - 1} more shards have nothing for micro batch"
                    f" {self.micro + 1} of {self.count}: expected more rows, fewer micro batches or a smaller"
                    " dataset.held_out"
                )
            self.number += 1

    def state_dict(self) -> dict[str, Any]:
        return {"pass": self.number, "rows": None if self.rows is None else self.rows.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number, self.place = state["pass"], state["rows"]


class Mix:
    """Puts rows that come together in another order, fixed by the pass and by which rows they are."""

    def __init__(self, seed: str) -> None:
        self.seed = seed

    def __call__(self, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        order = list(range(len(columns["id"])))
        random.Random(f"{self.seed}-{columns['id'][0]}").shuffle(order)
        return {name: [values[i] for i in order] for name, values in columns.items()}


@dataclass(frozen=True, eq=False)
class Loaded:
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
    """The same of their first sentences."""


def collate(samples: list[Sample]) -> Loaded:
    """Few tensors, since each is handed from process to process by itself."""
    whole = short = None
    if all(sample.text is not None for sample in samples):
        whole = pad([sample.text for sample in samples])
        short = pad([sample.text if sample.text_short is None else sample.text_short for sample in samples])
    return Loaded(
        torch.stack([sample.moments for sample in samples]),
        torch.tensor([sample.motion for sample in samples]),
        torch.tensor([sample.fps for sample in samples]),
        [sample.caption for sample in samples],
        whole,
        short,
    )


def pad(texts: list[Any]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(text) for text in texts])
    return torch.nn.utils.rnn.pad_sequence(texts, batch_first=True), lengths


def open_loader(stream: Stream, batch: int, workers: int) -> StatefulDataLoader:
    """Yields `Loaded` batches. Worker processes share the shards, so that there are at most as many as shards."""
    with warnings.catch_warnings():  # torchdata calls something of torch that is going away
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
        return StatefulDataLoader(stream, batch, num_workers=min(workers, len(stream.urls)), collate_fn=collate)
