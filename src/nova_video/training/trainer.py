"""The trainer: `nova train recipes/NAME.toml`. Set up, loop, step, log, save; one file, top to bottom.

What is trained is a `Task` (`dataset_task.py`, and those of `nova_worlds`); this file is what all training shares.
A step consists of micro batches, which the processes share out. The random numbers of a micro batch follow from
the seed, the step and the micro batch's own number, so that neither stopping nor the number of processes changes what
is learned. On GPUs a whole step (forward, backward, what processes exchange, clipping, AdamW) is one CUDA graph for
each variant of it (`graphs.py`), because launching its kernels takes longer than running them where they are small.
"""

import copy
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from types import FrameType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nova_video.common.errors import InputError
from nova_video.common.fast_parts import find_fast
from nova_video.fast.graphs import CudaRecorder
from nova_video.fast.training_graphs import StepGraphs, tensors_of
from nova_video.io.files import atomic_path, lock_folder, make_readable
from nova_video.training.card import CARD, SHEET, Record, newest_sheet, write_card
from nova_video.training.checkpoint import (
    Average,
    Progress,
    copy_weights,
    gather_state,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    sweep,
    whole,
    writing,
)
from nova_video.training.flops import device_peak
from nova_video.training.log import Log, Looks
from nova_video.training.processes import Processes, model_shards
from nova_video.training.recipe import (
    KINDS,
    OptimizerRecipe,
    Recipe,
    TransformerRun,
    changes,
    load_recipe,
    own_task,
    recipe_toml,
)
from nova_video.training.segments import Segment, begin_segment, read_segments, write_segments
from nova_video.training.task import LossParts, Task, fill_seed

BAD_STEPS = 10  # in a row, which end a run
AGREE_EVERY = 2.0  # seconds, about: several processes agree on the time and on whether to stop

AnyTask = Task[Any, Any, Any]


def train(recipe: Recipe) -> Path:
    """Train to the end and return the folder of the exported model. Goes on from the output's newest checkpoint.

    Raises KeyboardInterrupt when it was asked to stop by SIGINT or SIGTERM, with a checkpoint and the model written.
    """
    processes = Processes(recipe)
    log = Log(recipe, processes.is_main)
    choose_kernels()
    torch.manual_seed(recipe.seed)
    task = make_task(recipe, processes.device)
    with lock_folder(log.output) if processes.is_main else nullcontext():
        return _train(task, processes, log)


def _train(task: AnyTask, processes: Processes, log: Log) -> Path:
    """The same, of what it needs."""
    recipe, output = task.recipe, log.output
    looked_at = copy.deepcopy(task.model).eval().requires_grad_(False)  # holds averaged weights now and then
    module = processes.spread(task)
    optimizer = make_optimizer(task.model, recipe.optimizer, processes.device)
    average = Average(task.model, recipe.optimizer.ema)
    if processes.is_main:
        sweep(output)
    newest = newest_checkpoint(output / "checkpoints")
    segments = read_segments(output) if newest is not None else []
    progress, differing = Progress(micro_batches=0), list[str]()
    if newest is not None:
        log.say(f"going on from {newest}")
        changed = compare_recipes(output / "recipe.toml", recipe, log)
        progress = load_checkpoint(newest, task.model, average, optimizer)
        differing = [f"{key} is {now!r} from here on; it was {was!r}" for key, (was, now) in changed.items()]
        if share_done(recipe, progress.step, progress.seconds) >= 1:
            learned_otherwise = [key for key in changed if not key.startswith(LOOKING)]
            if segments and segments[-1].data not in ("", task.data_identity()):
                learned_otherwise.append("what the dataset holds")
            if learned_otherwise:
                return refuse_rewriting(output, progress.step, learned_otherwise, log)
    elif (output / "model" / CARD).exists():
        raise InputError(f"{output} has a finished model and no checkpoint to go on from: expected another output")
    for line in [*differing, *schedule_warnings(recipe)]:
        log.say(line)
    log.start(progress.step)
    learned = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
    log.say(f"{recipe.name}: {learned / 1e6:.2f} M parameters on {describe_devices(processes)}; writing to {output}")

    own, micro_batches = processes.share(recipe.micro_batches, progress.micro_batches or None)
    if progress.data and progress.micro_batches != micro_batches:
        log.say(f"{progress.micro_batches} micro batches a step have become {micro_batches}: the data start anew")
    started = time.monotonic()
    task.prepare(progress.step)
    with StopSignal(processes.is_main) as stop:  # from before there are readers, which do not end well half made
        task.open_data(own, micro_batches, progress.data if progress.micro_batches == micro_batches else {})
        log.say(f"samples ready after {time.monotonic() - started:.1f} s")
        processes.wait()  # all have compared the recipe before, and can train with this one
        text = recipe_toml(recipe)
        if share_done(recipe, progress.step, progress.seconds) < 1 or not segments:
            here = (task.learned_from(), task.data_identity(), describe_devices(processes))
            segments = begin_segment(segments, Segment(progress.step, text, *here))
        else:  # what differs changes nothing of what was learned
            segments = [*segments[:-1], replace(segments[-1], recipe=text)]
        if processes.is_main:
            with writing(f"{output / 'recipe.toml'}", output / "checkpoints"):
                write_segments(output, segments)
                with atomic_path(output / "recipe.toml") as aside:
                    aside.write_text(text, encoding="utf-8")
        stepper = Stepper(task, module, optimizer, average, recipe, processes, own)
        stepper.go_on(progress.sums)
        variants, shares = task.variants()
        flops, samples = cache(task.flops), cache(task.samples)
        peak = device_peak(torch.cuda.get_device_name(), torch.bfloat16) if task.on_gpu else None
        model_folder = output / "model"
        step, spent = progress.step, progress.seconds
        clock = time.monotonic() - spent
        since = Work(step, spent)
        met, meet = (step, spent), step + 1  # when all processes have agreed on the time, and will do so next

        finished, stopped = share_done(recipe, step, spent) >= 1, False

        def due(every: int) -> bool:
            return bool(every) and (finished or step % every == 0)

        def looks_due() -> Looks:
            return Looks(due(recipe.log.validate_every), due(recipe.log.sample_every), due(recipe.log.score_every))

        def weights() -> nn.Module:
            """The weights that are exported and looked at. All processes take part."""
            if recipe.export == "raw":
                return copy_weights(task.model, looked_at)
            return average.write_to(task.model, looked_at, pending=step % recipe.optimizer.ema_every > 0)

        def record() -> Record:
            return Record(Progress(step, spent, micro_batches), segments, log.newest)

        def look_at(looks: Looks) -> None:
            model = weights()
            short = processes.is_main and look(task, model, looks, log, record(), stepper.graphs)
            if processes.greatest(short)[0] and not short and stepper.graphs is not None:
                stepper.graphs.release()  # all record the same steps

        def save() -> None:
            tensors, places = gather_state(task.model, average, optimizer), processes.gather(task.places())
            sums = stepper.so_far()
            if processes.is_main:
                now = Progress(step, spent, micro_batches, places, sums, average.updates)
                save_checkpoint(output / "checkpoints", now, tensors, recipe.log.keep)

        if newest is not None and any(missed := processes.greatest(*log.missed(looks_due()))):
            look_at(Looks(*map(bool, missed)))
        while not (finished or stopped):
            rate = learning_rate(recipe.optimizer, step, share_done(recipe, step, spent))
            set_rate(optimizer, rate)
            variant = random.Random(f"{recipe.seed}-{step}").choices(variants, shares)[0]
            try:
                stepper.step(step, variant)
            except InputError:  # of the data, of which nothing was learned yet
                if processes.count == 1 and step > progress.step:
                    save()  # alone: others may wait for this process elsewhere
                raise
            step += 1
            since.flops += flops(variant) * micro_batches
            since.samples += samples(variant) * micro_batches
            if processes.count == 1 or step >= meet:  # time and wish to stop are agreed on
                spent, asked = processes.greatest(time.monotonic() - clock, stop.asked)
                stopped = bool(asked)
                a_step = (spent - met[1]) / (step - met[0])
                met, meet = (step, spent), step + max(1, int(AGREE_EVERY / max(a_step, 1e-6)))
            finished = share_done(recipe, step, spent) >= 1
            if due(recipe.log.every):
                numbers = stepper.numbers()  # waits for the device
                spent = processes.greatest(time.monotonic() - clock)[0]
                numbers |= {"lr": rate}
                numbers |= since.rates(step, spent, None if peak is None else peak * processes.count)
                since = Work(step, spent)
                log.write(step, spent, numbers)
            if processes.count == 1 or due(recipe.log.every):  # several see it at the same step
                stepper.check(step, output)
            paused = time.monotonic()
            if due(recipe.log.checkpoint_every) or stopped:  # before it is looked at, which may fail or take long
                save()
            if any(looks := looks_due()) and not stopped:
                look_at(looks)
            since.seconds += time.monotonic() - paused  # rates are those of steps
            if (every := task.refresh_every()) and step % every == 0:
                task.prepare(step)
        task.close_data()
    model = weights()
    if processes.is_main:
        export(task, model, model_folder, record())
    ended_how = f"{'stopped' if stopped else 'finished'} at step {step} after {spent:.0f} s"
    log.say(f"{ended_how}: {model_folder}")
    log.finish()
    processes.wait()
    if stopped:  # whoever waits for a model is told that this is not the last one
        raise KeyboardInterrupt(f"{ended_how}, all saved: the same command goes on")
    return model_folder


LOOKING = ("log.", "export", "device", "trackers", "name")
"""How the settings begin that change nothing of what is learned."""


def share_done(recipe: Recipe, step: int, seconds: float) -> float:
    """How much of a run is done, by steps or by time, whichever is further on."""
    return max(step / recipe.steps, seconds / recipe.seconds if recipe.seconds else 0.0)


def refuse_rewriting(output: Path, step: int, differing: list[str], log: Log) -> Path:
    """Leave a finished run as it is: no step would be taken with what differs. Raises where it was not exported."""
    what = f"{output} is finished at step {step}, and no step would be taken with what differs ({', '.join(differing)})"
    if not (output / "model" / CARD).exists():
        raise InputError(f"{what}: expected the recipe that it ran with, which exports it, or more steps")
    log.say(f"{what}: nothing was changed; more steps go on with it, another output begins anew")
    return output / "model"


def schedule_warnings(recipe: Recipe) -> list[str]:
    """What a run is too short for."""
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
    """What has changed since the run was begun, by key. Raises InputError for what its checkpoints do not go with."""
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


def choose_kernels() -> None:
    """Set how torch multiplies on a GPU, in all training."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    if find_fast("attention") is None:  # which takes cuDNN's attention only where its gradients are finite
        torch.backends.cuda.enable_cudnn_sdp(False)


def make_task(recipe: Recipe, device: torch.device) -> AnyTask:
    """The task that the recipe's kind names."""
    built_in = KINDS.get(recipe.kind)
    task = own_task(recipe.kind) if built_in is None else resolve_name(built_in.task)
    made = task(recipe, device)
    if not isinstance(made, Task):
        raise InputError(f"kind is {recipe.kind!r}: expected a class that extends nova_video.training.task.Task")
    return made


def look(task: AnyTask, model: nn.Module, looks: Looks, log: Log, record: Record, graphs: StepGraphs | None) -> bool:
    """Validate, draw and score `model`, the weights that are exported. Whether recorded steps had to make room."""
    folder, progress = log.output / "model", record.progress
    step, spent, weights = progress.step, progress.seconds, task.recipe.exported_weights
    works: list[Callable[[], object]] = []
    if looks.validate:
        works.append(lambda: log.say(f"step {step}: validating with {weights}"))
        works.append(lambda: log.write(step, spent, task.validate(model)))
    if looks.sample or looks.score:
        works.append(lambda: export(task, model, folder, record))
    if looks.sample:
        works.append(lambda: log.say(f"step {step}: drawing samples with {weights}"))
        works.append(lambda: log.picture(step, task.sheet(model, folder)))
    if looks.score:
        works.append(lambda: log.say(f"step {step}: scoring {task.recipe.log.score_clips} clips"))
        works.append(lambda: log.write(step, spent, task.score(folder, task.recipe.log.score_clips)))
    short = False
    for work in works:
        try:
            work()
            continue
        except torch.OutOfMemoryError:
            if graphs is None or short:
                raise
        graphs.release()  # outside of the handler, which holds on to what was being computed
        log.say(f"step {step}: out of memory; the memory of steps is let go of, and they are recorded anew")
        short = True
        work()
    return short


def export(task: AnyTask, model: nn.Module, folder: Path, record: Record) -> None:
    """Write the checkpoint folder with its recipes and card, aside first: a full disk leaves the one before."""
    part = folder.with_name(f".{folder.name}.part")
    try:
        with writing(f"model {folder}", folder.parent / "checkpoints"):
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
    """Each file over the one of its name; others stay, and so does a real folder where `part` has a link to one."""
    folder.mkdir(exist_ok=True)
    for path in part.iterdir():
        place = folder / path.name
        if path.is_dir() and not path.is_symlink():
            move_into(path, place)
        elif place.is_symlink() or not place.is_dir():
            os.replace(path, place)


class Stepper:
    """One optimisation step: plain, or as a CUDA graph from the second time on that a variant comes up.

    A step whose gradients are not finite changes nothing and is counted.
    """

    def __init__(
        self,
        task: AnyTask,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: Average,
        recipe: Recipe,
        processes: Processes,
        own: list[int],
    ) -> None:
        """`module` is what `processes.spread` made of the task; `own` are the micro batches of this process.

        Steps become graphs (`graphs`, else None) where `processes.records` them and each process has one micro batch.
        """
        self.task, self.module, self.optimizer, self.average = task, module, optimizer, average
        self.recipe, self.seed = recipe.optimizer, recipe.seed
        self.processes, self.own = processes, own
        capture = processes.records(task) and len(own) == 1
        self.graphs: StepGraphs | None = None
        if capture:
            agree = processes.all_agree if processes.count > 1 else None
            self.graphs = StepGraphs(CudaRecorder(task.device), agree)
        self.parameters = [p for p in task.model.parameters() if p.requires_grad]
        device = task.device
        self.autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=processes.half, cache_enabled=not capture and processes.half
        )
        self.names = (*task.loss_names, "grad_norm")
        self.sums = torch.zeros(len(self.names), 2, device=device, dtype=torch.float64)  # sum, count
        self.rows: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}  # names -> their rows of the sums, and a one
        self.bad = torch.zeros(2, device=device)  # steps that were skipped: since the last look, in a row
        self.seen = torch.zeros(2, pin_memory=task.on_gpu)  # the same, as the device had it some steps ago
        self.newest: Any = None  # batch

    def step(self, number: int, variant: Any) -> None:
        """Step `number`, counted from 0."""
        batches = (self._draw(number, variant, micro) for micro in self.own)
        if self.graphs is None:
            self._step(variant, batches)
        else:
            self.graphs(variant, next(batches), lambda batch: self._step(variant, [batch]))
        if (number + 1) % self.recipe.ema_every == 0:  # not in the graph, which would keep one decay
            self.average.update()
        self.seen.copy_(self.bad, non_blocking=True)

    def _draw(self, number: int, variant: Any, micro: int) -> Any:
        """The batch of a micro batch; what its loss draws follows from the same seed."""
        torch.manual_seed(fill_seed(self.seed, number, micro))
        self.newest = self.task.draw(variant, micro)
        return self.newest

    def _step(self, variant: Any, batches: Iterable[Any]) -> None:
        """A batch for each micro batch of this process: each is taken when the one before has been learned from."""
        self.optimizer.zero_grad(set_to_none=True)  # what a recording that failed has left
        for place, batch in enumerate(batches):
            with self.processes.accumulating(self.module, place == len(self.own) - 1):
                with self.autocast:
                    losses = self.module(variant, batch)
                (losses["loss"] / len(self.own)).backward()
            self._count(losses)
        total = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.recipe.clip:
            nn.utils.clip_grads_with_norm_(self.parameters, self.recipe.clip, total)
        norm = whole(total).detach()
        self._count({"grad_norm": norm})
        finite = norm.isfinite() & (self.bad[1] < BAD_STEPS)  # then the run ends: nothing is learned until it is seen
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # its kernel then changes nothing
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.bad[0] += ~finite
        self.bad[1].copy_((self.bad[1] + 1) * ~finite)

    def _count(self, losses: LossParts) -> None:
        """Scalars count once, pairs are a sum and a count; what is not finite is left out."""
        names = tuple(losses)
        if names not in self.rows:
            rows = torch.tensor([self.names.index(name) for name in names], device=self.sums.device)
            self.rows[names] = (rows, torch.ones((), device=self.sums.device))
        rows, once = self.rows[names]
        pairs = [value if isinstance(value, tuple) else (value.detach().float(), once) for value in losses.values()]
        sums, counts = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        values = torch.stack([sums, counts], dim=1).double()  # (names, 2)
        self.sums.index_add_(0, rows, torch.where(values.isfinite().all(1, keepdim=True), values, 0.0))

    def numbers(self) -> dict[str, float]:
        """Means since the last call, over all processes, and how many steps were skipped."""
        self.processes.add_up(self.sums)
        means = {
            name: total / count for name, (total, count) in zip(self.names, self.sums.tolist(), strict=True) if count
        }
        self.sums.zero_()
        skipped = int(self.bad[0])
        self.bad[0] = 0
        return means | ({"skipped_steps": float(skipped)} if skipped else {})

    def so_far(self) -> dict[str, tuple[float, float]]:
        """What the next numbers are the means of: sums and counts, over all processes."""
        sums = self.sums.clone()
        self.processes.add_up(sums)
        return {name: (total, count) for name, (total, count) in zip(self.names, sums.tolist(), strict=True) if count}

    def go_on(self, sums: dict[str, tuple[float, float]]) -> None:
        """From what was `so_far` when the run was interrupted."""
        if self.processes.is_main:  # they are of all processes
            for row, name in enumerate(self.names):
                self.sums[row] = torch.tensor(sums.get(name, (0.0, 0.0)), dtype=self.sums.dtype)

    def check(self, step: int, output: Path) -> None:
        """Stop a run whose last ten steps were skipped, with the newest batch saved.

        The device is not waited for, and may be some steps on when it is seen: those change nothing either.
        """
        row = int(self.seen[1])
        if row < BAD_STEPS:
            return
        checkpoints = output / "checkpoints"
        path = output / f"bad-batch-{step:08d}-{self.processes.index}.safetensors"
        batch = {name: value.detach().cpu().contiguous() for name, value in tensors_of(self.newest).items()}
        with writing(f"step {step}: {row} steps in a row were skipped, and their newest batch {path}", checkpoints):
            save_file(batch, path)
            make_readable(path)
        raise InputError(
            f"step {step}: the last {row} steps had gradients that are not finite and were skipped; the newest batch"
            f" is in {path}: expected finite numbers, try a lower optimizer.lr"
        )


class Work:
    """What was done since a step."""

    def __init__(self, step: int, seconds: float) -> None:
        self.step, self.seconds = step, seconds
        self.flops = self.samples = 0.0

    def rates(self, step: int, seconds: float, peak: float | None) -> dict[str, float]:
        """A second; `mfu`, the share of what the devices could do (`flops.py`), where that is known."""
        time = max(seconds - self.seconds, 1e-9)
        rates = {"steps_per_second": (step - self.step) / time, "samples_per_second": self.samples / time}
        return rates | ({"mfu": self.flops / time / peak} if peak and self.flops else {})


def make_optimizer(model: nn.Module, recipe: OptimizerRecipe, device: torch.device) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1 and min(p.shape[:2]) > 1]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    cuda = device.type == "cuda"
    rate = torch.tensor(recipe.lr, device=device) if cuda else recipe.lr  # a tensor, so that graphs read it anew
    return torch.optim.AdamW(groups, lr=rate, betas=recipe.betas, fused=True, capturable=cuda)


def learning_rate(recipe: OptimizerRecipe, step: int, done: float) -> float:
    """Linear warm-up over `warmup` steps, cosine from lr to final * lr as `done` goes from 0 to 1."""
    cosine = recipe.final + (1 - recipe.final) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return recipe.lr * min(1.0, (step + 1) / max(1, recipe.warmup)) * cosine


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def describe_devices(processes: Processes) -> str:
    if processes.device.type == "cuda":
        name = torch.cuda.get_device_name(processes.device)
    else:
        name = f"{torch.get_num_threads()} CPU threads"
    kind, together = "DDP", model_shards(processes.count)
    if processes.sharded:
        kind = "FSDP2" if together == processes.count else f"FSDP2 in machines of {together}"
    return name if processes.count == 1 else f"{processes.count} x {name} ({kind})"


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a wish to stop after the current step, with everything saved."""

    def __init__(self, says: bool = True) -> None:
        """`says`: this is the process that does."""
        self.asked, self.says = False, says

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self.before:
            signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, self.before[signal.Signals(number)])
        if self.says:  # not by what may be in the middle of printing
            os.write(2, b"asked to stop: the run ends after this step or sheet, all saved; asked again, at once\n")

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
