"""Chooses the engine of a call, and keeps its captured graphs and the 8 bit copy for the pipeline."""

import threading
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, cast

import torch

from nova_video.common.errors import InputError
from nova_video.common.fast_parts import find_fast, require_fast
from nova_video.common.notices import warn_once
from nova_video.model import NOVATransformer3DModel
from nova_video.model.casting import is_cast
from nova_video.model.lora import adapter_state
from nova_video.pipeline.offload import execution_device, takes_turns
from nova_video.sampling.engine import Engine, PlainEngine

if TYPE_CHECKING:
    from nova_video.fast.graphs import GraphRunner


class Engines:
    """Makes the engines of a pipeline's calls and keeps what the calls share. Threads may use it together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._graphs: dict[tuple[torch.device, bool], GraphRunner] = {}  # by device, and whether in 8 bits
        self._fp8: tuple[Hashable, NOVATransformer3DModel] | None = None  # with a key of the weights it was made of
        self._compiled = False  # blocks, for a call of this pipeline

    def engine(
        self, model: NOVATransformer3DModel, compile: bool, fp8: bool = False, offloaded: bool = False
    ) -> Engine:
        """How the sets of one call are computed. `offloaded`: parts of the pipeline take turns on the device."""
        device = execution_device(model)
        made = self.fp8_model(model, offloaded) if fp8 else model
        fast = find_fast("fast_engine") if compile else None
        if fast is None:
            return PlainEngine(made)
        if device.type != "cuda" or is_cast(made):  # blocks that cast their weights are called as they are
            return cast(Engine, fast.FastEngine(made, fast.DirectRunner()))
        graphs_of = require_fast("graphs", "compile")
        compiles = graphs_of.can_compile(device)
        with self._lock:
            self._compiled |= compiles
            if offloaded and not takes_turns(model):
                warn_once("the library moves the weights: blocks are compiled, but nothing is captured in graphs")
                return cast(Engine, fast.FastEngine(made, fast.DirectRunner(compiles)))
            if (device, fp8) not in self._graphs:
                self._graphs[device, fp8] = graphs_of.GraphRunner(graphs_of.CudaRecorder(device), compiles)
            graphs = self._graphs[device, fp8]
            graphs.use(made)
            return cast(Engine, fast.FastEngine(made, graphs))

    def fp8_model(self, model: NOVATransformer3DModel, offloaded: bool = False) -> Any:
        """The transformer with products in 8 bits, made once for the weights that are there."""
        if is_cast(model):
            raise InputError("fp8 is True with layerwise casting: expected one of them")
        if offloaded:
            raise InputError("fp8 needs the transformer to stay on the GPU: expected no offloading with it")
        pointers = tuple(weight.data_ptr() for weight in model.parameters())
        weights = (pointers, adapter_state(model))
        with self._lock:
            if self._fp8 is None or self._fp8[0] != weights:
                self._fp8 = weights, require_fast("fp8", "fp8").with_fp8_blocks(model)
            return self._fp8[1]

    @property
    def num_graphs(self) -> int:
        """Number of captured graphs."""
        return sum(len(graphs) for graphs in self._graphs.values())

    def drop_graphs(self) -> None:
        """Drop captured graphs and their memory; compiled code stays."""
        for graphs in list(self._graphs.values()):
            graphs.release()

    def drop_copies(self) -> None:
        """Drop the 8 bit copy, after weights have changed in place."""
        with self._lock:
            self._fp8 = None

    def release(self) -> None:
        """Drop graphs, copies and compiled code, the last by `torch.compiler.reset` for the whole process."""
        self.drop_graphs()
        with self._lock:
            self._graphs.clear()
            self._fp8 = None
            if self._compiled:
                torch.compiler.reset()
                self._compiled = False
