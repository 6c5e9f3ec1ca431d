"""Training steps, timed: the rows that `nova bench train` writes, in a terminal and in tables."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nova_video.bench.configs import SIZES
from nova_video.bench.rows import read_records, short
from nova_video.bench.tables import EMPTY, RELEASED_DEVICE, by_device, made_by, markdown

# Seconds of a step and GB of the released implementation on one H200 (torch 2.11, CUDA 13, bf16), by configuration and
# batch.
RELEASED = {
    ("t2i-512-0.6b", 16): (0.27, 32),
    ("t2i-1024-0.6b", 8): (0.45, 58),
    ("t2v-480-0.6b", 3): (0.45, 59),
}


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
    """Of each process."""
    versions: dict[str, str]
    command: str
    """As typed in the repository's root."""
    changed: dict[str, Any] = field(default_factory=dict)
    """Settings that are not the configuration's own, by flag."""

    frames: int | None = None
    """Latent frames."""
    tokens: int | None = None
    """Of a latent frame."""
    loss_repeat: int | None = None
    steps: int | None = None
    """Steps that were timed, one by one."""

    step_seconds: float | None = None
    """Median."""
    step_seconds_range: tuple[float, float] | None = None
    """Least and most: they differ in how many tokens are revealed, too."""
    cuda_graph: bool | None = None
    """Whether all steps that were timed were CUDA graphs, recorded before."""
    first_step_seconds: float | None = None
    """The first step of the process, with all that is compiled for it."""
    samples_per_second: float | None = None
    """Of all processes, over the median."""
    tflop: float | None = None
    """10^12 useful operations of a step on each process, in the mean of the steps timed."""
    tflop_per_second: float | None = None
    """Of each device."""
    mfu: float | None = None
    """Share of what the device could do in bf16 (`training/flops.py`); None: that is not known."""
    peak_memory_gb: float | None = None
    """GiB on a device, the largest of all."""
    parameters: int | None = None
    loss: float | None = None
    """Mean of the steps timed, of those where it was finite."""
    skipped_steps: int | None = None
    """Of the steps timed, those whose gradients were not finite: they changed nothing."""
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


def usual_rows(rows: Sequence[TrainRow], device: str = RELEASED_DEVICE) -> list[TrainRow]:
    """On one such device, as one would train on it: bf16, compiled, nothing changed, computed twice or not finite."""
    return [
        row
        for row in rows
        if device in row.device
        and (row.precision, row.processes, row.checkpointing, row.compile) == ("bf16", 1, False, True)
        and not row.changed
        and row.error is None
        and row.finite is not False
    ]


# In a terminal and in tables ------------------------------------------------------------------------------------------


def how(row: TrainRow) -> str:
    """What is particular to a row, in words."""
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


def train_table(rows: Sequence[TrainRow]) -> str:
    """Steps of every configuration, beside the released implementation's."""
    configs = [*SIZES, *dict.fromkeys(row.config for row in rows if row.config not in SIZES)]
    done = [row for row in rows if row.error is None and row.step_seconds is not None]
    columns = (
        "configuration", "batch", "how", "released implementation, s (GB)", "s a step", "least to most", "times faster",
        "samples/s", "TFLOP/s", "MFU", "GiB",
    )  # fmt: skip
    tables = []
    for device, own in by_device(done).items():
        ordered = sorted(own, key=lambda row: (configs.index(row.config), row.batch, row.processes, how(row)))
        tables.append(f"{device}:\n\n{markdown(columns, [train_cells(row) for row in ordered])}")
    return "\n\n".join(tables) or EMPTY


def train_commands(rows: Sequence[TrainRow]) -> str:
    """How every row was made, with what; and what could not be measured."""
    return "\n".join(made_by(row, row.precision) for row in rows) or EMPTY


def train_cells(row: TrainRow) -> list[str]:
    comparable = not row.changed and row.processes == 1 and RELEASED_DEVICE in row.device
    released = RELEASED.get((row.config, row.batch)) if comparable else None
    least, most = row.step_seconds_range or (None, None)
    return [
        row.config,
        str(row.batch),
        how(row),
        "-" if released is None else f"{released[0]} ({released[1]})",
        f"**{short(row.step_seconds)}**",
        f"{short(least)} to {short(most)}",
        short(None if released is None or row.step_seconds is None else released[0] / row.step_seconds),
        short(row.samples_per_second),
        short(row.tflop_per_second),
        percent(row.mfu),
        short(row.peak_memory_gb),
    ]


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"
