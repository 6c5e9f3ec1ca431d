"""The trainer: `nova train recipes/NAME.toml`. Set up, loop, step, log, save; one file, top to bottom.

The recipe's kind names a `Task`, which says what is trained; this file is what all training shares. A step consists of
micro batches, which the processes share out. The random numbers of a micro batch follow from the seed, the step and the
micro batch's own number, so that neither stopping nor the number of processes changes what is learned. On GPUs a whole
step (forward, backward, exchange of gradients, clipping, AdamW) is one CUDA graph for each variant of it
(`stepper.py`), because launching small kernels takes longer than running them.
"""

import copy
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nova_video.common.errors import InputError
from nova_video.io.files import atomic_path, lock_folder, make_readable
from nova_video.training.card import CARD, SHEET, Record, newest_sheet, write_card
from nova_video.training.checkpoint import (
    Average,
    TrainingProgress,
    copy_weights,
    explain_full_disk,
    gather_state,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    sweep,
)
from nova_video.training.flops import device_peak
from nova_video.training.log import DueEvals, Log
from nova_video.training.processes import Processes, model_shards
from nova_video.training.recipe import KINDS, Recipe, TransformerRun, changes, load_recipe, own_task, recipe_toml
from nova_video.training.segments import RunSegment, begin_segment, read_segments, write_segments
from nova_video.training.stepper import Stepper, Throughput, learning_rate, make_optimizer, set_kernels, set_rate
from nova_video.training.task import Task

if TYPE_CHECKING:
    from nova_video.fast.training_graphs import StepGraphs

AGREE_EVERY = 2.0  # seconds, about: several processes agree on the time and on whether to stop
NOT_LEARNED = ("log.", "export", "device", "trackers", "name")  # how settings begin that change nothing of the weights

AnyTask = Task[Any, Any, Any]


def train(recipe: Recipe) -> Path:
    """Train to the end and return the folder of the exported model. Goes on from the output's newest checkpoint.

    Raises KeyboardInterrupt when it was asked to stop by SIGINT or SIGTERM, with a checkpoint and the model written.
    """
    processes = Processes(recipe)
    log = Log(recipe, processes.is_main)
    set_kernels()
    torch.manual_seed(recipe.seed)
    task = make_task(recipe, processes.device)
    with lock_folder(log.output) if processes.is_main else nullcontext():
        run = Run(task, processes, log)
        if run.finished and (differing := run.learned_otherwise()):
            return refuse_rewriting(log.output, run.step, differing, log)
        run.introduce()
        started = time.monotonic()
        task.prepare(run.step)
        with StopSignal(processes.is_main) as stop:  # before readers start: half made, they do not end well
            run.open_data()
            log.say(f"samples ready after {time.monotonic() - started:.1f} s")
            processes.wait()  # all have compared the recipe with the one before, which is written over now
            run.record_segment()
            run.take_steps(stop)
            task.close_data()
        return run.finish()


class Run:
    """A run of one recipe: its parts, how far it has come, and what it does beside steps."""

    def __init__(self, task: AnyTask, processes: Processes, log: Log) -> None:
        """Loads the newest checkpoint of the output, if there is one."""
        recipe = task.recipe
        self.task, self.recipe, self.processes, self.log, self.output = task, recipe, processes, log, log.output
        self.exported = copy.deepcopy(task.model).eval().requires_grad_(False)  # holds the weights to export
        self.module = processes.spread(task)
        self.optimizer = make_optimizer(task.model, recipe.optimizer, processes.device)
        self.average = Average(task.model, recipe.optimizer.ema)
        if processes.is_main:
            sweep(self.output)
        self.checkpoint = newest_checkpoint(self.output / "checkpoints")
        self.segments = read_segments(self.output) if self.checkpoint is not None else []
        self.begin = TrainingProgress(micro_batches=0)
        self.changed: dict[str, tuple[Any, Any]] = {}
        if self.checkpoint is not None:
            log.say(f"going on from {self.checkpoint}")
            self.changed = compare_recipes(self.output / "recipe.toml", recipe, log)
            self.begin = load_checkpoint(self.checkpoint, task.model, self.average, self.optimizer)
        elif (self.output / "model" / CARD).exists():
            raise InputError(
                f"{self.output} has a finished model and no checkpoint to go on from: expected another output"
            )
        self.step, self.seconds = self.begin.step, self.begin.seconds
        self.own, self.micro_batches = list[int](), self.begin.micro_batches  # those of this process, and of a step
        self.stopped, self.finished = False, self.share_done >= 1

    @property
    def share_done(self) -> float:
        """How much of the run is done, by steps or by time, whichever is further on."""
        limit = self.recipe.seconds
        return max(self.step / self.recipe.steps, self.seconds / limit if limit else 0.0)

    def learned_otherwise(self) -> list[str]:
        """Settings and data that differ from those that the finished run learned with."""
        found = [key for key in self.changed if not key.startswith(NOT_LEARNED)]
        if self.segments and self.segments[-1].data not in ("", self.task.data_identity()):
            found.append("what the dataset holds")
        return found

    # Before the first step ----------------------------------------------------------------------------------------

    def introduce(self) -> None:
        """Tell what is trained, what has changed since the checkpoint, and what the run is too short for."""
        log, task = self.log, self.task
        for key, (was, now) in self.changed.items():
            log.say(f"{key} is {now!r} from here on; it was {was!r}")
        for line in schedule_warnings(self.recipe):
            log.say(line)
        log.start(self.step)
        learned = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
        devices = describe_devices(self.processes)
        log.say(f"{self.recipe.name}: {learned / 1e6:.2f} M parameters on {devices}; writing to {self.output}")
        before = self.begin.micro_batches
        self.own, self.micro_batches = self.processes.share(self.recipe.micro_batches, before or None)

    def open_data(self) -> None:
        """Open the data where the checkpoint left them."""
        before = self.begin.micro_batches
        is_same = before == self.micro_batches
        if self.begin.data and not is_same:
            self.log.say(f"{before} micro batches a step have become {self.micro_batches}: the data start anew")
        self.task.open_data(self.own, self.micro_batches, self.begin.data if is_same else {})

    def record_segment(self) -> None:
        """Write down which recipe and which data the steps from here on learn from."""
        text, output = recipe_toml(self.recipe), self.output
        if not self.finished or not self.segments:
            here = (self.task.learned_from(), self.task.data_identity(), describe_devices(self.processes))
            self.segments = begin_segment(self.segments, RunSegment(self.step, text, *here))
        else:  # a finished run, whose recipe differs only in settings that change nothing of what was learned
            self.segments = [*self.segments[:-1], replace(self.segments[-1], recipe=text)]
        if self.processes.is_main:
            with explain_full_disk(f"{output / 'recipe.toml'}", output / "checkpoints"):
                write_segments(output, self.segments)
                with atomic_path(output / "recipe.toml") as aside:
                    aside.write_text(text, encoding="utf-8")

    # Steps ----------------------------------------------------------------------------------------------------------

    def take_steps(self, stop: "StopSignal") -> None:
        """Take steps to the end of the run, with whatever is due after each of them."""
        task, recipe, processes = self.task, self.recipe, self.processes
        stepper = Stepper(task, self.module, self.optimizer, self.average, recipe, processes, self.own)
        stepper.load_state(self.begin.sums)
        variants, shares = task.variants()
        flops, samples = cache(task.flops), cache(task.samples)
        clock, throughput = SharedClock(processes, self.step, self.seconds), Throughput(self.step, self.seconds)
        if self.checkpoint is not None:
            self.evaluate(DueEvals(*map(bool, processes.greatest(*self.log.missed(self.due_evals())))), stepper)
        while not (self.finished or self.stopped):
            rate = learning_rate(recipe.optimizer, self.step, self.share_done)
            set_rate(self.optimizer, rate)
            variant = random.Random(f"{recipe.seed}-{self.step}").choices(variants, shares)[0]
            try:
                stepper.step(self.step, variant)
            except InputError:  # the data of this step are wrong: nothing was learned from them yet
                if processes.count == 1 and self.step > self.begin.step:  # others might wait for this process elsewhere
                    self.save(stepper)
                raise
            self.step += 1
            throughput.add(flops(variant) * self.micro_batches, samples(variant) * self.micro_batches)
            if clock.is_due(self.step):
                self.seconds, self.stopped = clock.agree(self.step, stop.asked)
            self.finished = self.share_done >= 1
            if self.is_due(recipe.log.every):
                numbers = stepper.numbers() | {"lr": rate}  # waits for the device
                self.seconds = clock.read()
                self.log.write(self.step, self.seconds, numbers | throughput.rates(self.step, self.seconds, self.peak))
                throughput = Throughput(self.step, self.seconds)
            if processes.count == 1 or self.is_due(recipe.log.every):  # several processes see it at the same step
                stepper.check(self.step, self.output)
            paused = time.monotonic()
            if self.is_due(recipe.log.checkpoint_every) or self.stopped:
                self.save(stepper)  # before the evaluations, which may fail or take long
            if not self.stopped:
                self.evaluate(self.due_evals(), stepper)
            throughput.pause(time.monotonic() - paused)
            if (every := task.refresh_every()) and self.step % every == 0:
                task.prepare(self.step)

    @property
    def peak(self) -> float | None:
        """Operations a second that the devices of all processes could do together, where that is known."""
        one = device_peak(torch.cuda.get_device_name(), torch.bfloat16) if self.task.on_gpu else None
        return None if one is None else one * self.processes.count

    # Every so many steps ------------------------------------------------------------------------------------------

    def is_due(self, every: int) -> bool:
        """True every so many steps and at the end of the run; 0: never."""
        return bool(every) and (self.finished or self.step % every == 0)

    def due_evals(self) -> DueEvals:
        """Which evaluations are due after this step."""
        log = self.recipe.log
        return DueEvals(*map(self.is_due, (log.validate_every, log.sample_every, log.score_every)))

    def weights(self) -> nn.Module:
        """The model with the weights that are exported and evaluated. All processes take part."""
        if self.recipe.export == "raw":
            return copy_weights(self.task.model, self.exported)
        pending = self.step % self.recipe.optimizer.ema_every > 0
        return self.average.write_to(self.task.model, self.exported, pending=pending)

    def record(self) -> Record:
        """The facts for the model card."""
        return Record(TrainingProgress(self.step, self.seconds, self.micro_batches), self.segments, self.log.newest)

    def evaluate(self, due: DueEvals, stepper: Stepper) -> None:
        """Run the evaluations that are due. All processes take part."""
        if not any(due):
            return
        model, graphs = self.weights(), stepper.graphs
        made_room = self.processes.is_main and run_evals(self.task, model, due, self.log, self.record(), graphs)
        if self.processes.greatest(made_room)[0] and not made_room and graphs is not None:
            graphs.release()  # all processes record the same steps

    def save(self, stepper: Stepper) -> None:
        """Write a checkpoint. All processes take part."""
        tensors = gather_state(self.task.model, self.average, self.optimizer)
        places, sums = self.processes.gather(self.task.places()), stepper.state()
        if self.processes.is_main:
            progress = TrainingProgress(self.step, self.seconds, self.micro_batches, places, sums, self.average.updates)
            save_checkpoint(self.output / "checkpoints", progress, tensors, self.recipe.log.keep)

    def finish(self) -> Path:
        """Export the model. Raises KeyboardInterrupt where the run was stopped before its end."""
        model, folder = self.weights(), self.output / "model"
        if self.processes.is_main:
            export(self.task, model, folder, self.record())
        how = f"{'stopped' if self.stopped else 'finished'} at step {self.step} after {self.seconds:.0f} s"
        self.log.say(f"{how}: {folder}")
        self.log.finish()
        self.processes.wait()
        if self.stopped:  # tells whoever waits for a model that this is not the last one
            raise KeyboardInterrupt(f"{how}, all saved: the same command goes on")
        return folder


class SharedClock:
    """The seconds of training, which all processes agree on about every `AGREE_EVERY` seconds."""

    def __init__(self, processes: Processes, step: int, seconds: float) -> None:
        self.processes, self.start = processes, time.monotonic() - seconds
        self.agreed, self.next = (step, seconds), step + 1

    def read(self) -> float:
        """The seconds of the process that has the most. All processes take part."""
        return self.processes.greatest(time.monotonic() - self.start)[0]

    def is_due(self, step: int) -> bool:
        """True after a step at which all processes agree; one process alone does after each."""
        return self.processes.count == 1 or step >= self.next

    def agree(self, step: int, stop: bool) -> tuple[float, bool]:
        """Agree on the seconds, and on whether to stop because any process was asked to."""
        seconds, asked = self.processes.greatest(time.monotonic() - self.start, stop)
        a_step = (seconds - self.agreed[1]) / (step - self.agreed[0])
        self.agreed, self.next = (step, seconds), step + max(1, int(AGREE_EVERY / max(a_step, 1e-6)))
        return seconds, bool(asked)


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a wish to stop after the current step, with everything saved."""

    def __init__(self, says: bool = True) -> None:
        """`says`: this process tells the user."""
        self.asked, self.says = False, says

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self.before:
            signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, self.before[signal.Signals(number)])
        if self.says:  # not by print, which may be interrupted in the middle
            os.write(2, b"asked to stop: the run ends after this step or sheet, all saved; asked again, at once\n")

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def refuse_rewriting(output: Path, step: int, differing: list[str], log: Log) -> Path:
    """Leave a finished run as it is: no step would be taken with what differs. Raises where it was not exported."""
    what = f"{output} is finished at step {step}, and no step would be taken with what differs ({', '.join(differing)})"
    if not (output / "model" / CARD).exists():
        raise InputError(f"{what}: expected the recipe that it ran with, which exports it, or more steps")
    log.say(f"{what}: nothing was changed; more steps go on with it, another output begins anew")
    return output / "model"


def schedule_warnings(recipe: Recipe) -> list[str]:
    """List what the run is too short for: warm-up, averages."""
    optimizer, found = recipe.optimizer, []
    if optimizer.warmup > recipe.steps:
        found.append(
            f"warning: optimizer.warmup is {optimizer.warmup}, more than the {recipe.steps} steps of the run: the"
            f" learning rate never reaches {optimizer.lr:g}"
        )
    horizon = optimizer.ema_every / (1 - optimizer.ema)
    if recipe.export == "ema" and horizon > recipe.steps:
        found.append(
            f"warning: optimizer.ema averages over about {horizon:.0f} steps, more than the {recipe.steps} of the run:"
            ' its decay warms up instead, min(ema, (1 + n) / (10 + n)); export = "raw" exports the last weights'
        )
    return found


def compare_recipes(path: Path, recipe: Recipe, log: Log) -> dict[str, tuple[Any, Any]]:
    """Return the settings that have changed since the run was begun, by key: before and now.

    Raises InputError for settings that must stay, since the checkpoints hold what belongs to them.
    """
    try:
        changed = changes(load_recipe(path), recipe)
    except InputError as error:  # of another version, or gone
        log.say(f"what has changed in the recipe is not known: {error}")
        return {}
    needed: tuple[str, ...] = ("lora.rank", "frozen")
    if isinstance(recipe, TransformerRun) and (recipe.lora.rank or recipe.frozen):
        needed += ("init", "lora.alpha", "lora.targets")  # where checkpoints hold some of the weights alone
        if set(changed.get("lora.alpha", ())) == {0, recipe.lora.rank}:  # which mean the same
            del changed["lora.alpha"]
    for key, (was, now) in changed.items():
        if key in needed:
            raise InputError(f"{key} is {now!r}, and {path.parent} was begun with {was!r}: expected the same")
    return changed


def make_task(recipe: Recipe, device: torch.device) -> AnyTask:
    """The task that the recipe's kind names."""
    built_in = KINDS.get(recipe.kind)
    task = own_task(recipe.kind) if built_in is None else resolve_name(built_in.task)
    made = task(recipe, device)
    if not isinstance(made, Task):
        raise InputError(f"kind is {recipe.kind!r}: expected a class that extends nova_video.training.task.Task")
    return made


def run_evals(
    task: AnyTask, model: nn.Module, due: DueEvals, log: Log, record: Record, graphs: "StepGraphs | None"
) -> bool:
    """Validate, draw and score the model with the exported weights.

    Returns True if memory was made_room, and the memory of recorded steps was released for it.
    """
    folder, progress = log.output / "model", record.progress
    step, spent, weights = progress.step, progress.seconds, task.recipe.exported_weights
    evals: list[Callable[[], object]] = []
    if due.validate:
        evals.append(lambda: log.say(f"step {step}: validating with {weights}"))
        evals.append(lambda: log.write(step, spent, task.validate(model)))
    if due.sample or due.score:
        evals.append(lambda: export(task, model, folder, record))
    if due.sample:
        evals.append(lambda: log.say(f"step {step}: drawing samples with {weights}"))
        evals.append(lambda: log.picture(step, task.sheet(model, folder)))
    if due.score:
        evals.append(lambda: log.say(f"step {step}: scoring {task.recipe.log.score_clips} clips"))
        evals.append(lambda: log.write(step, spent, task.score(folder, task.recipe.log.score_clips)))
    made_room = False
    for evaluation in evals:
        try:
            evaluation()
            continue
        except torch.OutOfMemoryError:
            if graphs is None or made_room:
                raise
        graphs.release()  # outside of the handler, which keeps the tensors of the failed evaluation alive
        log.say(f"step {step}: out of memory; the memory of recorded steps is released, and they are recorded anew")
        made_room = True
        evaluation()
    return made_room


def export(task: AnyTask, model: nn.Module, folder: Path, record: Record) -> None:
    """Write the checkpoint folder with its recipes and card, aside first: a full disk leaves the one before."""
    part = folder.with_name(f".{folder.name}.part")
    try:
        with explain_full_disk(f"model {folder}", folder.parent / "checkpoints"):
            shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
            task.export(model, part)
            write_card(part, task, record, newest_sheet(folder.parent / "sheets", record.progress.step))
            for path in part.rglob("*.safetensors"):
                make_readable(path)
            written = {path.name for path in part.iterdir()}
            move_into(part, folder)
            for path in (folder / SHEET, *folder.glob("recipe-*.toml")):
                if path.name not in written:  # of a run that had come further
                    path.unlink(missing_ok=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def move_into(part: Path, folder: Path) -> None:
    """Move each file over the one with its name. Others stay, also a folder in place of a link."""
    folder.mkdir(exist_ok=True)
    for path in part.iterdir():
        place = folder / path.name
        if path.is_dir() and not path.is_symlink():
            move_into(path, place)
        elif place.is_symlink() or not place.is_dir():
            os.replace(path, place)


def describe_devices(processes: Processes) -> str:
    """Name the devices of the run and how they share the work."""
    if processes.device.type == "cuda":
        name = torch.cuda.get_device_name(processes.device)
    else:
        name = f"{torch.get_num_threads()} CPU threads"
    kind, together = "DDP", model_shards(processes.count)
    if processes.sharded:
        kind = "FSDP2" if together == processes.count else f"FSDP2 in machines of {together}"
    return name if processes.count == 1 else f"{processes.count} x {name} ({kind})"
