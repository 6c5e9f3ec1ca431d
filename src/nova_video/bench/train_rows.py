"""Training steps, timed: the rows that `nova bench train` writes, in a terminal."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nova_video.bench.rows import read_records, short


@dataclass(frozen=True)
class TrainRow:
    """Steps of one configuration, measured. None: not measured, or not known here."""

    config: str
    batch: int
    """Samples of a step on each process."""
    precision: str
    strategy: str
    """single, or what shares the work of several processes: ddp or fsdp."""
    processes: int
    checkpointing: bool
    compile: bool
    device: str
    """Device of each process."""
    versions: dict[str, str]
    command: str
    """The command as typed in the repository's root."""
    changed: dict[str, Any] = field(default_factory=dict)
    """Settings that are not the configuration's own, by flag."""

    frames: int | None = None
    """Latent frames."""
    tokens: int | None = None
    """Tokens of a latent frame."""
    loss_repeat: int | None = None
    steps: int | None = None
    """Steps that were timed, one by one."""

    step_seconds: float | None = None
    """Median."""
    step_seconds_range: tuple[float, float] | None = None
    """Least and most: they differ in how many tokens are revealed, too."""
    cuda_graph: bool | None = None
    """True if all timed steps were CUDA graphs that had been recorded before."""
    first_step_seconds: float | None = None
    """The first step of the process, with all that is compiled for it."""
    samples_per_second: float | None = None
    """Samples of all processes over the median."""
    tflop: float | None = None
    """10^12 useful operations of a step on each process, in the mean of the steps timed."""
    tflop_per_second: float | None = None
    """TFLOP a second on each device."""
    mfu: float | None = None
    """Share of what the device could do in bf16 (`training/flops.py`); None: that is not known."""
    peak_memory_gb: float | None = None
    """GiB on a device, the largest of all."""
    parameters: int | None = None
    loss: float | None = None
    """Mean of the steps timed, of those where it was finite."""
    skipped_steps: int | None = None
    """Number of timed steps whose gradients were not finite; they changed nothing."""
    finite: bool | None = None
    """Losses and gradients of all steps timed."""
    error: str | None = None
    """Why it could not be measured."""

    @property
    def kind(self) -> tuple[Any, ...]:
        """Rows of one kind replace each other."""
        changed = json.dumps(self.changed, sort_keys=True)
        how = (self.precision, self.strategy, self.processes, self.checkpointing, self.compile)
        return self.config, self.batch, *how, self.device, changed


def read_train_rows(path: Path) -> list[TrainRow]:
    return read_records(path, TrainRow)


# In a terminal --------------------------------------------------------------------------------------------------------


def how(row: TrainRow) -> str:
    """The special settings of a row, in words."""
    changed = [f"{name}={value}" for name, value in row.changed.items()]
    several = [f"{row.processes} x {row.strategy}"] if row.processes > 1 else []
    parts = [*several, "checkpointing" if row.checkpointing else "", "" if row.compile else "not compiled", *changed]
    parts += ["NOT FINITE"] if row.finite is False else []
    return ", ".join([row.precision, *(part for part in parts if part)])


def train_line(row: TrainRow) -> str:
    """In a few words."""
    name = f"{row.config}, batch {row.batch}, {how(row)}"
    if row.error is not None:
        return f"{name}: failed: {row.error}"
    least, most = row.step_seconds_range or (None, None)
    parts = [
        f"{short(row.step_seconds)} s a step ({short(least)} to {short(most)})",
        f"{short(row.samples_per_second)} samples/s",
        f"{short(row.tflop_per_second)} TFLOP/s",
        f"MFU {percent(row.mfu)}",
        f"{short(row.peak_memory_gb)} GiB",
        f"loss {short(row.loss)}",
        *([f"{row.skipped_steps} of {row.steps} steps skipped"] if row.skipped_steps else []),
    ]
    return f"{name}: {', '.join(parts)}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"
