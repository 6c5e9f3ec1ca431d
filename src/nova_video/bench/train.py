"""Training steps, timed: what `nova bench train` writes down as one row.

The steps are the trainer's own (`training/trainer.py`), by itself or in every process that torchrun or accelerate has
started, on random latents and text features that are given: no dataset, no autoencoder and no text encoder takes part.
A step is timed from the end of the one before to its own. Each has a number of revealed tokens, which training draws
from a distribution: it is cut into a few parts of equal share, whose middles take turns, so that their mean is nearly
that of training. Each of them comes up three times before: it is compiled for and called, and recorded as a CUDA graph
where the trainer would do so, which several processes are ready for after some calls. That is no part of a step's time:
a run pays it once for each number of revealed tokens.
"""

import gc
import itertools
import math
import random
import statistics
import time
from bisect import bisect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import nn

from nova_video.bench.configs import BATCHES, LOSS_REPEAT, SEED, SIZES, build, resize_model
from nova_video.bench.sample import GIB, checkpoint, device_name, digits, outline, spread, versions, write_trace
from nova_video.bench.train_rows import TrainRow
from nova_video.common.checks import AttentionKernels, check_number
from nova_video.common.devices import choose_device
from nova_video.common.errors import InputError
from nova_video.model import NOVATransformer3DModel
from nova_video.pipeline.loading import load_scheduler, load_transformer
from nova_video.pipeline.settings import CheckpointSettings
from nova_video.sampling.schedulers import new_scheduler
from nova_video.training.checkpoint import Average
from nova_video.training.flops import device_peak
from nova_video.training.processes import Processes
from nova_video.training.recipe import DatasetTransformerRecipe, OptimizerRecipe
from nova_video.training.stepper import Stepper, make_optimizer, set_kernels
from nova_video.training.transformer_task import Batch, TransformerTask, Variant

PARTS = 10  # of the distribution of the numbers of revealed tokens

# The paper's, as in recipes/paper-*.toml.
OPTIMIZER = OptimizerRecipe(
    lr=1e-4, betas=(0.9, 0.95), weight_decay=0.02, warmup=0, final=1.0, clip=0.0, ema=0.98, ema_every=100
)


@dataclass(frozen=True)
class AskedTraining:
    """How to train a configuration. None: as it is."""

    batch: int | None = None
    """Samples of a step on each process."""
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    checkpointing: bool = False
    compile: bool = True
    graph: bool = True
    """CUDA graphs, where the trainer would take them."""
    attention: AttentionKernels = "auto"
    mask_ratio: Literal["batch", "sample"] = "batch"
    mask_levels: int = 0
    """These three as in a recipe."""
    frames: int | None = None
    """Pixel frames."""
    size: tuple[int, int] | None = None
    """Height and width in pixels."""
    device: str = "auto"
    warm_up: int = 10
    """Steps that do not count, at least: three of each number of revealed tokens in any case."""
    steps: int = 30

    def __post_init__(self) -> None:
        for name, value in (("batch", self.batch), ("warm-up", self.warm_up), ("steps", self.steps)):
            if value is not None:
                check_number(name, value, 1, integer=True)
        if self.frames is not None and (self.frames < 1 or self.frames % 4 != 1):
            raise InputError(f"frames is {self.frames}: expected 4k + 1 frames, such as 1, 9 or 17")

    @property
    def changed(self) -> dict[str, Any]:
        """The flags that change the work of the configuration."""
        size = None if self.size is None else f"{self.size[1]}x{self.size[0]}"
        masks = None if self.mask_ratio == "batch" else self.mask_ratio
        attention = None if self.attention == "auto" else self.attention
        values = {"frames": self.frames, "size": size, "mask-ratio": masks, "attention": attention}
        values |= {"no-graph": None if self.graph else True, "mask-levels": self.mask_levels or None}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class TrainedModel:
    """A model to train, and what for."""

    model: NOVATransformer3DModel
    scheduler: Any
    frames: int
    """Latent frames."""
    grid: tuple[int, int]
    """Grid of the latents: height and width."""


class GivenTask(TransformerTask):
    """A transformer on one batch of random latents and text features, the same at every step."""

    recipe: DatasetTransformerRecipe

    def __init__(self, recipe: DatasetTransformerRecipe, opened: TrainedModel, device: torch.device) -> None:
        super().__init__(recipe, opened.model, opened.scheduler, device, opened.frames)
        self.grid, self.frames, self.batch = opened.grid, opened.frames, recipe.dataset.batch
        config, count, generator = self.model.config, self.batch, self.generator(SEED)
        self.given = Batch(
            torch.randn(count, config.image_dim, self.frames, *self.grid, generator=generator, device=device),
            torch.randn(count, config.text_token_len, config.text_token_dim, generator=generator, device=device).half(),
            torch.full((count,), config.text_token_len, device=device),
            torch.full((count,), self.defaults.motion_flow, device=device),
            torch.full((count,), self.defaults.fps, device=device),
        )

    def variants(self) -> tuple[list[Variant], list[float]]:
        if self.recipe.mask_ratio == "sample":
            return [Variant(self.grid, None)], [1.0]
        counts, shares = self.counts(self.tokens(self.grid))
        return [Variant(self.grid, count) for count in counts], shares

    def draw(self, variant: Variant, micro: int) -> Batch:
        return self.given

    def samples(self, variant: Variant) -> int:
        return self.batch

    def shape(self, variant: Variant) -> tuple[int, tuple[int, int]]:
        return self.frames, self.grid

    def validate(self, model: nn.Module) -> dict[str, float]:
        return {}

    def learned_from(self) -> str:
        return "random numbers"

    def sheet(self, model: nn.Module, folder: Path) -> Image.Image:
        raise NotImplementedError("a model of random weights makes nothing to look at")

    def export(self, model: nn.Module, folder: Path) -> None:
        raise NotImplementedError("a model of random weights is not kept")


def measure_training(config: str, asked: AskedTraining, command: str, profile: Path | None = None) -> TrainRow:
    """One configuration: a name of `SIZES`, or a checkpoint. What goes wrong is in the row. All processes call this.

    The first of them writes a Chrome trace of three more steps to `profile`.
    """
    device = choose_device(asked.device)
    batch = asked.batch or BATCHES.get(config, 1)
    recipe = replace(
        DatasetTransformerRecipe(),
        name=config,
        seed=SEED,
        device=asked.device,
        precision=asked.precision,
        strategy=asked.strategy,
        checkpointing=asked.checkpointing,
        compile=asked.compile,
        cuda_graph=asked.graph,
        attention=asked.attention,
        mask_ratio=asked.mask_ratio,
        mask_levels=asked.mask_levels,
        loss_repeat=LOSS_REPEAT,
        history_noise=0.0,
        motion_dropout=0.0,
        optimizer=OPTIMIZER,
        dataset=replace(DatasetTransformerRecipe().dataset, batch=batch),
    )
    processes = Processes(recipe)
    row = TrainRow(
        config=config,
        batch=batch,
        precision=asked.precision if asked.precision != "auto" else "bf16" if processes.half else "fp32",
        strategy="single" if processes.count == 1 else "fsdp" if processes.sharded else "ddp",
        processes=processes.count,
        checkpointing=asked.checkpointing,
        compile=asked.compile and device.type == "cuda",
        device=device_name(processes.device),
        versions=versions(),
        command=command,
        changed=asked.changed,
    )
    try:
        return _measure(row, asked, recipe, processes, profile)
    except Exception as error:  # of whatever kind: the next configuration is still to be measured
        return replace(row, error=" ".join(f"{type(error).__name__}: {error}".split()))
    finally:
        gc.collect()
        torch._dynamo.reset()  # the next configuration compiles its own
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measure(
    row: TrainRow, asked: AskedTraining, recipe: DatasetTransformerRecipe, processes: Processes, profile: Path | None
) -> TrainRow:
    device = processes.device
    set_kernels()
    opened = open_model(row.config, asked, device)
    task = GivenTask(recipe, opened, device)
    module = processes.spread(task)
    optimizer = make_optimizer(task.model, recipe.optimizer, device)
    average = Average(task.model, recipe.optimizer.ema)
    stepper = Stepper(task, module, optimizer, average, recipe, processes, [processes.index])
    timed = choose_variants(*task.variants(), asked.steps)
    warm_up = warm_up_variants(timed, asked.warm_up)

    clock = Clock(device)
    for number, variant in enumerate(warm_up + timed):
        if number == 1 and device.type == "cuda":  # not later: a graph's memory counts when it is recorded
            torch.cuda.reset_peak_memory_stats(device)
        if number == len(warm_up):
            warming = clock.seconds()
            stepper.numbers()  # of the steps so far: forgotten
            clock = Clock(device)
        stepper.step(number, variant)
        clock.mark()
    first, counted = processes.greatest(warming[0])[0], processes.greatest(*clock.seconds())
    numbers = stepper.numbers()
    if profile is not None:
        with write_trace(profile, device) if processes.is_main else nullcontext():
            for number, variant in enumerate(timed[:3], len(warm_up) + len(timed)):
                stepper.step(number, variant)
            clock.seconds()  # waits
    flops = sum(map(task.flops, timed)) / len(timed)
    rate = flops / statistics.mean(counted)
    peak = device_peak(row.device, torch.bfloat16)
    cuda = device.type == "cuda"
    memory = processes.greatest(torch.cuda.max_memory_allocated(device) / GIB if cuda else 0.0)[0]
    median, loss, skipped = statistics.median(counted), numbers.get("loss"), int(numbers.get("skipped_steps", 0))
    return replace(
        row,
        frames=opened.frames,
        tokens=task.tokens(opened.grid),
        loss_repeat=recipe.loss_repeat,
        steps=asked.steps,
        step_seconds=digits(median),
        step_seconds_range=spread(counted),
        cuda_graph=stepper.graphs is not None and len(stepper.graphs) == len(set(timed)),
        first_step_seconds=digits(first),
        samples_per_second=digits(row.batch * row.processes / median),
        tflop=digits(flops / 1e12),
        tflop_per_second=digits(rate / 1e12),
        mfu=None if peak is None else digits(rate / peak),
        peak_memory_gb=digits(memory) if cuda else None,
        parameters=sum(weight.numel() for weight in task.model.parameters()),
        loss=None if loss is None else digits(loss),
        skipped_steps=skipped,
        finite=loss is not None and math.isfinite(loss) and not skipped,
    )


def choose_variants(variants: Sequence[Variant], shares: Sequence[float], count: int) -> list[Variant]:
    """`count` variants in mixed order: the middles of at most `PARTS` parts of equal share, as often as each other."""
    bounds = list(itertools.accumulate(shares))
    parts = min(PARTS, count)
    middles = [variants[bisect(bounds, (part + 0.5) / parts * bounds[-1])] for part in range(parts)]
    chosen = [middles[number * parts // count] for number in range(count)]
    random.Random(SEED).shuffle(chosen)
    return chosen


def warm_up_variants(timed: Sequence[Variant], least: int) -> list[Variant]:
    """Each of the variants that are to be timed, all in turn: three times, and on until there are `least`."""
    distinct = list(dict.fromkeys(timed))
    return distinct * max(3, math.ceil(least / len(distinct)))


def open_model(config: str, asked: AskedTraining, device: torch.device) -> TrainedModel:
    """A released size with random weights, at another size in pixels if that is asked for; or a checkpoint's model."""
    size = SIZES.get(config)
    if size is not None:
        size = resize_model(size, *asked.size) if asked.size else size
        model, scheduler = build(size, device, torch.float32).transformer, new_scheduler(size.scheduler)
        frames, stride, pixels = size.num_frames, 8, size.image_size
    else:
        folder = checkpoint(config)
        model, scheduler = load_transformer(folder), load_scheduler(folder)
        frames, stride = CheckpointSettings.load(folder).defaults.num_frames, model.config.image_stride
        pixels = asked.size or tuple(model.config.image_size)
    frames = frames if asked.frames is None else asked.frames
    return TrainedModel(model.train(), scheduler, frames // 4 + 1, (pixels[0] // stride, pixels[1] // stride))


def check_training(configs: Sequence[str], asked: AskedTraining) -> None:
    """Checks every configuration and its settings before the first one is measured."""
    for config in configs:
        model = outline(config, asked.size).transformer
        if asked.frames is not None and asked.frames > 1 and not model.has_motion:
            raise InputError(f"frames is {asked.frames} and {config} makes pictures: expected 1")
        cell = model.size_multiple
        if asked.size is not None and (asked.size[0] % cell or asked.size[1] % cell):
            height, width = asked.size
            raise InputError(f"size is {width}x{height}: expected width and height in multiples of {cell}")


class Clock:
    """The time from mark to mark, and to the first one from the beginning. On CUDA that of the device, which is not
    waited for in between: as in training, it is given the next step while it is at one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []  # events on CUDA, else seconds
        self._wait()
        self.mark()

    def mark(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        self._wait()
        pairs = itertools.pairwise(self._marks)
        if self._device.type == "cuda":
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in pairs]

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
