"""The base of tasks: the part that differs between trainings. `trainer.py` runs any `Task`.

A variant is whatever changes the shapes of a step, such as a clip length: each gets a CUDA graph of its own.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from PIL import Image
from torch import nn

from nova_video.training.recipe import Recipe

LossParts = dict[str, Any]
"""By name: tensors, each a scalar or a pair of a sum and how many it is of."""

M = TypeVar("M", bound=nn.Module)
V = TypeVar("V", bound=Hashable)
B = TypeVar("B")


class Task(ABC, Generic[M, V, B]):
    """A model, the samples it learns from and its loss."""

    recipe_type: ClassVar[type[Recipe]]
    """The record of the settings, where a recipe names this class by `kind = "module:Class"`."""
    describes: ClassVar[str] = "A model"
    """For the model card: what the weights are."""
    tags: ClassVar[tuple[str, ...]] = ("other",)
    """For the model card: tags of the Hugging Face Hub."""
    usage: ClassVar[str] = ""
    """For the model card: a command that uses the weights in FOLDER."""

    recipe: Any
    """With nothing left open: what is saved beside the weights."""
    model: M
    loss_names: tuple[str, ...]
    """Every name that `loss` may return."""
    capturable = True
    """All steps of a variant launch the same kernels, so one CUDA graph can replay them.

    The loss draws no random numbers on the CPU.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed, self.device = seed, device

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def half(self) -> torch.autocast:
        """bf16 arithmetic on a GPU, plain fp32 on a CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu)

    def prepare(self, step: int) -> None:
        """Bring the samples to the state that belongs to `step`."""

    def refresh_every(self) -> int:
        """Steps after which `prepare` is due again; 0: never."""
        return 0

    def open_data(self, micro: Iterable[int], count: int, places: dict[str, Any]) -> None:
        """Before the first draw: this process draws the micro batches `micro` of `count`, from where they were."""

    def close_data(self) -> None:
        """After the last draw: let go of readers and their processes."""

    def places(self) -> dict[str, Any]:
        """Where in the data the micro batches of this process are (JSON)."""
        return {}

    @abstractmethod
    def variants(self) -> tuple[list[V], list[float]]:
        """All variants and the share of the steps each gets."""

    @abstractmethod
    def draw(self, variant: V, micro: int) -> B:
        """The next samples of a micro batch, on the device; random numbers from torch's default generators."""

    @abstractmethod
    def loss(self, variant: V, batch: B) -> LossParts:
        """A batch's losses; "loss" is the one to minimise, a scalar."""

    def flops(self, variant: V) -> float:
        """Useful operations of one micro batch, forward and backward; 0: not known."""
        return 0.0

    @abstractmethod
    def samples(self, variant: V) -> int:
        """Samples of one micro batch."""

    @abstractmethod
    def validate(self, model: M) -> dict[str, float]:
        """Numbers on held-out samples."""

    @abstractmethod
    def export(self, model: M, folder: Path) -> None:
        """Write a checkpoint folder that `NovaPipeline.from_pretrained` opens, or the parts of one."""

    @abstractmethod
    def sheet(self, model: M, folder: Path) -> Image.Image:
        """A picture of what the model makes; `folder` is its latest export."""

    @abstractmethod
    def learned_from(self) -> str:
        """For the model card: what the samples are, as the end of a sentence."""

    def data_identity(self) -> str:
        """A mark that changes with what is learned from, where there is one."""
        return ""

    def hub_datasets(self) -> list[str]:
        """Datasets of the Hugging Face Hub that are learned from, for the model card."""
        return []

    def score(self, folder: Path, clips: int) -> dict[str, float]:
        """Scores of the model exported to `folder`, where there is a judge."""
        return {}


def fill_seed(*numbers: int) -> int:
    """A seed that depends on all of `numbers`, the same on every machine."""
    return random.Random(repr(numbers)).getrandbits(63)
