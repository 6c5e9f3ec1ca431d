"""The processes of a run: the share of the model on each, and what they agree on.

accelerate reads what `accelerate launch` or torchrun put into the environment. The model is whole on each process (DDP,
distributed data parallel) or sharded over those of a machine (FSDP2, torch's `fully_shard`: a few blocks at a time, on
any device). Used by `trainer.py`.
"""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from nova_video.common.devices import choose_device
from nova_video.common.errors import InputError
from nova_video.training.recipe import Recipe
from nova_video.training.task import LossParts, Task

BLOCKS_TOGETHER = 4
"""Under FSDP2: their weights are gathered, and their gradients scattered, with one call. Large messages use more of a
network; and each call takes processor time, where steps are not CUDA graphs."""

TOGETHER = 25 * 2**20
"""Bytes of gradients that DDP sends with one call, at least."""

SHARE = 2
"""Size of the first part of the gradients that DDP sends, with one call, between GPUs of one machine.

There sending takes less time than computing, but products, which are made for all multiprocessors, take up to twice as
long beside it. Between machines sending can take longer than computing, and begins as soon as it can.
"""

PATIENCE = timedelta(hours=2)  # with a process that samples, scores or saves while the others wait


def model_shards(count: int) -> int:
    """Over how many of `count` processes a model is sharded: those of a machine where each has several, else all."""
    here = on_this_machine(count)
    return here if here > 1 and count % here == 0 else count


def on_this_machine(count: int) -> int:
    """How many of `count` processes: launchers put it into the environment."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count))


class LossModule(nn.Module):
    """A task's loss as the `forward` of a module, which is what DDP and FSDP2 hook into."""

    def __init__(self, task: Task[Any, Any, Any]) -> None:
        super().__init__()
        self.model = task.model
        self.task = task

    def forward(self, variant: Any, batch: Any) -> LossParts:
        return self.task.loss(variant, batch)


class ReplicatedModule(nn.Module):
    """A module that each process has whole (DDP): gradients are averaged over all while a backward pass goes on.

    They are sent from where they are. torch's DistributedDataParallel copies each to a place it has for them, which it
    sends from in parts of one size, and needs to find out which weights a step leaves out: here all processes take
    steps of one kind, which leave out the same.
    """

    def __init__(self, module: nn.Module, device: torch.device, share: float) -> None:
        """Gradients are sent once they are this `share` of what is not sent yet, and `TOGETHER`."""
        super().__init__()
        self.module, self.share = module, share
        self.sends = True
        """Whether the next backward pass sends: the last one of a step."""
        self.averages = device.type == "cuda"  # NCCL does, gloo sums
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.total = self.left = sum(parameter.nbytes for parameter in trained)  # bytes, and those that are not sent
        self.ready = 0  # bytes that wait
        self.waiting: list[Tensor] = []
        self.sent: list[Tensor] = []
        self.calls: list[Any] = []
        for value in module.state_dict().values():
            dist.broadcast(value, 0)
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._ready)

    def forward(self, *given: Any) -> Any:
        return self.module(*given)

    def _ready(self, parameter: Tensor) -> None:
        if self.sends and parameter.grad is not None:
            self.waiting.append(parameter.grad)
            self.ready += parameter.grad.nbytes
            if self.ready >= max(TOGETHER, self.share * self.left):
                self._send()

    def _send(self) -> None:
        how: Any = dist.AllreduceCoalescedOptions()
        how.reduceOp = dist.ReduceOp.AVG if self.averages else dist.ReduceOp.SUM
        group: Any = dist.group.WORLD
        self.calls.append(group.allreduce_coalesced(self.waiting, how))
        self.sent += self.waiting
        self.left -= self.ready
        self.waiting, self.ready = [], 0

    def finish(self) -> None:
        """After the backward pass: all gradients are averages."""
        if self.waiting:
            self._send()
        for call in self.calls:
            call.wait()
        if not self.averages:
            torch._foreach_div_(self.sent, dist.get_world_size())
        self.calls, self.sent, self.left = [], [], self.total


class Processes:
    """This process among those of the run; a run of one process is the common case."""

    def __init__(self, recipe: Recipe) -> None:
        device = choose_device(recipe.device)
        self.count, self.index = int(os.environ.get("WORLD_SIZE", "1")), 0
        self.device = device
        self._state: PartialState | None = None
        if self.count > 1:
            self._state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
            self.count, self.index = self._state.num_processes, self._state.process_index
            self.device = self._state.device
        by_launcher = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        self.sharded = self.count > 1 and (recipe.strategy == "fsdp" or (recipe.strategy == "auto" and by_launcher))
        self.cuda_graph = recipe.cuda_graph and recipe.micro_batches in (0, self.count)
        self.half = recipe.precision in ("bf16", "fp8") or (recipe.precision == "auto" and self.device.type == "cuda")

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def share(self, micro_batches: int, before: int | None) -> tuple[list[int], int]:
        """The micro batches of this process, and how many there are in all.

        `micro_batches` is what the recipe says, 0 for as many as `before` (a resumed run) or as there are processes.
        """
        kept = before if before is not None and before % self.count == 0 else self.count
        count = micro_batches or kept
        if count % self.count:
            raise InputError(f"micro_batches is {count}: expected a multiple of the {self.count} processes")
        return list(range(self.index, count, self.count)), count

    def spread(self, task: Task[Any, Any, Any]) -> nn.Module:
        """The module whose call is the task's loss and whose backward pass brings gradients to all processes."""
        module = LossModule(task)
        if self.count == 1:
            return module
        if self.sharded:
            return self._shard(module)
        return ReplicatedModule(module, self.device, 1 / SHARE if on_this_machine(self.count) == self.count else 0)

    def _shard(self, module: LossModule) -> nn.Module:
        """Shards a module. Gathered weights stay until the last backward pass of a step: in bf16, 2 bytes a value.

        Several machines each have all shards (hybrid sharding): between them go gradients alone, of each shard.
        """
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if self.half:
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        together = model_shards(self.count)
        whole = self.count == together
        mesh = init_device_mesh(
            self.device.type,
            (together,) if whole else (self.count // together, together),
            mesh_dim_names=("shard",) if whole else ("replicate", "shard"),
        )
        shard = partial(fully_shard, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        blocks = {*(getattr(module.model, "_no_split_modules", None) or ())}
        for part in module.model.modules():
            if isinstance(part, nn.ModuleList) and all(
                blocks & {kind.__name__ for kind in type(b).__mro__} for b in part
            ):
                for start in range(0, len(part), BLOCKS_TOGETHER):
                    shard(list(part[start : start + BLOCKS_TOGETHER]))
        shard(module)
        return module

    def records(self, task: Task[Any, Any, Any]) -> bool:
        """True if steps can be CUDA graphs that exchange gradients: with one micro batch on each process."""
        return self.cuda_graph and task.on_gpu and task.capturable

    @contextlib.contextmanager
    def accumulating(self, module: nn.Module, last: bool) -> Iterator[None]:
        """Around a micro batch: gradients are exchanged after the `last` one of a step alone."""
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last)
            module.set_reshard_after_backward(last)
        if isinstance(module, ReplicatedModule):
            module.sends = last
        yield
        if isinstance(module, ReplicatedModule) and last:
            module.finish()

    def greatest(self, *numbers: float) -> list[float]:
        """The largest of each number over all processes."""
        if self.count == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.tolist()

    def all_agree(self, holds: bool) -> bool:
        """True if `holds` is true on all processes."""
        return not self.greatest(not holds)[0]

    def add_up(self, values: Tensor) -> None:
        """Sum a tensor over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(values)

    def gather(self, values: dict[str, Any]) -> dict[str, Any]:
        """The entries of all processes together."""
        if self.count == 1:
            return values
        return {name: value for part in gather_object([values]) for name, value in part.items()}

    def wait(self) -> None:
        """For all processes."""
        if self._state is not None:
            self._state.wait_for_everyone()
