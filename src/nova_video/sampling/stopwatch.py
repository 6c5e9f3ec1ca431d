"""Where the time of a call goes: spans by name, on a GPU between events of its stream. Nothing is timed by default."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch

Span = Literal["text", "temporal", "spatial", "denoiser", "vae"]


@dataclass
class Stopwatch:
    """Adds up spans. A span ends when its work is done, not when it is launched; spans do not overlap."""

    device: torch.device
    _events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    _seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def span(self, name: Span) -> Iterator[None]:
        if self.device.type != "cuda":
            start = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - start
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events[name].append((begin, end))

    def seconds(self) -> dict[str, float]:
        """By name, since the start or the last `reset`; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        events = {name: sum(a.elapsed_time(b) for a, b in pairs) / 1000 for name, pairs in self._events.items()}
        return {**self._seconds, **events}

    def reset(self) -> None:
        self._events.clear()
        self._seconds.clear()


@contextmanager
def span(stopwatch: Stopwatch | None, name: Span) -> Iterator[None]:
    """A span of `stopwatch`, or none where nothing is timed."""
    if stopwatch is None:
        yield
        return
    with stopwatch.span(name):
        yield
