"""Training steps as CUDA graphs: a variant is called the first time, recorded the second and replayed from then on.

Launching the kernels of a step one by one takes longer than running them, where the model or the batch is small. A
graph reads its batch from where the recorded step did: batches are copied there before. `graphs.py` has the recorder.
"""

import logging
from collections.abc import Callable, Hashable
from dataclasses import is_dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch

from nova_video.common.errors import InputError
from nova_video.common.tensors import tensors_of
from nova_video.fast.graphs import CudaRecorder

log = logging.getLogger(__name__)

B = TypeVar("B")


class StepGraphs:
    """Steps of many variants, each recorded when it comes up again, for as long as there is room.

    The work of a step may draw random numbers from the device's default generator, whose seed graphs read anew, and
    reads nothing else that changes but tensors that stay where they are.
    """

    def __init__(self, recorder: CudaRecorder, agree: Callable[[bool], bool] | None = None) -> None:
        """`agree` tells whether something holds for all processes, where several take a step together: they record the
        same steps."""
        self.recorder, self.agree = recorder, agree
        self.recording = True
        """More are recorded; False: others are called every time."""
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
        self.recorder.wait()
        self.recorder.renew()
        torch.cuda.empty_cache()

    def _all(self, holds: bool) -> bool:
        """True if it holds here and for all others."""
        return holds if self.agree is None else self.agree(holds)

    def _record(self, key: Hashable, call: Callable[[], None]) -> None:
        self.recording = self._all(self.recorder.has_room())
        if not self.recording:
            log.info("%d variants of steps are recorded; the device's memory is kept for others", len(self))
            return
        self.recorder.wait()
        try:
            self._replays[key] = self.recorder.record(call, {}).replay
        except RuntimeError as error:
            what = str(error).splitlines()[0]
            if self.agree is not None:  # the others have recorded it, and what they send has no end here
                raise InputError(f"a step could not be recorded: {what}; expected cuda_graph = false here") from error
            self.recording = False
            log.warning("steps are not recorded, and computed one by one: %s", what)
