"""What was aimed at on one H200, beside what was measured: tables made from the recorded rows.

A target is met by a row of the configuration's own work, compiled, in float16 or bfloat16.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nova_video.bench.rows import Row
from nova_video.bench.tables import RELEASED_DEVICE, markdown
from nova_video.bench.train_rows import RELEASED, TrainRow, how

GB = 2**30 / 1e9  # in a GiB, which rows are in
HALF = ("float16", "bfloat16")
MFU = 0.45  # of training at 512 px
TWO_GPUS = 1.9  # times the samples a second of one


@dataclass(frozen=True)
class Target:
    """Of sampling: the most that it may take."""

    config: str
    most: float
    stretch: float | None = None
    """Better still."""
    preset: str = "exact"
    batch: int = 1
    measure: str = "seconds"
    """Field of the row."""

    @property
    def name(self) -> str:
        parts = [self.config, self.preset] + [f"batch {self.batch}"] * (self.batch > 1)
        return ", ".join([*parts, *([MEASURES[self.measure]] if self.measure in MEASURES else [])])


MEASURES = {
    "vae_seconds": "VAE decode",
    "first_preview_seconds": "first latent frame previewed",
}
SAMPLING = (
    Target("t2i-512-0.6b", 0.42, 0.25),
    Target("t2i-1024-0.6b", 1.45, 1.1),
    Target("t2i-1024-1.4b", 2.6, 2.1),
    Target("t2i-1024-0.6b", 9, 7.5, batch=8),
    Target("t2v-480-0.6b", 4.2, 2.8),
    Target("t2v-480-0.6b", 0.6, 0.4, measure="vae_seconds"),
    Target("t2v-480-0.6b", 0.6, 0.4, measure="first_preview_seconds"),
    Target("t2v-480-0.6b", 1.9, preset="balanced"),
    Target("t2v-480-0.6b", 1.2, preset="fast"),
    Target("t2i-1024-0.6b", 0.75, preset="balanced"),
    Target("t2i-1024-0.6b", 0.45, preset="fast"),
)
DECODE_GB = 6  # of the released clip, the autoencoder alone; the released implementation takes 19
STEP_SECONDS = {("t2i-512-0.6b", 16): 0.14, ("t2i-1024-0.6b", 8): 0.24, ("t2v-480-0.6b", 3): 0.24}


def sampling_targets(rows: Sequence[Row], decodes: Mapping[str, Any]) -> str:
    """Target, stretch and measured; "-" where nothing is recorded. `decodes` is what benchmarks/vae.py wrote."""
    found = []
    for target in SAMPLING:
        value = least(rows, target)
        aims = [f"{target.most:g}", "-" if target.stretch is None else f"{target.stretch:g}"]
        found.append([target.name, *aims, exactly(value), met(value, target.most, target.stretch)])
    held = [row["peak_gb"] for row in decodes["decodes"] if row["way"].startswith("in parts, kernels, ")]
    value = min(held, default=None)
    name = f"33 frames of 480x768, VAE decode alone, GB ({decodes['device']})"
    found.append([name, f"{DECODE_GB}", "-", exactly(value), met(value, DECODE_GB)])
    return markdown(("s, if nothing else is said", "target", "stretch", "measured", "met"), found)


def least(rows: Sequence[Row], target: Target) -> float | None:
    """Of the rows that are of its work."""
    work = (target.config, target.preset, target.batch)
    own = [row for row in rows if (row.config, row.preset, row.batch) == work and row.compile and row.dtype in HALF]
    own = [row for row in own if RELEASED_DEVICE in row.device and not row.changed and row.error is None]
    values = [value for row in own if (value := getattr(row, target.measure)) is not None]
    return min(values, default=None)


def training_targets(rows: Sequence[TrainRow]) -> str:
    """Seconds of a step, with checkpointing also memory, and the share of the device's arithmetic."""
    found = []
    for (config, batch), most in STEP_SECONDS.items():
        name = f"{config}, batch {batch}"
        plain = trained(rows, config, batch)
        seconds = None if plain is None else plain.step_seconds
        found.append([f"{name}, s a step", f"{most:g}", exactly(seconds), met(seconds, most)])
    for (config, batch), (released, memory) in RELEASED.items():
        name = f"{config}, batch {batch}, checkpointing"
        saving = trained(rows, config, batch, checkpointing=True)
        seconds = None if saving is None else saving.step_seconds
        held = None if saving is None or saving.peak_memory_gb is None else saving.peak_memory_gb * GB
        found.append([f"{name}, s a step", f"{released:g}", exactly(seconds), met(seconds, released)])
        found.append([f"{name}, GB", f"{memory / 2:g}", exactly(held), met(held, memory / 2)])
    (config, batch), *_ = STEP_SECONDS
    first = trained(rows, config, batch)
    share = None if first is None else first.mfu
    found.append([f"{config}, batch {batch}, MFU", f"at least {MFU:g}", exactly(share), met(share, MFU, higher=True)])
    for two in rows:
        times = speedup(rows, two)
        if times is not None:
            name = f"{two.config}, batch {two.batch}, two GPUs ({how(two)}; {two.device}), times the samples/s of one"
            found.append([name, f"at least {TWO_GPUS:g}", exactly(times), met(times, TWO_GPUS, higher=True)])
    return markdown(("work", "target", "measured", "met"), found)


def trained(rows: Sequence[TrainRow], config: str, batch: int, checkpointing: bool = False) -> TrainRow | None:
    """The row of these settings, as one would train on an H200."""
    asked = (config, batch, "bf16", 1, checkpointing, True)
    for row in rows:
        own = (row.config, row.batch, row.precision, row.processes, row.checkpointing, row.compile)
        if own == asked and RELEASED_DEVICE in row.device and not row.changed and row.error is None and row.finite:
            return row
    return None


def speedup(rows: Sequence[TrainRow], two: TrainRow) -> float | None:
    """Samples a second of a row of two processes, over those of one on such a device that is asked for the same."""
    alone = replace(two, strategy="single", processes=1)
    found = [row.samples_per_second for row in rows if row.kind == alone.kind and row.error is None and row.finite]
    if two.processes != 2 or two.error is not None or not two.samples_per_second or not found or not found[0]:
        return None
    return two.samples_per_second / found[0]


def met(value: float | None, target: float, stretch: float | None = None, higher: bool = False) -> str:
    if value is None:
        return "-"
    if stretch is not None and value <= stretch:
        return "yes, and the stretch"
    return "yes" if (value >= target if higher else value <= target) else "**no**"


def exactly(value: float | None) -> str:
    """Four digits: a table that rounded to three would call 1.451 as little as 1.45."""
    return "-" if value is None else f"{value:.4g}"
