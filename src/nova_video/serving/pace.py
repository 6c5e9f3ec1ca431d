"""A session without end is made while somebody watches it, and not further ahead than its viewers need."""

import asyncio
import time
from types import TracebackType

from nova_video.serving.jobs import Job
from nova_video.serving.service import JobService

LOOK = 0.25  # seconds after which more is allowed, if the viewer has played on


class Pace:
    """Follows one viewer. Frames are played at `fps` while there are some, unless the viewer tells how far it is."""

    def __init__(self, fps: float, first: int, now: float) -> None:
        """The viewer begins to play at frame `first`, as soon as it has that."""
        self.fps = fps
        self.sent = first
        """The frames before this one were taken by the viewer's connection."""
        self._played = float(first)
        self._told = False
        self._at = now

    def send(self, stop: int, now: float) -> None:
        self.played(now)
        self.sent = max(self.sent, stop)

    def tell(self, played: int, now: float) -> None:
        """The viewer itself says how many frames it has played: from now on that counts, and no clock."""
        self._played = float(min(max(played, self.played(now)), self.sent))
        self._told = True

    def played(self, now: float) -> float:
        """Frames played so far."""
        if not self._told:
            self._played = min(float(self.sent), self._played + (now - self._at) * self.fps)
        self._at = now
        return self._played


class Pacemaker:
    """Lets a session go on while the block of one viewer runs, so far ahead as the settings say. Others need none."""

    def __init__(self, service: JobService, job: Job) -> None:
        self.service, self.job = service, job
        self.fps = float(job.settings["fps"])
        self._pace: Pace | None = None
        self._task: asyncio.Task[None] | None = None

    def begin(self, first: int) -> None:
        """The viewer begins with frame `first`."""
        if self._pace is None:
            self._pace = Pace(self.fps, first, time.monotonic())
            if self.job.allowed is not None:
                self._task = asyncio.create_task(self._keep(self._pace))

    def send(self, stop: int) -> None:
        """The frames before `stop` were taken by the viewer's connection."""
        if self._pace is not None:
            self._pace.send(stop, time.monotonic())

    def tell(self, played: int) -> None:
        """The viewer says how many frames it has played."""
        if self._pace is not None:
            self._pace.tell(played, time.monotonic())

    async def _keep(self, pace: Pace) -> None:
        allowed = 0
        while True:
            limit = int(pace.played(time.monotonic()) + self.service.settings.lead * self.fps)
            if limit > allowed:
                await asyncio.to_thread(self.service.allow, self.job.id, limit)
                allowed = limit
            await asyncio.sleep(LOOK)

    async def __aenter__(self) -> "Pacemaker":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
