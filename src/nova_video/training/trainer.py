"""The trainer: `nova train recipes/NAME.toml`. Set up, loop, step, log, save; one file, top to bottom.

What is trained is a `Task` (`autoencoder.py`, `transformer.py`); this file is what all training shares. On a GPU
a whole step (drawing the batch, forward, backward, clipping, AdamW, averaging) is one CUDA graph for each variant
of it, because small models spend their time launching kernels.
"""

import copy
import json
import math
import random
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from nova_video.devices import choose_device
from nova_video.errors import InputError
from nova_video.training.autoencoder import AutoencoderTask
from nova_video.training.checkpoint import Progress, load_checkpoint, newest_checkpoint, save_checkpoint
from nova_video.training.recipe import AutoencoderRecipe, OptimizerRecipe, Recipe, recipe_toml
from nova_video.training.task import Task
from nova_video.training.transformer import TransformerTask


def train(recipe: Recipe) -> Path:
    """Train to the end and return the folder of the exported model. Goes on from the output's newest checkpoint."""
    device = choose_device(recipe.device)
    output = Path(recipe.output)
    log = Log(output)
    newest = newest_checkpoint(output / "checkpoints")
    (output / "recipe.toml").write_text(recipe_toml(recipe))

    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # gave NaN once under graphs and compiled blocks; cause not isolated
    task: Task[Any, Any] = (
        AutoencoderTask(recipe, device) if isinstance(recipe, AutoencoderRecipe) else TransformerTask(recipe, device)
    )
    model = task.model
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = make_optimizer(model, recipe.optimizer, device)
    progress = Progress()
    if newest is not None:
        progress = load_checkpoint(newest, model, ema, optimizer)
        log.say(f"going on from {newest} at step {progress.step}")
    log.start(progress.step)
    count = sum(p.numel() for p in model.parameters())
    log.say(f"{recipe.name}: {count / 1e6:.2f} M parameters on {device_name(device)}; writing to {output}")

    started = time.monotonic()
    task.prepare(progress.step)
    log.say(f"samples ready after {time.monotonic() - started:.1f} s")
    stepper = Stepper(task, optimizer, ema, recipe.optimizer, recipe.cuda_graph and device.type == "cuda")
    variants, shares = task.variants()
    model_folder = output / "model"
    step, spent = progress.step, progress.seconds
    clock = time.monotonic() - spent
    logged_step, logged_at = step, spent

    def done() -> float:
        return max(step / recipe.steps, spent / recipe.seconds if recipe.seconds else 0.0)

    with StopSignal() as stop:
        last = done() >= 1
        while not last:
            set_rate(optimizer, learning_rate(recipe.optimizer, step, done()))
            stepper.step(random.Random(f"{recipe.seed}-{step}").choices(variants, shares)[0])
            step += 1
            spent = time.monotonic() - clock
            last = done() >= 1 or stop.asked

            def due(every: int, step: int = step, last: bool = last) -> bool:
                return bool(every) and (last or step % every == 0)

            if due(recipe.log.every):
                losses = stepper.losses()  # waits for the device
                spent = time.monotonic() - clock
                if not all(map(math.isfinite, losses.values())):
                    raise InputError(
                        f"step {step}: loss {losses}: expected finite numbers; go on with a lower optimizer.lr"
                    )
                rate = (step - logged_step) / max(spent - logged_at, 1e-9)
                logged_step, logged_at = step, spent
                log.write(step, spent, losses | {"steps_per_second": rate}, recipe.steps)
            if due(recipe.log.validate_every):
                log.write(step, spent, task.validate(ema), recipe.steps)
            if due(recipe.log.checkpoint_every):
                folder = output / "checkpoints"
                save_checkpoint(folder, Progress(step, spent), model, ema, optimizer, recipe.log.keep)
            if due(recipe.log.sample_every) or due(recipe.log.score_every):
                task.export(ema, model_folder)
            if due(recipe.log.sample_every):
                log.picture(step, task.sheet(ema, model_folder))
            if due(recipe.log.score_every):
                log.write(step, spent, task.score(model_folder, recipe.log.score_clips), recipe.steps)
            if recipe.data.refresh_every and step % recipe.data.refresh_every == 0:
                task.prepare(step)
    task.export(ema, model_folder)
    (model_folder / "recipe.toml").write_text(recipe_toml(recipe))
    log.say(f"{'stopped' if stop.asked else 'finished'} at step {step} after {spent:.0f} s: {model_folder}")
    return model_folder


class Stepper:
    """One optimisation step: plain, or recorded as a CUDA graph the second time a variant comes up."""

    def __init__(
        self,
        task: Task[Any, Any],
        optimizer: torch.optim.Optimizer,
        ema: nn.Module,
        recipe: OptimizerRecipe,
        graph: bool,
    ) -> None:
        self.task, self.optimizer, self.recipe, self.graph = task, optimizer, recipe, graph
        self.parameters = [p for p in task.model.parameters() if p.requires_grad]
        self.averaged: list[Tensor] = list(ema.parameters())
        self.current: list[Tensor] = list(task.model.parameters())
        device = self.parameters[0].device
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)
        self.sums = torch.zeros(len(task.loss_names), 2, device=device, dtype=torch.float64)  # sum, count
        self.graphs: dict[Any, torch.cuda.CUDAGraph | None] = {}

    def step(self, variant: Any) -> None:
        if not self.graph:
            self._step(variant)
        elif variant not in self.graphs:  # a plain step on a side stream, which is what warms a recording up
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._step(variant)
            torch.cuda.current_stream().wait_stream(side)
            self.graphs[variant] = None
        else:
            graph = self.graphs[variant]
            if graph is None:
                graph = self.graphs[variant] = self._record(variant)
            graph.replay()

    def _record(self, variant: Any) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        pool = next((g.pool() for g in self.graphs.values() if g is not None), None)
        with torch.cuda.graph(graph, pool=pool):
            self._step(variant)
        return graph

    def _step(self, variant: Any) -> None:
        with self.autocast:
            losses = self.task.loss(variant)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(self.averaged, self.current, 1 - self.recipe.ema)
        for row, name in enumerate(self.task.loss_names):
            if name in losses:
                self.sums[row, 0] += losses[name].detach()
                self.sums[row, 1] += 1

    def losses(self) -> dict[str, float]:
        """Means since the last call."""
        rows = zip(self.task.loss_names, self.sums.tolist(), strict=True)
        means = {name: total / count for name, (total, count) in rows if count}
        self.sums.zero_()
        return means


def make_optimizer(model: nn.Module, recipe: OptimizerRecipe, device: torch.device) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1 and min(p.shape[:2]) > 1]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    cuda = device.type == "cuda"
    rate = torch.tensor(recipe.lr, device=device) if cuda else recipe.lr  # a tensor, so that graphs read it anew
    return torch.optim.AdamW(groups, lr=rate, betas=recipe.betas, fused=cuda, capturable=cuda)


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


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a wish to stop after the current step, with everything saved."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self.before:
            signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, self.before[signal.Signals(number)])

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Log:
    """To the screen, to TensorBoard (`OUTPUT/tensorboard`) and to `OUTPUT/metrics.jsonl`; sheets to `OUTPUT/sheets`."""

    def __init__(self, output: Path) -> None:
        try:
            (output / "sheets").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"output folder {output} cannot be written: {error.strerror}") from error
        self.output = output
        self.console = Console(highlight=False, soft_wrap=True)

    def start(self, step: int) -> None:
        """Go on from `step`: what an interrupted run logged past it is dropped."""
        self.writer = SummaryWriter(str(self.output / "tensorboard"), purge_step=step + 1)
        path = self.output / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        path.write_text("".join(kept))

    def say(self, text: str) -> None:
        self.console.print(text)

    def write(self, step: int, seconds: float, numbers: dict[str, float], total: int) -> None:
        if not numbers:
            return
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()
        with (self.output / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "seconds": round(seconds, 1)} | numbers) + "\n")
        shown = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        self.say(f"step {step:6d}/{total}  {seconds:6.1f} s  {shown}")

    def picture(self, step: int, picture: Image.Image) -> None:
        path = self.output / "sheets" / f"step-{step:08d}.png"
        picture.save(path)
        self.writer.add_image("samples", np.array(picture), step, dataformats="HWC")
        self.say(f"step {step:6d}  {path}")
