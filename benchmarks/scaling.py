"""Training on many GPUs by calculation, the tables of docs/scaling.md: `python benchmarks/scaling.py [--check]`.

It calculates what is sent in a step, how long that takes, and how much of it is waited for, from model sizes,
operations and the assumed network. Measured is only the step on one GPU, where `nova bench train` recorded it.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import tyro
from tables import filled, markdown

from nova_video.bench.configs import BATCHES, LOSS_REPEAT, SIZES, TEXT_DIM, TEXT_LEN, Size, build
from nova_video.bench.rows import short
from nova_video.bench.train_rows import TrainRow, percent, read_train_rows
from nova_video.io.files import atomic_path
from nova_video.model.masking import mask_ratios
from nova_video.training.flops import device_peak, step_flops
from nova_video.training.processes import BLOCKS_TOGETHER

DEVICE = "H200"
GPUS = (8, 64, 512)
PAIR = 2  # also GPUs, of one machine
MFU = 0.45  # where no step is recorded
FLOAT, HALF = 4, 2  # bytes
STATE = 5 * FLOAT  # bytes of a value: weight, gradient, AdamW's two moments, averaged weight
BUCKET = 25 * 2**20  # bytes of gradients that DDP sends together between machines, and last within one
SHORT_LEN = 32  # tokens of the caption's first sentence
PAPER = {name: 384 if size.num_frames > 1 else 1024 for name, size in SIZES.items()}  # samples of a step


class Measured(Protocol):
    """What is read of a row of `nova bench train`."""

    config: str
    batch: int
    step_seconds: float | None


@dataclass(frozen=True)
class Network:
    """What connects the GPUs. Bytes a second are for each direction, as NCCL reaches them."""

    name: str = "one 400 Gb/s InfiniBand adapter for each GPU"
    node: int = 8
    """GPUs of a machine."""
    link: float = 370e9
    """Within a machine, by NVLink 4: of 450e9; NVIDIA/nccl-tests issue 212."""
    machine: float = 8 * 47e9
    """Out of a machine: 46 to 48e9 an adapter of 400 Gb/s; NVIDIA/nccl-tests issue 290."""

    # Seconds of a hop in NCCL's own model (src/graph/tuning.cc), within a machine and between two: rings (Simple), and
    # trees (LL128), which all-reduce has.
    ring: tuple[float, float] = (3.4e-6, 9.6e-6)
    tree: tuple[float, float] = (1.2e-6, 8.5e-6)
    start: float = 8.4e-6

    def machines(self, gpus: int) -> int:
        return math.ceil(gpus / self.node)

    def rate(self, gpus: int) -> float:
        """Bytes a second through each GPU: every ring goes through all GPUs of a machine, and leaves it once."""
        return self.link if gpus <= self.node else min(self.link, self.machine)

    def share_seconds(self, size: float, gpus: int) -> float:
        """An all-gather or a reduce-scatter of `size` bytes in all."""
        between = self.machines(gpus) - 1
        hops = (gpus - 1 - between) * self.ring[0] + between * self.ring[1]
        return self.start + hops + size * (gpus - 1) / gpus / self.rate(gpus)

    def reduce_seconds(self, size: float, gpus: int) -> float:
        """An all-reduce of `size` bytes."""
        hops = 2 * ((min(gpus, self.node) - 1) * self.tree[0] + math.log2(self.machines(gpus)) * self.tree[1])
        return self.start + hops + 2 * size * (gpus - 1) / gpus / self.rate(gpus)

    def replicas_seconds(self, size: float, gpus: int) -> float:
        """An all-reduce of `size` bytes among one GPU of each machine, where all GPUs of a machine do so at once."""
        machines = self.machines(gpus)
        if machines == 1:
            return 0.0
        hops = 2 * math.log2(machines) * self.tree[1]
        return self.start + hops + 2 * size * (machines - 1) / machines / (self.machine / self.node)


INFINIBAND = Network()
ETHERNET = Network("one 100 Gb/s Ethernet adapter for each machine", machine=0.9 * 12.5e9)


@dataclass(frozen=True)
class Model:
    """A released size, and a step of it on one GPU."""

    name: str
    values: int
    parts: int
    """That FSDP2 gathers one by one."""
    batch: int
    seconds: float
    measured: bool


@dataclass(frozen=True)
class Step:
    """A step on many GPUs: seconds of arithmetic, of sending, and of sending that arithmetic does not hide."""

    work: float
    sending: float
    waiting: float

    @property
    def hidden(self) -> float:
        """Efficiency where sending goes on behind the arithmetic."""
        return self.work / (self.work + self.waiting)

    @property
    def plain(self) -> float:
        """Efficiency where it does not."""
        return self.work / (self.work + self.sending)


def models(rows: Sequence[Measured] = ()) -> list[Model]:
    """All released sizes; steps as recorded in `rows`, the newest of each, else as at an MFU of 45%."""
    times = {(row.config, row.batch): row.step_seconds for row in rows if row.step_seconds is not None}
    found = []
    for name, size in SIZES.items():
        network = build(size, torch.device("meta"), torch.bfloat16).transformer
        batch = BATCHES[name]
        peak = device_peak(DEVICE, torch.bfloat16)
        assert peak is not None
        grid = (size.image_size[0] // 8, size.image_size[1] // 8)
        visible = round(mean_visible() * grid[0] * grid[1] / 4)
        flops = step_flops(network, batch, size.num_frames // 4 + 1, grid, visible, LOSS_REPEAT)
        parts = (network.video_encoder, network.image_encoder, network.image_decoder)
        seconds = times.get((name, batch))
        found.append(
            Model(
                name,
                sum(weight.numel() for weight in network.parameters()),
                1 + sum(math.ceil(len(part.blocks) / BLOCKS_TOGETHER) for part in parts),
                batch,
                flops / peak / MFU if seconds is None else seconds,
                seconds is not None,
            )
        )
    return found


def usual_rows(rows: Sequence[TrainRow], device: str = DEVICE) -> list[TrainRow]:
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


def mean_visible() -> float:
    """Share of the tokens that is revealed, in the mean of the paper's mask ratios."""
    return 1 - mask_ratios(100_000, torch.Generator().manual_seed(0)).mean().item()


def ddp(model: Model, gpus: int, network: Network, work: float | None = None, micro: float = 1) -> Step:
    """Gradients in float32, all-reduced bucket by bucket while the rest of the backward pass goes on.

    `work`: seconds of a micro batch, if not those of the model's. Of several in a step, only the last one sends.
    """
    work = model.seconds if work is None else work
    size = FLOAT * model.values
    buckets = math.ceil(size / BUCKET)
    one = network.reduce_seconds(size / buckets, gpus)
    sending = buckets * one
    return Step(micro * work, sending, one + max(0.0, sending - one - 2 / 3 * work))


def fsdp(model: Model, gpus: int, network: Network, work: float | None = None, micro: float = 1) -> Step:
    """Weights in bfloat16, gathered part by part in the first forward pass of a step; gradients in float32, scattered
    in its last backward pass: both within a machine. Between machines each shard of the gradients is all-reduced.
    Otherwise as `ddp`."""
    work = model.seconds if work is None else work
    here, part = min(gpus, network.node), model.values / model.parts
    gather = network.share_seconds(HALF * part, here)
    scatter = network.share_seconds(FLOAT * part, here) + network.replicas_seconds(FLOAT * part / here, gpus)
    gathers, scatters = model.parts * gather, model.parts * scatter
    waiting = max(gather, gathers - work / 3) + max(scatter, scatters - 2 / 3 * work)
    return Step(micro * work, gathers + scatters, waiting)


STRATEGIES = {"DDP": ddp, "FSDP2": fsdp}


# Tables --------------------------------------------------------------------------------------------------------------


def tables(rows: Sequence[Measured] = ()) -> dict[str, str]:
    """Every table of the page, by name."""
    found = models(rows)
    return {
        "volume": volume_table(found),
        "memory": memory_table(found),
        "scaling": scaling_table(found, INFINIBAND),
        "paper": paper_table(found, INFINIBAND),
        "ethernet": scaling_table(found, ETHERNET),
        "data": data_table(found),
    }


def volume_table(found: Sequence[Model]) -> str:
    """GB that each GPU sends in a step, of so many that (n - 1) / n is about 1."""
    columns = (
        "model", "values, M", "DDP: all-reduce, GB", "FSDP2: all-gather, GB", "reduce-scatter, GB",
        "all-reduce between machines, GB", "in all, GB",
    )  # fmt: skip
    rows = []
    for model in found:
        gradients, weights = FLOAT * model.values / 1e9, HALF * model.values / 1e9
        between = 2 * gradients / INFINIBAND.node
        sent = (2 * gradients, weights, gradients, between, weights + gradients + between)
        rows.append([model.name, f"{model.values / 1e6:.0f}", *(f"{size:.2f}" for size in sent)])
    return markdown(columns, rows)


def memory_table(found: Sequence[Model]) -> str:
    """GiB of weights, gradients, optimizer and average on each GPU; the activations come on top. Under FSDP2 the
    shares of them within a machine, and what is gathered of the weights."""
    shared = (PAIR, INFINIBAND.node)
    columns = ("model", "DDP, GiB", *(f"FSDP2 on machines of {gpus}, GiB" for gpus in shared))
    rows = []
    for model in found:
        sizes = (STATE, *(STATE / gpus + HALF for gpus in shared))
        rows.append([model.name, *(short(size * model.values / 2**30) for size in sizes)])
    return markdown(columns, rows)


def scaling_table(found: Sequence[Model], network: Network) -> str:
    """Every GPU keeps its batch: seconds of sending, and the efficiency with and without hiding it."""
    columns = ("model", "batch a GPU", "step on one, s", "", *(f"{gpus} GPUs" for gpus in (PAIR, *GPUS)))
    rows = []
    for model in found:
        for name, strategy in STRATEGIES.items():
            steps = [strategy(model, gpus, network) for gpus in (PAIR, *GPUS)]
            seconds = f"{model.seconds:.3f}{'' if model.measured else '*'}"
            rows.append([model.name, str(model.batch), seconds, name, *map(cell, steps)])
    return markdown(columns, rows)


def cell(step: Step) -> str:
    return f"{step.sending:.3f} s, {percent(step.plain)} to {percent(step.hidden)}"


def paper_table(found: Sequence[Model], network: Network) -> str:
    """The paper's batch, whatever the number of GPUs: steps a second, and of what that would be without sending."""
    columns = ("model", "batch", "", *(f"{gpus} GPUs: samples each, steps/s, efficiency" for gpus in GPUS))
    rows = []
    for model in found:
        for name, strategy in STRATEGIES.items():
            cells = []
            for gpus in GPUS:
                each = PAPER[model.name] / gpus
                if each < 1:
                    cells.append("fewer samples than GPUs")
                    continue
                micro = each / model.batch  # batches that a GPU does one after the other, or the part of one
                step = strategy(model, gpus, network, min(1.0, micro) * model.seconds, max(1.0, micro))
                rate = 1 / (step.work + step.waiting)
                cells.append(f"{each:g}, {short(rate)}, {percent(step.hidden)}")
            rows.append([model.name, str(PAPER[model.name]), name, *cells])
    return markdown(columns, rows)


def data_table(found: Sequence[Model]) -> str:
    """What has to be read: bytes of a sample, and of all GPUs each second."""
    columns = (
        "model", "latents, kB", "text, kB", "samples/s a GPU", *(f"{gpus} GPUs, GB/s" for gpus in GPUS),
        "an epoch of a million, GB",
    )  # fmt: skip
    rows = []
    for model in found:
        latents, text = sample_bytes(SIZES[model.name])
        rate = model.batch / model.seconds
        each = [short(gpus * rate * (latents + text) / 1e9) for gpus in GPUS]
        million = f"{1e6 * (latents + text) / 1e9:,.0f}"
        rows.append([model.name, f"{latents / 1e3:.0f}", f"{text / 1e3:.0f}", f"{rate:.0f}", *each, million])
    return markdown(columns, rows)


def sample_bytes(size: Size) -> tuple[int, int]:
    """Of an encoded sample: moments (2 x 4 channels, bfloat16), and features of the caption and its first sentence."""
    moments = HALF * 8 * (size.num_frames // 4 + 1) * (size.image_size[0] // 8) * (size.image_size[1] // 8)
    return moments, HALF * TEXT_DIM * (TEXT_LEN + SHORT_LEN)


# The command ----------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Scaling:
    """Print the tables, and write them into the page."""

    check: bool = False
    """Write nothing: fail if a table of the page is another."""
    rows: Path = ROOT / "benchmarks" / "results" / "train.json"
    """What `nova bench train` wrote."""
    page: Path = ROOT / "docs" / "scaling.md"


def main(args: Scaling) -> int:
    made = tables(usual_rows(read_train_rows(args.rows)))
    page = args.page.read_text(encoding="utf-8")
    whole = filled(page, made)
    if args.check:
        if whole != page:
            print(f"{args.page} is not what is calculated: run python benchmarks/scaling.py", file=sys.stderr)
        return int(whole != page)
    for name, table in made.items():
        print(f"{name}\n\n{table}\n")
    with atomic_path(args.page) as temporary:
        temporary.write_text(whole, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Scaling, config=(tyro.conf.FlagCreatePairsOff,))))
