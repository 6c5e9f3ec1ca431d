"""A lock for a loop that holds it nearly all the time: others get it in between."""

import threading
from contextlib import AbstractContextManager


class FairLock(AbstractContextManager[None]):
    """A lock that goes to whoever waits for it, before the thread that gave it back can take it again.

    With a plain lock, a loop that takes it anew at once may keep a waiting thread out for as long as it runs.
    """

    def __init__(self) -> None:
        self._gate, self._lock = threading.Lock(), threading.Lock()

    def __enter__(self) -> None:
        with self._gate:  # who waits for the lock holds the gate, before which the loop then waits
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
