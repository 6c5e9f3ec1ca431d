"""What a process of several does with its gradients. That several learn what one does: slow/test_distributed.py."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nova_video.training import processes
from nova_video.training.processes import ReplicatedModule


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("share", "parts"), [(0, [2] * 8), (1 / 4, [4, 3, 3, 2, 2, 2]), (1, [16])])
def test_gradients_are_sent_in_parts(
    share: float, parts: list[int], group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is to come the first share, or two gradients; those of several micro batches once, as their sum."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(17)))
    layers[0].requires_grad_(False)
    trained = [layer.weight for layer in layers[1:]]
    monkeypatch.setattr(processes, "TOGETHER", 2 * trained[0].nbytes)
    sent: list[list[Tensor]] = []
    send = ReplicatedModule._send

    def watched(self: ReplicatedModule) -> None:
        sent.append(list(self.waiting))
        send(self)

    monkeypatch.setattr(ReplicatedModule, "_send", watched)
    module = ReplicatedModule(layers, torch.device("cpu"), share)
    x = torch.randn(2, 3, 8)
    for _ in range(2):  # steps
        sent.clear()
        layers.zero_grad()
        for number, micro in enumerate(x):
            module.sends = number == 1
            module(micro).sum().backward()
            assert module.sends or not sent
        module.finish()
        assert [len(part) for part in sent] == parts
        order = [gradient for part in sent for gradient in part]
        assert all(ours is weight.grad for ours, weight in zip(order, reversed(trained), strict=True))
    averaged = [weight.grad for weight in trained]
    expected = torch.autograd.grad(layers(x).sum(), trained)
    torch.testing.assert_close(averaged, list(expected))


@pytest.mark.parametrize(("here", "share"), [(None, 1 / 2), (4, 1 / 2), (2, 0), (1, 0)])
def test_between_machines_sending_begins_at_once(
    here: int | None, share: float, group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where each machine has one GPU."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if here is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    alone = processes.Processes.__new__(processes.Processes)
    alone.count, alone.sharded, alone.device = 4, False, torch.device("cpu")
    module = alone.spread(SimpleNamespace(model=nn.Linear(2, 2)))  # type: ignore[arg-type]
    assert isinstance(module, ReplicatedModule)
    assert module.share == share
