"""CUDA graphs of the sampler's functions: captured when a shape comes again, replayed from then on.

A set is a few hundred kernels of a few microseconds, and launching them one by one takes longer than running them.
`GraphRunner` belongs to a pipeline and is handed to the engine of every request (`engine.py`); `CudaRecorder` is all of
it that needs a GPU. All graphs share their memory: one is replayed at a time, in the order of the calls, whichever
streams and threads those come from.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from nova_video.common.notices import warn_once
from nova_video.fast.engine import Inputs
from nova_video.model.lora import adapter_state

SET_MULTIPLE = 8
MAX_GRAPHS = 512
MAX_BYTES = 2 << 30  # of device memory, by what recordings said that they took of it
MAX_SEEN = 4096  # keys remembered as having come once

log = logging.getLogger(__name__)


@cache
def can_compile(device: torch.device) -> bool:
    """torch.compile works here: it needs a compiler of C and, on a GPU, Triton."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever is missing, the same numbers come without it
        log.warning("blocks are not compiled, and calls are slower: %s", str(error).splitlines()[0])
        return False
    return True


# Recording ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recording:
    """A function's work on the arguments it was recorded with."""

    replay: Callable[[], None]
    output: Tensor
    """Written by every replay, and perhaps overwritten by the next one of another recording."""
    size: int
    """Bytes of memory that were taken for it: what it found there from others is not counted again."""


class Recorder(Protocol):
    """What a `GraphRunner` needs of a device."""

    def record(self, function: Callable[..., Tensor], arguments: Inputs) -> Recording:
        """Raises RuntimeError where a function cannot be recorded."""
        ...

    def in_turn(self) -> AbstractContextManager[None]:
        """Work launched inside starts when that of the last such block is done."""
        ...

    def wait(self) -> None:
        """Until nothing recorded runs any more."""
        ...

    def renew(self) -> None:
        """No recording is left: the next one starts from nothing."""
        ...


class CudaRecorder:
    """CUDA graphs that share one pool of memory.

    A recording's size is what the pool grew by. Not counted: what the driver keeps of a graph, and whatever else this
    process or another one takes meanwhile. A pool gives memory back when the last of its graphs is gone; until then,
    what a dropped graph leaves serves the next ones.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._last: torch.cuda.Event | None = None
        self.renew()

    def renew(self) -> None:
        """A pool of its own for what comes next: torch lets no one record into a pool whose graphs are all gone, nor
        into one in which a recording failed."""
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, function: Callable[..., Tensor], arguments: Inputs) -> Recording:
        held = self._held()
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    output = function(**arguments)
                finally:
                    graph.capture_end()
        except RuntimeError:
            torch.cuda.synchronize(self.device)
            abandon_recording(self.device, self._pool)
            self.renew()
            raise
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        return Recording(graph.replay, output, self._held() - held)

    def _held(self) -> int:
        """Bytes of the pool."""
        return sum(segment["total_size"] for segment in torch.cuda.memory_snapshot(self._pool))

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        stream = torch.cuda.current_stream(self.device)
        if self._last is not None:
            stream.wait_event(self._last)
        yield
        self._last = stream.record_event()

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)


def abandon_recording(device: torch.device, pool: tuple[int, int]) -> None:
    """What torch does at a recording's end, and leaves undone where it failed: memory is taken from the pool no longer,
    and the device's default generator, which would refuse every draw, goes on from a copy of where it is."""
    index = torch.cuda.current_device() if device.index is None else device.index
    with suppress(RuntimeError):  # where the recording did end
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())


# Running --------------------------------------------------------------------------------------------------------------


@dataclass
class Buffer:
    """Where recordings read an input: shared by all that have one of this name and shape."""

    memory: Tensor
    source: Tensor | None = None
    """What it holds a copy of: not copied again as long as it is the same, unchanged."""
    version: int = -1

    def fill(self, source: Tensor) -> None:
        version = -2 if source.is_inference() else source._version  # tensors of inference mode count no changes
        if self.source is not source or self.version != version or version == -2:
            self.memory.copy_(source)
            self.source, self.version = source, version


def fill(buffers: Mapping[str, Buffer], inputs: Inputs) -> None:
    """Inputs of the same names into their buffers; those that are None have none."""
    for name, buffer in buffers.items():
        source = inputs[name]
        assert source is not None
        buffer.fill(source)


@dataclass(frozen=True)
class Entry:
    """A recording and what it reads."""

    recording: Recording
    inputs: dict[str, Buffer]


class GraphRunner:
    """Runs functions of tensors: calls them the first time that a key and shapes come, then records and replays."""

    set_multiple = SET_MULTIPLE

    def __init__(
        self,
        recorder: Recorder,
        compiled: bool = True,
        fused: bool = True,
        max_graphs: int = MAX_GRAPHS,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.recorder, self.compiled, self.fused = recorder, compiled, fused
        self.max_graphs, self.max_bytes = max_graphs, max_bytes
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._seen: OrderedDict[Hashable, bool] = OrderedDict()  # False: it cannot be recorded
        self._buffers: dict[Hashable, Buffer] = {}
        self._weights: tuple[Hashable, ...] = ()
        self._told = not compiled
        self._lock = threading.RLock()  # what belongs together is launched together

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """Bytes of device memory that were taken for the graphs."""
        return sum(entry.recording.size for entry in self._entries.values())

    def use(self, model: torch.nn.Module) -> None:
        """Graphs read weights where they were, and keep adapters' scales: those of others are let go."""
        weights = (*(weight.data_ptr() for weight in (*model.parameters(), *model.buffers())), adapter_state(model))
        with self._lock:
            if self._weights not in ((), weights):
                self.release()
            self._weights = weights

    def release(self) -> None:
        """Let go of all graphs and their memory."""
        with self._lock:
            self._drop(len(self))
            self._seen.clear()

    def __call__(self, key: tuple[object, ...], function: Callable[..., Tensor], inputs: Inputs) -> Tensor:
        full = (key, *((name, None if x is None else (x.shape, x.dtype)) for name, x in inputs.items()))
        with self._lock, self.recorder.in_turn():
            entry = self._entries.get(full) or self._record(str(key[0]), full, function, inputs)
            if entry is None:
                return function(**inputs)
            self._entries.move_to_end(full)
            fill(entry.inputs, inputs)
            entry.recording.replay()
            return entry.recording.output.clone()

    def _record(self, what: str, key: Hashable, function: Callable[..., Tensor], inputs: Inputs) -> Entry | None:
        """None the first time, and for what cannot be recorded."""
        if key not in self._seen:
            if not self._told:
                log.info("compiling for this GPU: the first call takes up to a minute longer")
                self._told = True
            self._seen[key] = True
            if len(self._seen) > MAX_SEEN:
                self._seen.popitem(last=False)
            return None
        if not self._seen[key]:
            return None
        self._make_room()
        buffers = {name: self._buffer(name, source) for name, source in inputs.items() if source is not None}
        arguments = {name: None if source is None else buffers[name].memory for name, source in inputs.items()}
        fill(buffers, inputs)
        try:
            recording = self.recorder.record(function, arguments)
        except RuntimeError as error:
            self._seen[key] = False
            warn_once(f"{what} is not captured, and computed step by step instead: {str(error).splitlines()[0]}")
            return None
        self._entries[key] = Entry(recording, buffers)
        return self._entries[key]

    def _buffer(self, name: str, like: Tensor) -> Buffer:
        key = (name, like.shape, like.dtype)
        if key not in self._buffers:
            self._buffers[key] = Buffer(torch.empty(like.shape, dtype=like.dtype, device=like.device))
        return self._buffers[key]

    def _make_room(self) -> None:
        """Before one more: drop the graphs that were longest not used."""
        count, size = len(self), self.size
        for entry in self._entries.values():
            if count < self.max_graphs and size <= self.max_bytes:
                break
            count, size = count - 1, size - entry.recording.size
        if count < len(self):
            self._drop(len(self) - count)

    def _drop(self, count: int) -> None:
        """The oldest graphs, and buffers that only they had."""
        self.recorder.wait()
        for _ in range(count):
            self._entries.popitem(last=False)
        used = {id(buffer) for entry in self._entries.values() for buffer in entry.inputs.values()}
        self._buffers = {key: buffer for key, buffer in self._buffers.items() if id(buffer) in used}
        if not self._entries:
            self.recorder.renew()
