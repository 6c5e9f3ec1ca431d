"""The model card of a finished run: README.md beside the weights, from what the run knows. Used by `trainer.py`."""

import shutil
from pathlib import Path
from typing import Any

from nova_video.training.checkpoint import Progress
from nova_video.training.recipe import AutoencoderRecipe, TransformerRun
from nova_video.training.task import Task

SHEET = "samples.png"
CARD = "README.md"
RESULTS = ("loss", "held_out", "score", "psnr", "mse")  # how the names of numbers begin that say how good it is


def write_card(
    folder: Path, task: Task[Any, Any, Any], devices: str, progress: Progress, numbers: dict[str, float]
) -> None:
    """`numbers` are the newest that were logged, by name; `folder` lies in the output of the run."""
    sheets = sorted((folder.parent / "sheets").glob("*.png"))
    if sheets:
        shutil.copyfile(sheets[-1], folder / SHEET)
    (folder / CARD).write_text(card(task, devices, progress, numbers, bool(sheets)))


def card(
    task: Task[Any, Any, Any], devices: str, progress: Progress, numbers: dict[str, float], has_sheet: bool
) -> str:
    recipe = task.recipe
    count = sum(p.numel() for p in task.model.parameters()) / 1e6
    learned = sum(p.numel() for p in task.model.parameters() if p.requires_grad) / 1e6
    lines = ["---", "library_name: nova-video", f"pipeline_tag: {_kind(task)}", "---", "", f"# {recipe.name}", ""]
    lines.append(f"{_what(recipe)} of {count:.4g} M parameters, {_start(recipe)}.")
    if learned < count:
        lines.append(f"{learned:.4g} M of them were trained; the others stayed as they were.")
    lines += ["", "## Use", "", "```bash", f"{_use(recipe)}", "```", ""]
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
    results = {name: value for name, value in numbers.items() if name.startswith(RESULTS) and name.count("_") < 4}
    results = {name: value for name, value in results.items() if not name.startswith(("loss_time_", "loss_frame_"))}
    if results:
        lines += ["## Numbers", "", "The last ones that were logged; losses are means since those before.", ""]
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


def _what(recipe: Any) -> str:
    if isinstance(recipe, AutoencoderRecipe):
        return "A causal video autoencoder"
    return "LoRA adapters for a NOVA transformer" if recipe.lora.rank else "A NOVA transformer"


def _start(recipe: Any) -> str:
    init = recipe.init if isinstance(recipe, TransformerRun) else ""
    return f"trained further from `{init}`" if init else "trained from scratch"


def _use(recipe: Any) -> str:
    if isinstance(recipe, AutoencoderRecipe):
        return "nova train recipes/emoji-image.toml --autoencoder FOLDER"
    if recipe.lora.rank:
        return f'nova generate "..." --model {recipe.init} --lora FOLDER'
    return 'nova generate "..." --model FOLDER'
