"""Training checkpoints: weights, averaged weights, optimizer, step, time and place in the data in one safetensors file.

No pickles. A file appears whole or not at all, and the newest few are kept. Tensors are stored whole, however a run
shards them, so that a run goes on with any number of processes. Random numbers need no state: those of a step follow
from its number (`trainer.py`).
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from nova_video.errors import InputError


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    seconds: float = 0.0
    """Spent training, all sessions of the run together."""
    micro_batches: int = 1
    """Of every step so far."""
    data: dict[str, Any] = field(default_factory=dict)
    """Place in the data (JSON), of each micro batch."""
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Of each number that is logged as a mean, the sum and the count since it was logged last."""


class Average:
    """Running averages of what a model learns, sharded as its weights are: what is saved for use."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self.weights.items()}
        self._own = local(list(self.averages.values()))
        self._current = local(list(self.weights.values()))

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self._own, self._current, 1 - self.decay)

    @torch.no_grad()
    def write_to(self, model: nn.Module, template: nn.Module) -> nn.Module:
        """`template`, with the averages where `model` learns and its weights elsewhere. All processes take part."""
        state = {name: whole(value) for name, value in model.state_dict().items()}
        template.load_state_dict(state | {name: whole(value) for name, value in self.averages.items()})
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
    """All that a step changes, by name, on the CPU: weights that are not trained are those the run started from. All
    processes take part."""

    def kept(value: Tensor) -> Tensor:
        return whole(value.detach()).cpu().contiguous().clone()

    tensors = {f"model.{name}": kept(value) for name, value in average.weights.items()}
    tensors |= {f"ema.{name}": kept(value) for name, value in average.averages.items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = kept(torch.as_tensor(value))
    return tensors


def save_checkpoint(folder: Path, progress: Progress, tensors: dict[str, Tensor], keep: int) -> Path:
    """Write `folder`/step-N.safetensors and delete all but the newest `keep`. One process calls this."""
    path = folder / f"step-{progress.step:08d}.safetensors"
    part = path.with_suffix(".part")
    with writing(f"checkpoint {path}", folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, part, {"progress": json.dumps(asdict(progress))})
            make_readable(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    for old in sorted(folder.glob("step-*.safetensors"))[:-keep]:
        old.unlink()
    return path


def make_readable(path: Path) -> None:
    """Let others read it as they may read new files: safetensors makes its own for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


@contextmanager
def writing(what: str, checkpoints: Path) -> Iterator[None]:
    """Around what a full disk may stop: an InputError tells what was being written, and where the run can go on."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        last = newest_checkpoint(checkpoints)
        raise InputError(
            f"{what} could not be written: {error}; "
            + (f"the run can go on from {last}" if last else "there is no checkpoint to go on from")
        ) from error


def newest_checkpoint(folder: Path) -> Path | None:
    return max(folder.glob("step-*.safetensors"), default=None)


def load_checkpoint(path: Path, model: nn.Module, average: Average, optimizer: torch.optim.Optimizer) -> Progress:
    """Put everything back as it was gathered; an error names what does not fit. All processes call this."""
    try:
        with safe_open(path, framework="pt") as file:
            progress = Progress(**json.loads(file.metadata()["progress"]))
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        before = max((other for other in path.parent.glob("step-*.safetensors") if other < path), default=None)
        hint = "" if before is None else f"; without it the run goes on from {before}"
        raise InputError(f"checkpoint {path} cannot be read: {error}{hint}") from error

    targets: dict[str, Tensor] = {f"model.{name}": value for name, value in average.weights.items()}
    targets |= {f"ema.{name}": value for name, value in average.averages.items()}
    found = {name: value for name, value in tensors.items() if not name.startswith("optimizer.")}
    for name in sorted(targets.keys() ^ found.keys()):
        place = "lacks" if name in targets else "also has"
        raise InputError(f"checkpoint {path} is of another model or recipe: it {place} {name}")
    for name, target in targets.items():
        if target.shape != found[name].shape:
            shapes = f"{name} is {tuple(found[name].shape)}: expected {tuple(target.shape)}"
            raise InputError(f"checkpoint {path} is of another model or recipe: its {shapes}")
        put(found[name], target)
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if not state:
            continue
        optimizer.state[parameter] = {}
        for key, value in state.items():
            if value.shape == parameter.shape:
                kept = torch.zeros_like(parameter)
                put(value, kept)
            else:  # the number of steps
                kept = value.to(parameter.device if optimizer.defaults.get("capturable") else "cpu")
            optimizer.state[parameter][key] = kept
    return progress
