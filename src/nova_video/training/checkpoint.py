"""Training checkpoints: weights, averaged weights, optimizer, step, time and place in the data in one safetensors file.

No pickles. A file appears whole or not at all, and the newest few are kept. Tensors are stored whole, however a run
shards them, so that a run goes on with any number of processes. Random numbers need no state: those of a step follow
from its number (`trainer.py`).
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from nova_video.common.checks import check_number
from nova_video.common.errors import InputError, first_line
from nova_video.io.files import make_readable

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The state of AdamW for each parameter, besides its number of steps."""
MOST_STEPS = 2**53

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingProgress:
    """How far a run has come."""

    step: int = 0
    seconds: float = 0.0
    """Spent training, all sessions of the run together."""
    micro_batches: int = 1
    """Number of micro batches in every step so far."""
    data: dict[str, Any] = field(default_factory=dict)
    """Place in the data (JSON), of each micro batch."""
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Sum and count of each logged mean since the last log line."""
    updates: int | None = None
    """Updates of the averaged weights; None in checkpoints of older versions."""


class Average:
    """Exponential moving average (EMA) of the weights that a model learns, sharded as they are.

    The decay warms up, min(decay, (1 + n) / (10 + n)) after n updates: with a constant one, a run that is short beside
    1 / (1 - decay) updates would export little but the weights that it started from.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self.weights.items()}
        self._own = local(list(self.averages.values()))
        self._current = local(list(self.weights.values()))

    @property
    def weight(self) -> float:
        """Share of the current weights in the next update."""
        return 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self._own, self._current, self.weight)
        self.updates += 1

    @torch.no_grad()
    def write_to(self, model: nn.Module, template: nn.Module, pending: bool = False) -> nn.Module:
        """Fill `template` with the averages where `model` learns and with its weights elsewhere.

        `pending`: the model has learned since the last update, which the written averages take in, but not their own.
        All processes take part.
        """
        averages = {name: whole(value) for name, value in self.averages.items()}
        if pending:
            averages = {name: value.lerp(whole(self.weights[name]), self.weight) for name, value in averages.items()}
        return copy_weights(model, template, averages)


@torch.no_grad()
def copy_weights(
    model: nn.Module, template: nn.Module, others: Mapping[str, Tensor] = MappingProxyType({})
) -> nn.Module:
    """Fill `template` with the weights of `model`, or with `others` of the same names. All processes take part."""
    template.load_state_dict({name: whole(others.get(name, value)) for name, value in model.state_dict().items()})
    return template


def whole(value: Tensor) -> Tensor:
    """A tensor that may be sharded over processes, gathered: every process calls this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(values: list[Tensor]) -> list[Tensor]:
    """This process's shards."""
    return [value.to_local() if isinstance(value, DTensor) else value.detach() for value in values]


@torch.no_grad()
def put(value: Tensor, into: Tensor) -> None:
    """Write a whole tensor into one that may be sharded."""
    if isinstance(into, DTensor):
        value = distribute_tensor(value.to(into.device), into.device_mesh, into.placements)
    into.copy_(value)


def gather_state(model: nn.Module, average: Average, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that a step changes, by name, on the CPU, and its `tables_of`. Weights that are not trained are those the
    run started from. All processes take part."""

    def kept(value: Tensor) -> Tensor:
        return whole(value.detach()).cpu().contiguous().clone()

    tensors = {f"model.{name}": kept(value) for name, value in (*average.weights.items(), *tables_of(model).items())}
    tensors |= {f"ema.{name}": kept(value) for name, value in average.averages.items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = kept(torch.as_tensor(value))
    return tensors


def tables_of(model: nn.Module) -> dict[str, Tensor]:
    """Buffers of the modules that learn, by name: a run from scratch would draw others."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        if any(parameter.requires_grad for parameter in module.parameters())
        for name, buffer in module.named_buffers(recurse=False)
    }


def save_checkpoint(folder: Path, progress: TrainingProgress, tensors: dict[str, Tensor], keep: int) -> Path:
    """Write `folder`/step-N.safetensors and delete all but the newest `keep`. One process calls this."""
    path = folder / f"step-{progress.step:08d}.safetensors"
    part = path.with_suffix(".part")
    with explain_full_disk(f"checkpoint {path}", folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, part, {"progress": json.dumps(asdict(progress))})
            make_readable(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    for old in checkpoints_in(folder)[:-keep]:
        old.unlink()
    return path


def sweep(output: Path) -> None:
    """Remove what saves that were killed have left in a run's folder. The caller holds the folder's lock."""
    for pattern in (".*.part", ".tmp*", "sheets/.*.part", "checkpoints/*.part", "checkpoints/.tmp*"):
        for left in output.glob(pattern):  # `.tmp*`: safetensors writes there before it renames
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


@contextmanager
def explain_full_disk(what: str, checkpoints: Path) -> Iterator[None]:
    """Turns the error of a full disk into an InputError that names the file and the place to continue from."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        last = newest_checkpoint(checkpoints)
        raise InputError(
            f"{what} could not be written: {error}; "
            + (f"the run can go on from {last}" if last else "there is no checkpoint to go on from")
        ) from error


def newest_checkpoint(folder: Path) -> Path | None:
    return max(checkpoints_in(folder), default=None)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, in the order of their steps."""
    return sorted(path for path in folder.glob("step-*.safetensors") if path.stem.removeprefix("step-").isdecimal())


def load_checkpoint(
    path: Path, model: nn.Module, average: Average, optimizer: torch.optim.Optimizer
) -> TrainingProgress:
    """Put everything back as it was gathered; an error names what does not fit. All processes call this.

    Nothing is written before all of the file was checked: a fused optimizer step does not check its state's shapes.
    """
    try:
        with safe_open(path, framework="pt") as file:
            progress = read_progress((file.metadata() or {}).get("progress", ""))
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        before = max((other for other in checkpoints_in(path.parent) if other < path), default=None)
        hint = "" if before is None else f"; without it the run goes on from {before}"
        raise InputError(f"checkpoint {path} cannot be read: {first_line(error)}{hint}") from error

    tables = tables_of(model)
    for name in tables:
        trained = [key for key in tensors if key == f"ema.{name}" or key.startswith(f"optimizer.{name}.")]
        if trained:
            log.warning("checkpoint %s: %s was trained so far, and stays as it is from here on", path, name)
        for key in trained:
            del tensors[key]
    targets: dict[str, Tensor] = {f"model.{name}": value for name, value in average.weights.items()}
    targets |= {f"ema.{name}": value for name, value in average.averages.items()}
    targets |= {f"model.{name}": value for name, value in tables.items() if f"model.{name}" in tensors}
    moments = {f"optimizer.{name}.{key}": p for name, p in average.weights.items() for key in MOMENTS}
    steps = {f"optimizer.{name}.step": name for name in average.weights}
    for name in [
        *sorted(targets.keys() - tensors.keys()),
        *sorted(tensors.keys() - (targets | moments | steps).keys()),
    ]:
        place = "lacks" if name in targets else "also has"
        raise InputError(f"checkpoint {path} is of another model or recipe: it {place} {name}")
    for name, target in (targets | moments).items():
        if name in tensors:
            check_tensor(path, name, tensors[name], target)
    learned = [name for key, name in steps.items() if key in tensors]  # every process has them in this order
    for key, name in steps.items():
        if key in tensors:
            check_step(path, key, tensors[key])
        present = [part for part in MOMENTS if f"optimizer.{name}.{part}" in tensors]
        if len(present) != (len(MOMENTS) if name in learned else 0):
            held = ", ".join([*present, *(["step"] if name in learned else [])])
            raise InputError(
                f"checkpoint {path}: optimizer.{name} has {held} alone: expected step, {', '.join(MOMENTS)}"
            )

    for name, target in targets.items():
        put(tensors[name], target)
    on_device = bool(optimizer.defaults.get("capturable"))
    for name in learned:
        parameter = average.weights[name]
        state: dict[str, Tensor] = {}
        for key in MOMENTS:
            state[key] = torch.zeros_like(parameter)
            put(tensors[f"optimizer.{name}.{key}"], state[key])
        state["step"] = tensors[f"optimizer.{name}.step"].to(parameter.device if on_device else "cpu")
        optimizer.state[parameter] = state
    average.updates = progress.step if progress.updates is None else progress.updates
    return progress


def read_progress(text: str) -> TrainingProgress:
    """The record of a checkpoint; ValueError says what is wrong with it."""
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError("its progress is no object")
    for name in ("data", "sums"):
        if not isinstance(values.get(name, {}), dict):
            raise ValueError(f"its {name} is no object")
    progress = TrainingProgress(**values)
    check_number("its step", progress.step, 0, integer=True, high=MOST_STEPS)
    check_number("its micro_batches", progress.micro_batches, 1, integer=True, high=MOST_STEPS)
    check_number("its seconds", progress.seconds, 0)
    if progress.updates is not None:
        check_number("its updates", progress.updates, 0, integer=True, high=MOST_STEPS)
    for name, pair in values.get("sums", {}).items():
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"its sums have {name} as {str(pair)[:40]}: expected a sum and a count")
        check_number(f"its count of {name}", pair[1], 0)
        check_number(f"its sum of {name}", pair[0], -math.inf)
    return replace(
        progress, sums={name: (float(total), float(count)) for name, (total, count) in progress.sums.items()}
    )


def check_tensor(path: Path, name: str, found: Tensor, target: Tensor) -> None:
    """Raises for another shape or type than the run has; says where values are not finite."""
    if found.shape != target.shape:
        shapes = f"{name} is {tuple(found.shape)}: expected {tuple(target.shape)}"
        raise InputError(f"checkpoint {path} is of another model or recipe: its {shapes}")
    if found.dtype != target.dtype:
        raise InputError(f"checkpoint {path}: its {name} is {found.dtype}: expected {target.dtype}")
    if not found.isfinite().all():
        log.warning("checkpoint %s: %s has values that are not finite", path, name)
    elif name.endswith(".exp_avg_sq") and name.startswith("optimizer.") and (found < 0).any():
        raise InputError(f"checkpoint {path}: its {name} has values below 0: expected means of squares")


def check_step(path: Path, name: str, found: Tensor) -> None:
    """Raises for what is no count of steps."""
    if found.shape != () or found.dtype != torch.float32:
        raise InputError(
            f"checkpoint {path}: its {name} is {found.dtype} {tuple(found.shape)}: expected a float32 number"
        )
    count = found.item()
    if not (0 <= count <= MOST_STEPS and count == int(count)):
        raise InputError(f"checkpoint {path}: its {name} is {count:g}: expected a whole number of steps")
