"""Puts a server together: the application behind its guard, with its probes, measures and log, and runs it."""

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

from nova_video.common.errors import first_line
from nova_video.pipeline.pipeline import NovaPipeline
from nova_video.pipeline.request import GenerateRequest
from nova_video.serving.app import create_app
from nova_video.serving.feed import JobEvent
from nova_video.serving.guard import ApiKeys, Guard
from nova_video.serving.logs import log_event
from nova_video.serving.metrics import ServerMetrics
from nova_video.serving.readiness import Readiness
from nova_video.serving.routes_operation import operation_router
from nova_video.serving.serve_settings import ServeSettings
from nova_video.serving.server import make_server
from nova_video.serving.service import JobService


@dataclass(frozen=True)
class GuardedApp:
    """The whole application of one service, for any ASGI server."""

    app: Guard
    service: JobService
    readiness: Readiness

    def start(self, warm: bool = False) -> None:
        """Lets jobs be worked off, after a warm-up if one is asked for. It returns at once."""
        threading.Thread(target=self._start, args=(warm,), name="start", daemon=True).start()

    def _start(self, warm: bool) -> None:
        if warm:
            self.readiness.enter("warming up")
            try:
                warm_up(self.service.pipe)
            except Exception as error:  # the server can work nonetheless, or says at each job why not
                log_event("warm-up failed", error=first_line(error))
        self.service.start()
        self.readiness.enter("ready")
        log_event("ready", model=self.service.model)

    def close(self) -> None:
        """Takes no more jobs, and saves those under way."""
        self.readiness.enter("shutting down")
        self.service.close()


def guarded_app(service: JobService, settings: ServeSettings, keys: ApiKeys | None = None) -> GuardedApp:
    """The application of a service behind its guard, with all routes; `keys` are those of the settings by default."""
    checks = {"worker": _worker_check(service), "database": _database_check(service)}
    readiness = Readiness(checks)
    metrics = ServerMetrics(service.store.counts)
    service.feed.watch(metrics.see_event)
    service.feed.watch(log_job)
    app = create_app(service, settings)
    app.include_router(operation_router(readiness, metrics))
    guard = Guard(app, settings, keys, lambda: readiness.is_closing, (metrics.see_request,))
    return GuardedApp(guard, service, readiness)


def _worker_check(service: JobService) -> Callable[[], str | None]:
    return lambda: None if service.worker.is_alive else "its thread has ended"


def _database_check(service: JobService) -> Callable[[], str | None]:
    def check() -> None:
        service.store.counts()

    return check


def log_job(id: str, event: JobEvent) -> None:
    """Writes one line for every change of a job's status."""
    if event.type != "status":
        return
    job = event.data
    error = None if job["error"] is None else job["error"]["code"]
    paused = True if job["paused"] else None
    facts = {"kind": job["kind"], "frames": job["frames"], "computed": job["computed"], "paused": paused}
    log_event("job", id=id, status=job["status"], error=error, **facts, prompt=job["prompt"])


def warm_up(pipe: NovaPipeline) -> None:
    """Makes one clip or picture as the model's defaults are, which compiles what such jobs need."""
    pipe.start(GenerateRequest(prompt="", seed=0, output_type="np")).run()


def serve(service: JobService, settings: ServeSettings, sock: socket.socket, keys: ApiKeys | None = None) -> None:
    """Serves until SIGINT or SIGTERM, which uvicorn raises again at the end."""
    made = guarded_app(service, settings, keys)
    made.start(settings.warm)
    make_server(made.app, settings, made.close).run(sockets=[sock])
