"""A run logs to the screen, to `OUTPUT/metrics.jsonl` and to accelerate's trackers; sheets to `OUTPUT/sheets`.

Only the main process writes. Used by `trainer.py`.
"""

import json
import math
import uuid
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import accelerate.utils
import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image
from rich.console import Console

from nova_video.common.errors import InputError
from nova_video.common.extras import install_command
from nova_video.io.files import atomic_path, check_writable
from nova_video.training.checkpoint import explain_full_disk
from nova_video.training.recipe import Recipe

PROJECT = "nova-video"
TRACKER_PACKAGES = {name: getattr(accelerate.utils, f"is_{name}_available") for name in LOGGER_TYPE_TO_CLASS}
DETAILS = ("loss_time_", "loss_frame_")  # in the files and trackers alone: too many for a line on the screen


class DueEvals(NamedTuple):
    """Which evaluations are due: validation losses, a sheet of samples, scores."""

    validate: bool
    sample: bool
    score: bool


class Log:
    """The log of one run."""

    def __init__(self, recipe: Recipe, writes: bool) -> None:
        """`writes`: this process writes files and lines; the others are silent."""
        self.output, self.recipe, self.writes = Path(recipe.output), recipe, writes
        self.console = Console(highlight=False, soft_wrap=True, quiet=not writes)
        self.trackers: list[GeneralTracker] = []
        self.newest: dict[str, float] = {}
        """The newest value of each number."""
        self.done = DueEvals(False, False, False)
        """The evaluations that the interrupted run did at the step that this one goes on from."""
        if unknown := [name for name in recipe.trackers if name not in LOGGER_TYPE_TO_CLASS]:
            raise InputError(f"trackers has {unknown[0]!r}: expected any of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if absent := [name for name in recipe.trackers if not TRACKER_PACKAGES[name]()]:
            package = absent[0].replace("_", "-")
            remedy = install_command("train") if package == "tensorboard" else f"pip install {package}"
            raise InputError(f"trackers has {absent[0]!r}, which is not installed: {remedy}")
        if not writes:
            return
        there = next(path for path in (self.output, *self.output.absolute().parents) if path.exists())
        if not there.is_dir():
            raise InputError(f"output folder {self.output} cannot be written: {there} is a file")
        check_writable(there)

    def start(self, step: int) -> None:
        """Go on from `step`: lines that an interrupted run logged past it are dropped."""
        if not self.writes:
            return
        (self.output / "sheets").mkdir(parents=True, exist_ok=True)
        path = self.output / "metrics.jsonl"
        lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
        kept: list[str] = []
        evaluated: set[str] = set()
        for number, line in enumerate(lines, 1):
            try:
                numbers = json.loads(line) if line.endswith("\n") else {"step": math.inf}
                at = numbers["step"]
            except (ValueError, TypeError, KeyError):
                self.say(f"{path}: line {number} is damaged and left out")
                continue
            if at <= step:
                kept.append(line)
                self.newest |= {name: value for name, value in numbers.items() if name not in ("step", "seconds")}
            if at == step and "lr" not in numbers:
                evaluated |= numbers.keys() - {"step", "seconds"}
        scores = {name for name in evaluated if name.startswith("score_")}
        self.done = DueEvals(bool(evaluated - scores), self._sheet(step).exists(), bool(scores))
        with self._writing(path), atomic_path(path) as aside:
            aside.write_text("".join(kept))
        for name in self.recipe.trackers:
            tracker = make_tracker(name, self.output, self.recipe.name, step)
            tracker.start()
            self.trackers.append(tracker)

    def missed(self, due: DueEvals) -> DueEvals:
        """Return the evaluations that were due then and not done; none on a process that does not write."""
        return DueEvals(*(self.writes and is_due and not was for is_due, was in zip(due, self.done, strict=True)))

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)  # names may hold brackets

    def write(self, step: int, seconds: float, numbers: dict[str, float]) -> None:
        if not numbers or not self.writes:
            return
        self.newest |= numbers
        for tracker in self.trackers:
            tracker.log(numbers, step=step)
        path = self.output / "metrics.jsonl"
        with self._writing(path), path.open("a") as file:
            file.write(json.dumps({"step": step, "seconds": round(seconds, 1)} | numbers) + "\n")
        shown = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items() if not name.startswith(DETAILS))
        self.say(f"step {step:6d}/{self.recipe.steps}  {seconds:6.1f} s  {shown}")

    def picture(self, step: int, picture: Image.Image) -> None:
        path = self._sheet(step)
        with self._writing(path), atomic_path(path) as aside:
            picture.save(aside, format="png")
        for tracker in self.trackers:
            if hasattr(tracker, "log_images"):
                pixels = np.array(picture)[None]  # (1, H, W, 3)
                form = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": pixels}, step=step, **form)
        self.say(f"step {step:6d}  {path}")

    def _sheet(self, step: int) -> Path:
        return self.output / "sheets" / f"step-{step:08d}.png"

    def _writing(self, path: Path) -> AbstractContextManager[None]:
        return explain_full_disk(str(path), self.output / "checkpoints")

    def finish(self) -> None:
        for tracker in self.trackers:
            tracker.finish()


def make_tracker(name: str, output: Path, run: str, step: int) -> GeneralTracker:
    """One of accelerate's, for a run that is at `step`."""
    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        return kind("tensorboard", output, purge_step=step + 1)
    options: dict[str, Any] = {"logging_dir": output} if kind.requires_logging_directory else {}
    if name in ("wandb", "trackio"):
        options |= {"name": run, "resume": "allow"}
    if name == "wandb":
        options |= {"dir": str(output), "id": run_id(output)}
    return kind(PROJECT, **options)


def run_id(output: Path) -> str:
    """One for each output folder, however often its run is resumed; removed with it."""
    path = output / "wandb-id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:16])
    return path.read_text().strip()
