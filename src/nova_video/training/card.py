"""The model card of a run: README.md beside the weights, and the recipes they were made with. Used by `trainer.py`."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from nova_video.io.checkpoints import resolve_checkpoint
from nova_video.pipeline.model_card import card_facts
from nova_video.training.checkpoint import TrainingProgress
from nova_video.training.log import DETAILS
from nova_video.training.recipe import TransformerRun
from nova_video.training.segments import RunSegment, recipe_changes
from nova_video.training.task import Task

SHEET = "samples.png"
CARD = "README.md"
RECIPE = "recipe.toml"
RESULTS = ("loss", "held_out_loss", "score_", "psnr", "mse")  # how the names of numbers begin that say how good it is


@dataclass(frozen=True)
class Record:
    """The facts about the steps that made the weights."""

    progress: TrainingProgress
    segments: Sequence[RunSegment]
    """The last one is that of the newest steps."""
    numbers: dict[str, float]
    """The newest that were logged, by name."""


def write_card(folder: Path, task: Task[Any, Any, Any], record: Record, sheet: Path | None) -> None:
    """Write the card, the recipe of each segment and the newest sheet into the folder of an export."""
    folder.mkdir(parents=True, exist_ok=True)
    if sheet is not None:
        shutil.copyfile(sheet, folder / SHEET)
    for name, segment in zip(_recipe_names(record.segments), record.segments, strict=True):
        (folder / name).write_text(segment.recipe, encoding="utf-8")
    (folder / CARD).write_text(card(task, record, sheet is not None), encoding="utf-8")


def newest_sheet(folder: Path, step: int) -> Path | None:
    """The newest sheet of a run that is at `step`; later sheets belong to an earlier run."""
    return max((path for path in folder.glob("step-*.png") if path.name <= f"step-{step:08d}.png"), default=None)


def card(task: Task[Any, Any, Any], record: Record, has_sheet: bool) -> str:
    recipe, progress, segments = task.recipe, record.progress, record.segments
    devices = dict.fromkeys(segment.devices for segment in segments if segment.devices)
    lines = ["---", _metadata(task), "---", "", f"# {recipe.name}", ""]
    lines += [_what(task), ""]
    if usage := _use(task):
        lines += ["## Use", "", "```bash", usage, "```", "", *_use_in_python(recipe)]
    if has_sheet:
        lines += [f"![Samples]({SHEET})", ""]
    lines += [
        "## Training",
        "",
        f"Learned from {segments[-1].learned_from or task.learned_from()}.",
        "",
        "| | |",
        "|---|---|",
        f"| steps | {progress.step} |",
        f"| micro batches a step | {progress.micro_batches} |",
        f"| time | {progress.seconds:.0f} s on {', '.join(devices) or 'devices that were not recorded'} |",
        f"| learning rate | {recipe.optimizer.lr:g} |",
        f"| precision | {recipe.precision} |",
        f"| seed | {recipe.seed} |",
        f"| exported | {recipe.exported_weights} |",
        "",
        f"Every setting is in [{RECIPE}]({RECIPE}), which `nova train` runs again.",
        "",
        *_segments(record),
    ]
    numbers = record.numbers
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


def _segments(record: Record) -> list[str]:
    """A table of the segments of a run that went on with other settings, data or devices."""
    if len(record.segments) == 1:
        return []
    ends = [*(segment.step for segment in record.segments[1:]), record.progress.step]
    names, before = _recipe_names(record.segments), record.segments[0]
    lines = [
        "The run went on with other settings, data or devices:",
        "",
        "| steps | recipe | changed |",
        "|---|---|---|",
    ]
    for segment, end, name in zip(record.segments, ends, names, strict=True):
        said = [f"{key} = {now!r}" for key, (_, now) in recipe_changes(before, segment).items()]
        if segment is record.segments[0] or segment.learned_from != before.learned_from:
            said.append(f"learned from {segment.learned_from or 'data that were not recorded'}")
        elif segment.data != before.data:
            said.append("the dataset had changed")
        if segment.devices != before.devices:
            said.append(f"on {segment.devices}")
        lines.append(f"| {segment.step} to {end} | [{name}]({name}) | {'; '.join(said)} |".replace("\n", " "))
        before = segment
    return [*lines, ""]


def _recipe_names(segments: Sequence[RunSegment]) -> list[str]:
    return [*(f"recipe-{number:04d}.toml" for number in range(len(segments) - 1)), RECIPE]


def _metadata(task: Task[Any, Any, Any]) -> str:
    """The head of the card, which the Hugging Face Hub reads: license, tags and datasets of `init` hold here too."""
    recipe, facts, base = task.recipe, dict[str, Any](), None
    makes = _makes(recipe)
    tags = ["nova-video", *(task.tags if makes is None else ("nova", makes))]
    if isinstance(recipe, TransformerRun) and recipe.init:
        place = Path(recipe.init)
        base = place.resolve().name if place.is_dir() else recipe.init
        facts = card_facts(resolve_checkpoint(recipe.init))
        tags += ["lora"] if recipe.lora.rank else []
    data = ModelCardData(
        library_name="nova-video",
        pipeline_tag=makes,
        base_model=base,
        license=facts.get("license"),
        datasets=list(dict.fromkeys([*facts.get("datasets", ()), *task.hub_datasets()])) or None,
        tags=list(dict.fromkeys([*tags, *facts.get("tags", ())])),
    )
    head: str = data.to_yaml()
    return head


def _makes(recipe: Any) -> str | None:
    """The Hub's name for what a transformer of this recipe does; None for all other models."""
    if not isinstance(recipe, TransformerRun):
        return None
    return "text-to-video" if recipe.defaults.num_frames > 1 else "text-to-image"


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
    what = "A NOVA transformer" if isinstance(recipe, TransformerRun) else task.describes
    start = f"trained further from `{init}`" if init else "trained from scratch"
    frozen = f"\n{learned:.4g} M of them were trained; the others stayed as they were." if learned < count else ""
    return f"{what} of {count:.4g} M parameters, {start}.{frozen}"


def _use(task: Task[Any, Any, Any]) -> str:
    recipe = task.recipe
    if not isinstance(recipe, TransformerRun):
        return task.usage
    if recipe.lora.rank:
        return f'nova generate "..." --model {recipe.init} --lora FOLDER'
    return 'nova generate "..." --model FOLDER'


def _use_in_python(recipe: Any) -> list[str]:
    """The lines that open the folder: there is no code in it."""
    if not isinstance(recipe, TransformerRun):
        return []
    opened = recipe.init if recipe.lora.rank else "FOLDER"
    lines = ["```python", "from nova_video import NovaPipeline", ""]
    lines.append(f'pipe = NovaPipeline.from_pretrained("{opened}")')
    lines += ['pipe.load_lora_weights("FOLDER")'] if recipe.lora.rank else []
    return [*lines, "```", ""]
