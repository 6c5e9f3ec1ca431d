"""Scaling by calculation: known answers, and a page that says what the command does."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scaling import (
    ETHERNET,
    GPUS,
    INFINIBAND,
    STRATEGIES,
    Model,
    Network,
    Scaling,
    Step,
    ddp,
    fsdp,
    main,
    mean_visible,
    models,
    sample_bytes,
    tables,
)

from nova_video.bench.configs import SIZES
from nova_video.bench.train_rows import TrainRow

ROOT = Path(__file__).parents[1]
LARGE = Model("large", values=10**9, parts=40, batch=8, seconds=0.3, measured=False)


def test_the_page_is_what_the_command_prints(tmp_path: Path) -> None:
    assert main(Scaling(check=True)) == 0
    other = tmp_path / "scaling.md"
    other.write_text((ROOT / "docs" / "scaling.md").read_text().replace("| 1450 |", "| 1452 |", 1))
    assert main(Scaling(check=True, page=other)) == 1


def test_recorded_steps_take_the_place_of_assumed_ones() -> None:
    how = {"precision": "bf16", "strategy": "single", "processes": 1, "checkpointing": False, "compile": True}
    row = TrainRow("t2i-512-0.6b", 16, **how, device="NVIDIA H200", versions={}, command="", step_seconds=0.125)
    first, *others = models([row])
    assert (first.seconds, first.measured) == (0.125, True)
    assert not any(other.measured for other in others)
    assert "| 0.125 |" in tables([row])["scaling"]
    assert "| 0.125" not in tables()["scaling"]


def test_known_times() -> None:
    """Two GPUs: one hop and half of it; two machines of eight: fifteen hops, of which one is between them."""
    network = Network(link=100e9, machine=50e9, ring=(1e-6, 10e-6), tree=(2e-6, 20e-6), start=5e-6)
    assert network.share_seconds(1e9, 2) == pytest.approx(5e-6 + 1e-6 + 0.5e9 / 100e9)
    assert network.share_seconds(1e9, 16) == pytest.approx(5e-6 + 14e-6 + 10e-6 + 15 / 16 * 1e9 / 50e9)
    assert network.reduce_seconds(1e9, 2) == pytest.approx(5e-6 + 2 * 2e-6 + 1e9 / 100e9)
    assert network.reduce_seconds(1e9, 32) == pytest.approx(5e-6 + 2 * (7 * 2e-6 + 2 * 20e-6) + 2 * 31 / 32 / 50)
    assert network.replicas_seconds(1e9, 32) == pytest.approx(5e-6 + 2 * 2 * 20e-6 + 2 * 3 / 4 * 8 / 50)
    assert network.replicas_seconds(1e9, 8) == 0


def test_bytes_that_are_sent() -> None:
    """With no time for hops, a step of DDP sends 8 bytes a value; FSDP2 6 within a machine, and 1 out of it."""
    bare = Network(link=100e9, machine=800e9, ring=(0.0, 0.0), tree=(0.0, 0.0), start=0.0)
    for gpus in GPUS:
        machines = gpus // 8
        assert ddp(LARGE, gpus, bare).sending == pytest.approx(8 * LARGE.values * (gpus - 1) / gpus / 100e9)
        sent = 6 * 7 / 8 + (machines - 1) / machines
        assert fsdp(LARGE, gpus, bare).sending == pytest.approx(sent * LARGE.values / 100e9)


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_what_is_waited_for(strategy: object) -> None:
    """Never more than is sent, never nothing; more GPUs and slower networks do not make it better."""
    assert callable(strategy)
    for network in (INFINIBAND, ETHERNET):
        steps = [strategy(LARGE, gpus, network) for gpus in (2, *GPUS)]
        assert all(0 < step.waiting <= step.sending for step in steps)
        assert all(0 < step.plain <= step.hidden < 1 for step in steps)
        assert [step.sending for step in steps] == sorted(step.sending for step in steps)
        assert [step.hidden for step in steps] == sorted((step.hidden for step in steps), reverse=True)
    assert strategy(LARGE, 64, ETHERNET).hidden < strategy(LARGE, 64, INFINIBAND).hidden
    idle = strategy(LARGE, 64, INFINIBAND, 0.0)
    assert idle.waiting == pytest.approx(idle.sending)  # nothing to hide behind


@pytest.mark.parametrize("strategy", [ddp, fsdp])
def test_micro_batches_are_sent_once(strategy: Callable[..., Step]) -> None:
    """DDP sends after the last of them; FSDP2 gathers before the first, and scatters after the last."""
    one, four = (strategy(LARGE, 64, INFINIBAND, micro=micro) for micro in (1, 4))
    assert (four.work, four.sending, four.waiting) == (4 * one.work, one.sending, one.waiting)


def test_bytes_are_those_of_tensors() -> None:
    moments, text = sample_bytes(SIZES["t2v-480-0.6b"])
    assert moments == torch.zeros(8, 9, 60, 96, dtype=torch.bfloat16).nbytes
    assert text == torch.zeros(256 + 32, 2560, dtype=torch.float16).nbytes


def test_share_of_revealed_tokens() -> None:
    """The mean of a normal of mean 1 and standard deviation 0.25, cut to 0.7 and 1, is known in closed form."""
    low = -0.3 / 0.25
    density = (math.exp(-(low**2) / 2) - 1) / math.sqrt(2 * math.pi)
    mass = 0.5 - 0.5 * (1 + math.erf(low / math.sqrt(2)))
    assert mean_visible() == pytest.approx(-0.25 * density / mass, abs=1e-3)
