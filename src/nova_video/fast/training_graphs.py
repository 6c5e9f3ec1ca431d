"""Training steps as CUDA graphs: a variant is called the first time, recorded the second and replayed from then on.

Launching the kernels of a step one by one takes longer than running them, where the model or the batch is small. A
graph reads its batch from where the recorded step did: batches are copied there before. `CudaRecorder` is all of it
that needs a GPU. Used by `trainer.py`.
"""

import logging
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from nova_video.common.errors import InputError

log = logging.getLogger(__name__)

B = TypeVar("B")

RESERVE = 2 * 2**30
"""Bytes of a device that recordings leave free. What a step computes they share with steps that are called; but each
takes some for itself, and sizes that differ leave gaps."""


def tensors_of(batch: Any) -> dict[str, Tensor]:
    """A batch's tensors by name: of a dataclass or a mapping."""
    named = {f.name: getattr(batch, f.name) for f in fields(batch)} if is_dataclass(batch) else dict(batch)
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


class Recorder(Protocol):
    """What `StepGraphs` needs of a device."""

    def call(self, work: Callable[[], None]) -> bool:
        """Do the work, ready to be recorded later. Whether it made something that stays: recordings from before do not
        know of it, and would overwrite it."""
        ...

    def has_room(self) -> bool:
        """Whether there is memory for one more recording."""
        ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record the work, which was called before, without doing it; what is returned does it.

        Raises RuntimeError where it cannot be recorded.
        """
        ...

    def release(self) -> None:
        """Give back the memory that calls and recordings have computed in; the recordings are gone."""
        ...


class CudaRecorder:
    """CUDA graphs that share one pool of memory, with each other and with what is called: between two of them nothing
    in it is needed but what a call has made to stay.

    What is called runs on the stream that is recorded from, so that what it keeps for that stream (the allocator's
    memory, cuBLAS's workspace) serves all calls; and backward passes in its own thread, whose memory is of the pool.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.MemPool()
        self._recorded = False

    def call(self, work: Callable[[], None]) -> bool:
        before = self._in_use() if self._recorded else None
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(self._pool, self.device.index), one_thread():
            work()
        current.wait_stream(self._stream)
        return before is not None and not self._in_use() <= before

    def _in_use(self) -> set[int]:
        """Addresses of what is allocated in the pool."""
        blocks = (block for segment in self._pool.snapshot() for block in segment["blocks"])
        return {block["address"] for block in blocks if block["state"] == "active_allocated"}

    def has_room(self) -> bool:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(self.device)[0]
        if free < RESERVE:
            log.info("recordings leave %.2f GiB free: %.2f are", RESERVE / 2**30, free / 2**30)
        return free >= RESERVE

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self._stream), one_thread():
            pool: Any = self._pool.id
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # NCCL's thread asks for events
            try:
                work()
            finally:
                graph.capture_end()
        self._recorded = True
        return graph.replay

    def release(self) -> None:
        torch.cuda.synchronize(self.device)
        self._pool, self._recorded = torch.cuda.MemPool(), False
        torch.cuda.empty_cache()


def one_thread() -> Any:
    """Backward passes in the thread that asks for them."""
    return torch.autograd.set_multithreading_enabled(False)


class StepGraphs:
    """Steps of many variants, each recorded when it comes up again, for as long as there is room.

    The work of a step may draw random numbers from the device's default generator, whose seed graphs read anew, and
    reads nothing else that changes but tensors that stay where they are.
    """

    def __init__(self, recorder: Recorder, agree: Callable[[bool], bool] | None = None) -> None:
        """`agree` tells whether something holds for all processes, where several take a step together: they record the
        same steps."""
        self.recorder, self.agree = recorder, agree
        self.recording = True
        """Whether more are recorded: others are called every time."""
        self._inputs: dict[Hashable, Any] = {}  # by layout: the batch that steps read
        self._called: set[Hashable] = set()
        self._replays: dict[Hashable, Callable[[], None]] = {}

    def __len__(self) -> int:
        """How many are recorded."""
        return len(self._replays)

    def __call__(self, variant: Hashable, batch: B, work: Callable[[B], None]) -> None:
        """Do `work` on a batch: always the same work of a variant and of a batch's shapes."""
        tensors = tensors_of(batch)
        layout = tuple((name, value.shape, value.dtype) for name, value in tensors.items())
        if layout not in self._inputs:
            own: Any = {name: value.clone() for name, value in tensors.items()}
            self._inputs[layout] = replace(batch, **own) if is_dataclass(batch) else own  # type: ignore[type-var]
        given = self._inputs[layout]
        for name, value in tensors_of(given).items():
            value.copy_(tensors[name])  # in the order of the stream: after the step before
        key, call = (variant, layout), partial(work, given)
        if key in self._called and key not in self._replays and self.recording:
            self._record(key, call)
        if key in self._replays:
            self._replays[key]()
        else:
            stays = self.recorder.call(call)
            if self._replays and not self._all(not stays):
                self._replays.clear()
            self._called.add(key)

    def release(self) -> None:
        """Let go of the recordings, and of the memory for steps: all are recorded anew when they come up again."""
        self._replays.clear()
        self.recorder.release()

    def _all(self, holds: bool) -> bool:
        """Whether it holds here and for all others."""
        return holds if self.agree is None else self.agree(holds)

    def _record(self, key: Hashable, call: Callable[[], None]) -> None:
        self.recording = self._all(self.recorder.has_room())
        if not self.recording:
            log.info("%d variants of steps are recorded; the device's memory is kept for others", len(self))
            return
        try:
            self._replays[key] = self.recorder.record(call)
        except RuntimeError as error:
            what = str(error).splitlines()[0]
            if self.agree is not None:  # the others have recorded it, and what they send has no end here
                raise InputError(f"a step could not be recorded: {what}; expected cuda_graph = false here") from error
            self.recording = False
            log.warning("steps are not recorded, and computed one by one: %s", what)
