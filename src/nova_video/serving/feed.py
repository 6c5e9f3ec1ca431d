"""The news of running jobs, from the worker's thread to any number of readers in event loops.

The worker never waits for a reader: each reader has a bounded queue of its own, which drops its oldest news of single
sets when it is full. Fragments are no part of the news but files, which readers take at their own speed.
"""

import asyncio
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

BACKLOG = 256  # news that wait for a slow reader


@dataclass(frozen=True)
class JobEvent:
    """One piece of news: set, frame, fragment, partial, change or status, and its facts as JSON (previews: bytes)."""

    type: str
    data: dict[str, Any] = field(default_factory=dict)


class NewsReader:
    """The news of one job for one reader, who waits in the event loop that made it."""

    def __init__(self, previews: bool) -> None:
        self.previews = previews
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._news: deque[JobEvent] = deque()
        self._lock = threading.Lock()

    def put(self, event: JobEvent) -> None:
        """Hands news over, from any thread."""
        if "preview" in event.data and not self.previews:
            event = JobEvent(event.type, {name: value for name, value in event.data.items() if name != "preview"})
        with self._lock:
            if len(self._news) >= BACKLOG:
                self._drop()
            self._news.append(event)
        with suppress(RuntimeError):  # its loop has ended
            self._loop.call_soon_threadsafe(self._ready.set)

    def _drop(self) -> None:
        """Drops the oldest news of a set, or else the oldest of all."""
        news = self._news
        index = next((index for index, event in enumerate(news) if event.type == "set"), 0)
        del news[index]

    async def next(self, timeout: float) -> JobEvent | None:
        """The next piece of news; None: there was none for so many seconds."""
        while not self._news:
            self._ready.clear()
            if self._news:
                break
            try:
                await asyncio.wait_for(self._ready.wait(), timeout)
            except TimeoutError:
                return None
        with self._lock:
            return self._news.popleft()


class Feed:
    """The readers of every job."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers: defaultdict[str, list[NewsReader]] = defaultdict(list)
        self._watchers: list[Callable[[str, JobEvent], None]] = []

    def open(self, id: str, previews: bool = False) -> NewsReader:
        """A new reader of a job's news from now on."""
        reader = NewsReader(previews)
        with self._lock:
            self._readers[id].append(reader)
        return reader

    def close(self, id: str, reader: NewsReader) -> None:
        with self._lock:
            self._readers[id].remove(reader)
            if not self._readers[id]:
                del self._readers[id]

    def watch(self, watcher: Callable[[str, JobEvent], None]) -> None:
        """Tells a function of all news of all jobs, at once, in the thread that has them. It must be quick."""
        with self._lock:
            self._watchers.append(watcher)

    def post(self, id: str, event: JobEvent) -> None:
        """Tells all readers of a job."""
        for watcher in self._watchers:
            watcher(id, event)
        with self._lock:
            for reader in self._readers.get(id, ()):
                reader.put(event)

    def wants_previews(self, id: str) -> bool:
        with self._lock:
            return any(reader.previews for reader in self._readers.get(id, ()))

    @property
    def num_readers(self) -> int:
        with self._lock:
            return sum(map(len, self._readers.values()))
