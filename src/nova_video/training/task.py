"""What is trained: the part that differs between trainings. `trainer.py` runs any `Task`.

A variant is whatever changes the shapes of a step, such as a clip length: each gets a CUDA graph of its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from nova_video.data.world import EmojiWorld
from nova_video.training.pool import Pool, Rows, fill_seed
from nova_video.training.recipe import DataRecipe

M = TypeVar("M", bound=nn.Module)
V = TypeVar("V", bound=Hashable)


class Task(ABC, Generic[M, V]):
    """A model, the samples it learns from and its loss."""

    loss_names: tuple[str, ...]
    model: M

    def __init__(self, data: DataRecipe, seed: int, device: torch.device) -> None:
        self.data, self.seed, self.device = data, seed, device
        self.world = EmojiWorld.load(data.world, device)
        self.batch = dict(zip(data.frames, data.batch, strict=True))
        self.pools = {
            frames: Pool(partial(self._fill, frames), size, data.refresh)
            for frames, size in zip(data.frames, data.pool, strict=True)
        }

    def prepare(self, step: int) -> None:
        """Bring the samples to the state that belongs to `step`."""
        for pool in self.pools.values():
            pool.fill_for(step, self.data.refresh_every)

    def _fill(self, frames: int, count: int, fill: int) -> Rows:
        return self.make_rows(frames, count, fill_seed(self.seed, frames, fill))

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def half(self) -> torch.autocast:
        """bf16 arithmetic on a GPU, plain fp32 on a CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu)

    @abstractmethod
    def make_rows(self, frames: int, count: int, seed: int) -> Rows:
        """`count` training samples of clips of that length, fixed by the seed."""

    @abstractmethod
    def variants(self) -> tuple[list[V], list[float]]:
        """All variants and the share of the steps each gets."""

    @abstractmethod
    def loss(self, variant: V) -> dict[str, Tensor]:
        """A batch's losses, scalars; "loss" is the one to minimise."""

    @abstractmethod
    def validate(self, model: M) -> dict[str, float]:
        """Numbers on held-out samples."""

    @abstractmethod
    def export(self, model: M, folder: Path) -> None:
        """Write a checkpoint folder that `NovaPipeline.from_pretrained` opens, or the parts of one."""

    @abstractmethod
    def sheet(self, model: M, folder: Path) -> Image.Image:
        """A picture of what the model makes; `folder` is its latest export."""

    def score(self, folder: Path, clips: int) -> dict[str, float]:
        """Scores of the model exported to `folder`, where there is a judge."""
        return {}
