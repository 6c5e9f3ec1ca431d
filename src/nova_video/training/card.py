"""The model card of a finished run: README.md beside the weights, from what the run knows. Used by `trainer.py`."""

import shutil
from pathlib import Path
from typing import Any

from nova_video.training.checkpoint import Progress
from nova_video.training.log import DETAILS
from nova_video.training.recipe import AutoencoderRecipe, TransformerRun
from nova_video.training.task import Task

SHEET = "samples.png"
CARD = "README.md"
RESULTS = ("loss", "held_out_loss", "score_", "psnr", "mse")  # how the names of numbers begin that say how good it is


def write_card(
    folder: Path, task: Task[Any, Any, Any], devices: str, progress: Progress, numbers: dict[str, float]
) -> None:
    """`numbers` are the newest that were logged, by name; `folder` lies in the output of the run."""
    sheet = newest_sheet(folder.parent / "sheets", progress.step)
    if sheet is None:
        (folder / SHEET).unlink(missing_ok=True)  # of a run that had come further
    else:
        shutil.copyfile(sheet, folder / SHEET)
    (folder / CARD).write_text(card(task, devices, progress, numbers, sheet is not None))


def newest_sheet(folder: Path, step: int) -> Path | None:
    """Of a run that is at `step`: later ones are of a run before it."""
    return max((path for path in folder.glob("step-*.png") if path.name <= f"step-{step:08d}.png"), default=None)


def card(
    task: Task[Any, Any, Any], devices: str, progress: Progress, numbers: dict[str, float], has_sheet: bool
) -> str:
    recipe = task.recipe
    lines = ["---", "library_name: nova-video", f"pipeline_tag: {_kind(task)}", "---", "", f"# {recipe.name}", ""]
    lines += [_what(task), "", "## Use", "", "```bash", f"{_use(recipe)}", "```", ""]
    if has_sheet:
        lines += [f"![Samples]({SHEET})", ""]
    lines += [
        "## Training",
        "",
        f"Learned from {task.learned_from()}.",
        "",
        "| | |",
        "|---|---|",
        f"| steps | {progress.step} |",
        f"| micro batches a step | {progress.micro_batches} |",
        f"| time | {progress.seconds:.0f} s on {devices} |",
        f"| learning rate | {recipe.optimizer.lr:g} |",
        f"| precision | {recipe.precision} |",
        f"| seed | {recipe.seed} |",
        "",
        "Every setting is in [recipe.toml](recipe.toml), which `nova train` runs again.",
        "",
    ]
    results = {
        name: value for name, value in numbers.items() if name.startswith(RESULTS) and not name.startswith(DETAILS)
    }
    if results:
        lines += ["## Numbers", "", "The last that were logged; training losses are means since those before.", ""]
        lines += [
            "| | |",
            "|---|---|",
            *(f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in results.items()),
        ]
        lines.append("")
    return "\n".join(lines)


def _kind(task: Task[Any, Any, Any]) -> str:
    if isinstance(task.recipe, AutoencoderRecipe):
        return "other"
    return "text-to-video" if task.recipe.defaults.num_frames > 1 else "text-to-image"


def _what(task: Task[Any, Any, Any]) -> str:
    recipe, weights = task.recipe, list(task.model.parameters())
    count = sum(weight.numel() for weight in weights) / 1e6
    learned = sum(weight.numel() for weight in weights if weight.requires_grad) / 1e6
    if isinstance(recipe, TransformerRun) and recipe.lora.rank:
        return (
            f"LoRA adapters of {learned:.4g} M parameters for the NOVA transformer of `{recipe.init}`, whose"
            f" {count - learned:.4g} M stayed as they were."
        )
    init = recipe.init if isinstance(recipe, TransformerRun) else ""
    what = "A causal video autoencoder" if isinstance(recipe, AutoencoderRecipe) else "A NOVA transformer"
    start = f"trained further from `{init}`" if init else "trained from scratch"
    frozen = f"\n{learned:.4g} M of them were trained; the others stayed as they were." if learned < count else ""
    return f"{what} of {count:.4g} M parameters, {start}.{frozen}"


def _use(recipe: Any) -> str:
    if isinstance(recipe, AutoencoderRecipe):
        return "nova train recipes/emoji-image.toml --autoencoder FOLDER"
    if recipe.lora.rank:
        return f'nova generate "..." --model {recipe.init} --lora FOLDER'
    return 'nova generate "..." --model FOLDER'
