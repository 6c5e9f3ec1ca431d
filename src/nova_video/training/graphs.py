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

from nova_video.errors import InputError

log = logging.getLogger(__name__)

B = TypeVar("B")

GIB = 2**30


def tensors_of(batch: Any) -> dict[str, Tensor]:
    """A batch's tensors by name: of a dataclass or a mapping."""
    named = {f.name: getattr(batch, f.name) for f in fields(batch)} if is_dataclass(batch) else dict(batch)
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


class Recorder(Protocol):
    """What `StepGraphs` needs of a device."""

    def call(self, work: Callable[[], None]) -> None:
        """Do the work, ready to be recorded later."""
        ...

    def has_room(self) -> bool:
        """Whether there is memory for one more recording, and then still for calls."""
        ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record the work, which was called before, without doing it; what is returned does it.

        Raises RuntimeError where it cannot be recorded.
        """
        ...


class CudaRecorder:
    """CUDA graphs that share one pool of memory.

    What is called runs on the stream that is recorded from: what it keeps for that stream (the allocator's memory,
    cuBLAS's workspace) serves all calls.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        """`stream`: that to record from, if there is one that modules were made on."""
        self.device = device
        self._stream = stream or torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._most = 0  # bytes that a call has taken for itself

    def call(self, work: Callable[[], None]) -> None:
        held = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)
        self._most = max(self._most, torch.cuda.max_memory_allocated(self.device) - held)

    def has_room(self) -> bool:
        """Recordings keep to themselves what a call takes, all together, and calls take as much again."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)  # by recordings
        free, needed = torch.cuda.mem_get_info(self.device)[0] + kept, 2 * self._most
        if free < needed:
            log.info("one more recording, and calls, need %.2f GiB: %.2f are free", needed / GIB, free / GIB)
        return free >= needed

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")  # NCCL's thread asks for events
            try:
                work()
            finally:
                graph.capture_end()
        return graph.replay


class StepGraphs:
    """Steps of many variants, each recorded when it comes up again, for as long as there is room.

    The work of a step may draw random numbers from the device's default generator, whose seed graphs read anew, and
    reads nothing else that changes but tensors that stay where they are.
    """

    def __init__(self, recorder: Recorder, agree: Callable[[bool], bool] | None = None, calls: int = 1) -> None:
        """`agree` tells whether something holds for all processes, where several take a step together: they record the
        same steps. So many `calls` come before the first recording."""
        self.recorder, self.agree = recorder, agree
        self.calls = calls
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
        if key in self._called and key not in self._replays and self.recording and self.calls <= 0:
            self._record(key, call)
        if key in self._replays:
            self._replays[key]()
        else:
            self.recorder.call(call)
            self._called.add(key)
            self.calls -= 1

    def _record(self, key: Hashable, call: Callable[[], None]) -> None:
        room = self.recorder.has_room()
        self.recording = room if self.agree is None else self.agree(room)
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
