"""Samples held ready on the device: a training step takes random rows, and old rows are replaced as training goes.

What a pool holds depends on its seed and on the number of fills alone, so a resumed run sees the same samples.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nova_video.training.task import fill_seed
from nova_worlds.training.recipes import DataRecipe

Rows = dict[str, Tensor]
"""Named columns, each (rows, ...)."""


@dataclass
class Pool:
    """`size` rows in chunks. Fill n makes chunk n % chunks, so later fills replace older chunks in turn."""

    make: Callable[[int, int], Rows]
    """(rows, fill number) -> that many new rows, fixed by the fill number."""
    size: int
    share: float
    """Share of the rows that one fill replaces."""

    def __post_init__(self) -> None:
        self.chunks = max(1, math.ceil(1 / self.share - 1e-6))
        self.chunk = math.ceil(self.size / self.chunks)
        self.fills = 0
        self.rows: Rows = {}

    def fill_to(self, fills: int) -> None:
        """Bring the pool to the state after `fills` fills, making only what is still in it then."""
        for number in range(max(self.fills, fills - self.chunks), fills):
            new = self.make(self.chunk, number)
            if not self.rows:
                self.rows = {k: v.new_zeros(self.chunks * self.chunk, *v.shape[1:]) for k, v in new.items()}
            start = number % self.chunks * self.chunk
            for name, column in self.rows.items():
                column[start : start + self.chunk].copy_(new[name])
        self.fills = fills

    def fill_for(self, step: int, refresh_every: int) -> None:
        """The state that belongs to `step`: all chunks once, then one more for every `refresh_every` steps."""
        self.fill_to(self.chunks + (step // refresh_every if refresh_every else 0))

    def draw(self, count: int) -> Rows:
        """`count` random rows, drawn with the device's default generator: safe inside a CUDA graph."""
        column = next(iter(self.rows.values()))
        index = torch.randint(len(column), (count,), device=column.device)
        return {name: column[index] for name, column in self.rows.items()}


class Pools:
    """Samples of a world in a pool for each clip length, which the trainings in a world draw from."""

    def __init__(self, data: DataRecipe, seed: int, make: Callable[[int, int, int], Rows]) -> None:
        """`make` (frames, count, seed) -> that many samples of clips of that length, fixed by the seed."""
        self.data, self.seed, self.make = data, seed, make
        self.batch = dict(zip(data.frames, data.batch, strict=True))
        self.by_length = {
            frames: Pool(partial(self._fill, frames), size, data.refresh)
            for frames, size in zip(data.frames, data.pool, strict=True)
        }

    def _fill(self, frames: int, count: int, fill: int) -> Rows:
        return self.make(frames, count, fill_seed(self.seed, frames, fill))

    def prepare(self, step: int) -> None:
        for pool in self.by_length.values():
            pool.fill_for(step, self.data.refresh_every)

    def draw(self, frames: int) -> Rows:
        """A batch of clips of that length."""
        return self.by_length[frames].draw(self.batch[frames])


def describe_world(data: DataRecipe) -> str:
    lengths = ", ".join(map(str, data.frames))
    return f"clips of {lengths} frames of the world `{data.world}`, drawn as training went"
