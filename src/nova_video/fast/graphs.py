"""CUDA graphs: one recorder for sampling and training, and the sampler's functions, replayed when a shape comes again.

A set is a few hundred kernels of a few microseconds, and launching them one by one takes longer than running them.
`CudaRecorder` is all that needs a GPU. `GraphRunner` belongs to a pipeline and is handed to the engine of every request
(`fast_engine.py`); `training_graphs.py` has those of training. All graphs of a recorder share their memory: one is
replayed at a time, in the order of the calls, whichever streams and threads those come from.
"""

import gc
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from nova_video.common.notices import warn_once
from nova_video.fast.arrange import arrange_for_sampling
from nova_video.fast.fast_engine import Inputs
from nova_video.fast.known import fingerprint, patched_function, unknown_part
from nova_video.model import NOVATransformer3DModel
from nova_video.model.lora import adapter_state

SET_MULTIPLE = 8
MAX_GRAPHS = 512
MAX_BYTES = 2 << 30  # of device memory, by what recordings said that they took of it
MAX_SEEN = 4096  # keys remembered as having come once
RESERVE = 2 << 30
"""Bytes of a device that training's recordings leave free. What a step computes they share with steps that are called;
but each takes some for itself, and sizes that differ leave gaps."""

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
    output: Any
    """Tensors that the function returned: every replay writes it, and another recording's replay may overwrite it."""
    size: int
    """Bytes of memory that were taken for it: what it found there from others is not counted again."""


class CudaRecorder:
    """CUDA graphs that share one pool of memory, with each other and with what `call` calls.

    One graph or call runs at a time, so that nothing in the pool is needed between two of them but what a call made to
    stay. A recording's size is what the pool grew by. Not counted: what the driver keeps of a graph, and whatever else
    this process or another one takes meanwhile. Calls run on the stream that is recorded from, so that what the
    allocator and cuBLAS keep for that stream serves all of them. Tests have a stand-in with the same methods.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._last: torch.cuda.Event | None = None
        self._pool = new_pool(device)
        self._retired: list[torch.cuda.MemPool] = []
        self._recorded = False

    def renew(self) -> None:
        """Take a new pool for what comes next. The old one is kept until its graphs are gone, as torch wants it."""
        self._retired = [pool for pool in (*self._retired, self._pool) if pool.use_count() > 1]
        self._pool, self._recorded = new_pool(self.device), False

    def record(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Recording:
        """Record a function that was called before, without doing its work. Raises RuntimeError where it cannot."""
        held = self._held()
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream), one_thread():
                output = capture(graph, self._pool.id, partial(function, **arguments))
        except BaseException:
            with suppress(RuntimeError):  # the first error is raised, not one that follows from it
                torch.cuda.synchronize(self.device)
            abandon_recording(self.device, self._pool.id)
            self.renew()
            raise
        current.wait_stream(self._stream)
        self._recorded = True
        return Recording(graph.replay, output, self._held() - held)

    def call(self, function: Callable[[], None]) -> bool:
        """Call a function in the memory that recordings compute in. True if it made something that stays there:
        earlier recordings do not know of it, and would overwrite it."""
        before = self._in_use() if self._recorded else None
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(self._pool, self.device.index), one_thread():
            function()
        current.wait_stream(self._stream)
        return before is not None and not self._in_use() <= before

    def _held(self) -> int:
        """Bytes of the pool."""
        return sum(segment["total_size"] for segment in self._pool.snapshot())

    def _in_use(self) -> set[int]:
        """Addresses of what is allocated in the pool."""
        blocks = (block for segment in self._pool.snapshot() for block in segment["blocks"])
        return {block["address"] for block in blocks if block["state"] == "active_allocated"}

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Work launched inside starts when that of the last such block is done."""
        stream = torch.cuda.current_stream(self.device)
        if self._last is not None:
            stream.wait_event(self._last)
        yield
        self._last = stream.record_event()

    def has_room(self) -> bool:
        """True if there is memory for one more recording."""
        self.wait()
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(self.device)[0]
        if free < RESERVE:
            log.info("recordings leave %.2f GiB free: %.2f are", RESERVE / 2**30, free / 2**30)
        return free >= RESERVE

    def wait(self) -> None:
        """Return when nothing recorded runs any more."""
        torch.cuda.synchronize(self.device)


def capture(graph: torch.cuda.CUDAGraph, pool: Any, function: Callable[[], Any]) -> Any:
    """Capture what a function launches. The first error is the one that is raised: ending a capture that an error has
    broken raises another one, which says less."""
    with without_collection():
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # NCCL's thread asks for events
        try:
            output = function()
        except BaseException:
            with suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
    return output


@contextmanager
def without_collection() -> Iterator[None]:
    """Keep Python from collecting cycles: a pool or graph among them would free device memory, which no capture may."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def abandon_recording(device: torch.device, pool: tuple[int, int]) -> None:
    """Do what torch does at a recording's end, and leaves undone where it failed.

    Memory is taken from the pool no longer, and the device's default generator, which would refuse every draw, goes on
    from a copy of where it is.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    with suppress(RuntimeError):  # where the recording did end
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())


def new_pool(device: torch.device) -> torch.cuda.MemPool:
    """A pool of memory on the device."""
    with torch.cuda.device(device):
        return torch.cuda.MemPool()


def one_thread() -> AbstractContextManager[None]:
    """Backward passes run in the thread that asks for them: what they allocate is then of the pool."""
    context: AbstractContextManager[None] = torch.autograd.set_multithreading_enabled(False)
    return context


# Running --------------------------------------------------------------------------------------------------------------


@dataclass
class Buffer:
    """Where recordings read an input: shared by all that have one of this name and shape."""

    memory: Tensor
    source: Tensor | None = None
    """The tensor that it holds a copy of, which is not copied again while it stays unchanged."""
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
class CapturedFunction:
    """A recording and what it reads."""

    recording: Recording
    inputs: dict[str, Buffer]


class GraphRunner:
    """Runs functions of tensors: calls them the first time that a key and shapes come, then records and replays."""

    set_multiple = SET_MULTIPLE

    def __init__(
        self,
        recorder: CudaRecorder,
        compiled: bool = True,
        fused: bool = True,
        max_graphs: int = MAX_GRAPHS,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.recorder, self.compiled, self.fused = recorder, compiled, fused
        self.max_graphs, self.max_bytes = max_graphs, max_bytes
        self._entries: OrderedDict[Hashable, CapturedFunction] = OrderedDict()
        self._seen: OrderedDict[Hashable, bool] = OrderedDict()  # False: it cannot be recorded
        self._buffers: dict[Hashable, Buffer] = {}
        self._captured: tuple[Hashable, ...] = ()
        self._arranged: tuple[NOVATransformer3DModel, NOVATransformer3DModel] | None = None  # of which model, and it
        self._unknown: tuple[str | None] | None = None  # what is unknown about the model in use, if that was asked
        self._announced = not compiled
        self._lock = threading.RLock()  # what belongs together is launched together

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """Bytes of device memory that were taken for the graphs."""
        return sum(entry.recording.size for entry in self._entries.values())

    def use(self, model: NOVATransformer3DModel) -> None:
        """Let go of graphs of other weights, modules or adapters' scales: graphs keep what they were captured with."""
        captured = (fingerprint(model), adapter_state(model))
        with self._lock:
            if self._captured != captured:
                if self._captured:
                    self.release()
                self._captured, self._arranged, self._unknown = captured, None, None

    def arranged(self, model: NOVATransformer3DModel) -> NOVATransformer3DModel:
        """The arranged copy of a model, made once for the modules that are in use: making one takes milliseconds."""
        if not self.compiled:
            return model
        with self._lock:
            if self._arranged is None or self._arranged[0] is not model:
                self._arranged = model, arrange_for_sampling(model)
            return self._arranged[1]

    def unknown(self, model: NOVATransformer3DModel) -> str | None:
        """The answer of `unknown_part`, which is looked up once for the modules and hooks that `use` saw."""
        if patched_function() is not None or not self._captured:
            return unknown_part(model)
        with self._lock:
            if self._unknown is None:
                self._unknown = (unknown_part(model),)
            return self._unknown[0]

    def release(self) -> None:
        """Let go of all graphs and their memory."""
        with self._lock:
            self._drop(len(self))
            self._seen.clear()
            self._arranged = None

    def __call__(self, key: tuple[object, ...], function: Callable[..., Tensor], inputs: Inputs) -> Tensor:
        full = (key, *((name, None if x is None else (x.shape, x.dtype)) for name, x in inputs.items()))
        with self._lock, self.recorder.in_turn():
            entry = self._entries.get(full) or self._record(str(key[0]), full, function, inputs)
            if entry is None:
                return function(**inputs)
            self._entries.move_to_end(full)
            fill(entry.inputs, inputs)
            entry.recording.replay()
            output: Tensor = entry.recording.output
            return output.clone()

    def _record(
        self, what: str, key: Hashable, function: Callable[..., Tensor], inputs: Inputs
    ) -> CapturedFunction | None:
        """None the first time, and for what cannot be recorded."""
        if key not in self._seen:
            if not self._announced:
                log.info("compiling for this GPU: the first call takes up to a minute longer")
                self._announced = True
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
        self._entries[key] = CapturedFunction(recording, buffers)
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
