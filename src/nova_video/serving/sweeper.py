"""Removes what is kept no longer, and lets jobs fail that nobody could begin in time."""

import time

from nova_video.serving.jobs import JobError
from nova_video.serving.results import ResultFolder
from nova_video.serving.serve_settings import ServeSettings
from nova_video.serving.store import JobStore

EVERY = 30.0  # seconds between two sweeps
DAY = 86400.0
PREFIXES = ("image_", "session_", "video_")  # of jobs' ids: other folders are not ours


class Sweeper:
    """Sweeps the jobs and the results of a server from time to time."""

    def __init__(self, store: JobStore, results: ResultFolder, settings: ServeSettings) -> None:
        self.store, self.results, self.settings = store, results, settings
        self._next = 0.0
        self._strays: frozenset[str] = frozenset()

    def sweep_if_due(self) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + EVERY
            self.sweep()

    def sweep(self) -> None:
        """Removes jobs whose time is over or that were paused for as long, and folders of no job.

        A folder is removed when two sweeps in a row find no job of its name: a request may just be being written down.
        """
        now, kept = time.time(), self.settings.keep_days * DAY
        message = f"nobody could begin the job within {self.settings.deadline:g} seconds"
        self.store.fail_late(now, JobError("deadline", message), now + kept)
        for job in self.store.expired(now, paused_before=now - kept):
            ended = job if job.status.ended else self.store.want(job.id, "cancel", now)
            if ended is not None and ended.status.ended:
                self.results.remove(job.id)
                self.store.remove(job.id)
        ids = [id for id in self.results.ids() if id.startswith(PREFIXES)]
        strays = frozenset(ids) - self.store.known(ids)
        for id in strays & self._strays:
            self.results.remove(id)
        self._strays = strays
