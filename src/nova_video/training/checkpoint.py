"""Training checkpoints: model, averaged model, optimizer, step, time and random state in one safetensors file.

No pickles. A file appears whole or not at all, and the newest few are kept.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nova_video.errors import InputError


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    seconds: float = 0.0
    """Spent training, all sessions of the run together."""


def save_checkpoint(
    folder: Path, progress: Progress, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, keep: int
) -> Path:
    """Write `folder`/step-N.safetensors and delete all but the newest `keep`."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    path = folder / f"step-{progress.step:08d}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    metadata = {"progress": json.dumps({"step": progress.step, "seconds": progress.seconds})}
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, part, metadata)
    os.replace(part, path)
    for old in sorted(folder.glob("step-*.safetensors"))[:-keep]:
        old.unlink()
    return path


def newest_checkpoint(folder: Path) -> Path | None:
    return max(folder.glob("step-*.safetensors"), default=None)


def load_checkpoint(path: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Put everything back as `save_checkpoint` found it; an error names what does not fit."""
    try:
        with safe_open(path, framework="pt") as file:
            progress = Progress(**json.loads(file.metadata()["progress"]))
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise InputError(f"checkpoint {path} cannot be read: {error}") from error

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    try:
        model.load_state_dict(part("model."))
        ema.load_state_dict(part("ema."))
    except RuntimeError as error:
        raise InputError(f"checkpoint {path} is of another model: {error}") from error
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in part("optimizer.").items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return progress
