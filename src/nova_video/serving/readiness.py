"""The readiness of a server: what it does now, and what is wrong with it."""

import threading
from collections.abc import Callable, Mapping

Check = Callable[[], str | None]
"""Returns what is wrong, or None."""


class Readiness:
    """The stage of a server, and its checks. It is read by any thread."""

    def __init__(self, checks: Mapping[str, Check] | None = None) -> None:
        self._lock = threading.Lock()
        self._stage = "starting"
        self._checks = dict(checks or {})

    def enter(self, stage: str) -> None:
        """The next stage: "starting", "warming up", "ready" or "shutting down", which is the last one."""
        with self._lock:
            if self._stage != "shutting down":
                self._stage = stage

    @property
    def is_closing(self) -> bool:
        with self._lock:
            return self._stage == "shutting down"

    def problem(self) -> str | None:
        """Why the server is not ready, in one line; None: it is."""
        with self._lock:
            if self._stage != "ready":
                return f"the server is {self._stage}"
        for name, check in self._checks.items():
            try:
                found = check()
            except Exception as error:  # a probe is answered whatever is broken
                found = f"{type(error).__name__}: {error}"
            if found is not None:
                return f"{name}: {found}"
        return None
