"""An own training: `nova train own_task.toml`, run where this file is, fits a line with all that the trainer does.

The recipe is `kind = "own_task:LineTask"` and whatever `LineRecipe` has. Checkpoints, resuming, averages, logs,
several processes and CUDA graphs are the trainer's; a task says what a batch is and what is minimised.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_model
from torch import Tensor, nn

from nova_video.training.recipe import Recipe
from nova_video.training.task import LossParts, Task


@dataclass(frozen=True)
class LineRecipe(Recipe):
    """The settings, beside those of every training: each is a key of the TOML file and a flag."""

    slope: float = 3.0
    """The slope to find."""
    batch: int = 16
    """Points of a micro batch."""


class LineTask(Task[nn.Linear, str, Tensor]):
    """Fits y = slope * x. Batches have one shape, so there is one variant."""

    recipe_type = LineRecipe
    describes = "A line"
    loss_names = ("loss",)

    def __init__(self, recipe: LineRecipe, device: torch.device) -> None:
        super().__init__(recipe.seed, device)
        self.recipe, self.model = recipe, nn.Linear(1, 1, bias=False, device=device)

    def variants(self) -> tuple[list[str], list[float]]:
        return ["points"], [1.0]

    def draw(self, variant: str, micro: int) -> Tensor:
        return torch.randn(self.recipe.batch, 1, device=self.device)

    def loss(self, variant: str, batch: Tensor) -> LossParts:
        return {"loss": (self.model(batch) - self.recipe.slope * batch).square().mean()}

    def samples(self, variant: str) -> int:
        return self.recipe.batch

    def validate(self, model: nn.Linear) -> dict[str, float]:
        return {"slope_error": abs(model.weight.item() - self.recipe.slope)}

    def export(self, model: nn.Linear, folder: Path) -> None:
        folder.mkdir(parents=True)
        save_model(model, str(folder / "line.safetensors"))

    def sheet(self, model: nn.Linear, folder: Path) -> Image.Image:
        return Image.new("L", (64, 64))

    def learned_from(self) -> str:
        return "points drawn from a normal distribution"
