"""One optimisation step, plain or as a CUDA graph, and what belongs to it: AdamW, the learning rate, kernels, rates.

Used by `trainer.py` and `nova bench train`.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nova_video.common.errors import InputError
from nova_video.common.fast_parts import find_fast
from nova_video.common.tensors import tensors_of
from nova_video.io.files import make_readable
from nova_video.training.checkpoint import Average, explain_full_disk, whole
from nova_video.training.processes import Processes
from nova_video.training.recipe import OptimizerRecipe, Recipe
from nova_video.training.task import LossParts, Task, fill_seed

if TYPE_CHECKING:
    from nova_video.fast.training_graphs import StepGraphs

BAD_STEPS = 10  # in a row, which end a run


class Stepper:
    """Takes optimisation steps: one by one, or as CUDA graphs from the second time on that a variant comes up.

    A step whose gradients are not finite changes nothing and is counted.
    """

    def __init__(
        self,
        task: Task[Any, Any, Any],
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: Average,
        recipe: Recipe,
        processes: Processes,
        own: list[int],
    ) -> None:
        """`module` is what `processes.spread` made of the task; `own` are the micro batches of this process.

        `graphs` is None where steps are not recorded, such as with several micro batches on a process.
        """
        self.task, self.module, self.optimizer, self.average = task, module, optimizer, average
        self.recipe, self.seed = recipe.optimizer, recipe.seed
        self.processes, self.own = processes, own
        self.graphs: StepGraphs | None = None
        fast = find_fast("training_graphs") if processes.records(task) and len(own) == 1 else None
        if fast is not None:
            agree = processes.all_agree if processes.count > 1 else None
            self.graphs = fast.StepGraphs(fast.CudaRecorder(task.device), agree)
        self.parameters = [p for p in task.model.parameters() if p.requires_grad]
        device = task.device
        self.autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=processes.half, cache_enabled=fast is None and processes.half
        )
        self.names = (*task.loss_names, "grad_norm")
        self.sums = torch.zeros(len(self.names), 2, device=device, dtype=torch.float64)  # sum, count
        self.rows: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}  # names -> their rows of the sums, and a one
        self.bad = torch.zeros(2, device=device)  # skipped steps: since the last log line, and in a row
        self.seen = torch.zeros(2, pin_memory=task.on_gpu)  # the same numbers, as the device had them some steps ago
        self.newest: Any = None  # batch

    def step(self, number: int, variant: Any) -> None:
        """Take step `number`, counted from 0."""
        batches = (self._draw(number, variant, micro) for micro in self.own)
        if self.graphs is None:
            self._step(variant, batches)
        else:
            self.graphs(variant, next(batches), lambda batch: self._step(variant, [batch]))
        if (number + 1) % self.recipe.ema_every == 0:  # not in the graph, which would keep one decay
            self.average.update()
        self.seen.copy_(self.bad, non_blocking=True)

    def _draw(self, number: int, variant: Any, micro: int) -> Any:
        """Draw the batch of a micro batch; the random numbers of its loss follow from the same seed."""
        torch.manual_seed(fill_seed(self.seed, number, micro))
        self.newest = self.task.draw(variant, micro)
        return self.newest

    def _step(self, variant: Any, batches: Iterable[Any]) -> None:
        """Learn from a batch for each micro batch of this process; each is drawn after the backward pass before it."""
        self.optimizer.zero_grad(set_to_none=True)  # a recording that failed leaves gradients
        for place, batch in enumerate(batches):
            with self.processes.accumulating(self.module, place == len(self.own) - 1):
                with self.autocast:
                    losses = self.module(variant, batch)
                (losses["loss"] / len(self.own)).backward()
            self._count(losses)
        total = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.recipe.clip:
            nn.utils.clip_grads_with_norm_(self.parameters, self.recipe.clip, total)
        norm = whole(total).detach()
        self._count({"grad_norm": norm})
        finite = norm.isfinite() & (self.bad[1] < BAD_STEPS)  # then the run ends: nothing is learned until it is seen
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # its kernel then changes nothing
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.bad[0] += ~finite
        self.bad[1].copy_((self.bad[1] + 1) * ~finite)

    def _count(self, losses: LossParts) -> None:
        """Add losses to the sums: a scalar counts once, a pair is a sum and a count. Infinite and NaN are left out."""
        names = tuple(losses)
        if names not in self.rows:
            rows = torch.tensor([self.names.index(name) for name in names], device=self.sums.device)
            self.rows[names] = (rows, torch.ones((), device=self.sums.device))
        rows, once = self.rows[names]
        pairs = [value if isinstance(value, tuple) else (value.detach().float(), once) for value in losses.values()]
        sums, counts = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        values = torch.stack([sums, counts], dim=1).double()  # (names, 2)
        self.sums.index_add_(0, rows, torch.where(values.isfinite().all(1, keepdim=True), values, 0.0))

    def numbers(self) -> dict[str, float]:
        """Return the means since the last call, over all processes, and how many steps were skipped."""
        self.processes.add_up(self.sums)
        means = {
            name: total / count for name, (total, count) in zip(self.names, self.sums.tolist(), strict=True) if count
        }
        self.sums.zero_()
        skipped = int(self.bad[0])
        self.bad[0] = 0
        return means | ({"skipped_steps": float(skipped)} if skipped else {})

    def state(self) -> dict[str, tuple[float, float]]:
        """Running sums and counts since the last log line, over all processes."""
        sums = self.sums.clone()
        self.processes.add_up(sums)
        return {name: (total, count) for name, (total, count) in zip(self.names, sums.tolist(), strict=True) if count}

    def load_state(self, sums: dict[str, tuple[float, float]]) -> None:
        """Go on from the `state` of an interrupted run."""
        if self.processes.is_main:  # the sums are those of all processes
            for row, name in enumerate(self.names):
                self.sums[row] = torch.tensor(sums.get(name, (0.0, 0.0)), dtype=self.sums.dtype)

    def check(self, step: int, output: Path) -> None:
        """Save the newest batch and raise InputError where the last ten steps were skipped.

        The device is not waited for. It may be some steps further on by then: they change nothing either.
        """
        row = int(self.seen[1])
        if row < BAD_STEPS:
            return
        checkpoints = output / "checkpoints"
        path = output / f"bad-batch-{step:08d}-{self.processes.index}.safetensors"
        batch = {name: value.detach().cpu().contiguous() for name, value in tensors_of(self.newest).items()}
        with explain_full_disk(
            f"step {step}: {row} steps in a row were skipped, and their newest batch {path}", checkpoints
        ):
            save_file(batch, path)
            make_readable(path)
        raise InputError(
            f"step {step}: the last {row} steps had gradients that are not finite and were skipped; the newest batch"
            f" is in {path}: expected finite numbers, try a lower optimizer.lr"
        )


class Throughput:
    """Steps, samples and operations a second since the last log line."""

    def __init__(self, step: int, seconds: float) -> None:
        self.step, self.seconds = step, seconds
        self.flops = self.samples = 0.0

    def add(self, flops: float, samples: float) -> None:
        """Count the work of one step."""
        self.flops += flops
        self.samples += samples

    def pause(self, seconds: float) -> None:
        """Leave out time that went to saving and evaluation: rates are those of steps."""
        self.seconds += seconds

    def rates(self, step: int, seconds: float, peak: float | None) -> dict[str, float]:
        """Return the rates at a step. With the devices' known peak, `mfu` is the share of it that was used."""
        time = max(seconds - self.seconds, 1e-9)
        rates = {"steps_per_second": (step - self.step) / time, "samples_per_second": self.samples / time}
        return rates | ({"mfu": self.flops / time / peak} if peak and self.flops else {})


def set_kernels() -> None:
    """Set how torch multiplies on a GPU, in all training."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    if find_fast("attention_choice") is None:  # which takes cuDNN's attention only where its gradients are finite
        torch.backends.cuda.enable_cudnn_sdp(False)


def make_optimizer(model: nn.Module, recipe: OptimizerRecipe, device: torch.device) -> torch.optim.AdamW:
    """Make AdamW; only matrices have weight decay."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1 and min(p.shape[:2]) > 1]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    cuda = device.type == "cuda"
    rate = torch.tensor(recipe.lr, device=device) if cuda else recipe.lr  # a tensor, so that graphs read it anew
    return torch.optim.AdamW(groups, lr=rate, betas=recipe.betas, fused=True, capturable=cuda)


def learning_rate(recipe: OptimizerRecipe, step: int, done: float) -> float:
    """Return the rate of a step.

    It warms up linearly over `warmup` steps, and follows a cosine from lr to final * lr as `done` goes from 0 to 1.
    """
    cosine = recipe.final + (1 - recipe.final) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return recipe.lr * min(1.0, (step + 1) / max(1, recipe.warmup)) * cosine


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate, in place where CUDA graphs read it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
