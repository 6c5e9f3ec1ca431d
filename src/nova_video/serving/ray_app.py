"""`nova serve --engine ray`: the same application as a deployment of Ray Serve, one replica a GPU.

Replicas share one database and one folder. A replica claims the jobs that it computes, sessions among them, and keeps
each until it has ended or been parked; any replica answers any request, since what it has to say is in the database and
the folder. A replica that goes saves its jobs at the next set, and the others go on from the saved states. One that is
killed loses its claims after some seconds, with the same end.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nova_video.common.errors import InputError, Terminated, first_line
from nova_video.common.ray_session import LEAST_CORES, LOCAL, RayNeed, ray_session
from nova_video.pipeline.pipeline import NovaPipeline
from nova_video.serving.guard import ApiKeys
from nova_video.serving.jobs import Status
from nova_video.serving.replica_settings import JOBS, ReplicaPlan, ReplicaSettings, plan_replicas
from nova_video.serving.serve_settings import ServeSettings

NAME = "nova"  # of the application and its deployment
LOOK = 2.0  # seconds between two reports of the queue
UP, DOWN = 4.0, 60.0  # seconds that more, or fewer, replicas are wanted before there are
LATE = 10.0  # seconds beyond the server's own grace until Ray kills a replica


@dataclass(frozen=True)
class ReplicaSource:
    """All that a replica is made of."""

    open_pipe: Callable[[str], NovaPipeline]
    """Opens the model on a device."""
    model: str
    settings: ServeSettings
    keys: ApiKeys
    plan: ReplicaPlan


class Replica:
    """One process that holds the model and answers requests."""

    def __init__(self, source: ReplicaSource) -> None:
        import torch

        from nova_video.serving.launch import guarded_app
        from nova_video.serving.logs import write_lines
        from nova_video.serving.service import JobService

        pipe = source.open_pipe(source.plan.device)
        if source.plan.device == "cpu":
            torch.set_num_threads(source.plan.threads)
        self.service = JobService(pipe, source.settings, source.model)
        write_lines(source.settings)
        self.made = guarded_app(self.service, source.settings, source.keys)
        self.made.start(source.settings.warm)

    def __serve_build_asgi_app__(self) -> Any:
        """The application, as Ray Serve asks for it."""
        return self.made.app

    def check_health(self) -> None:
        """Raises where this replica is to be replaced, as Ray Serve asks for it."""
        problem = self.made.readiness.problem()
        if problem is not None and not problem.startswith("the server is "):  # a stage that it is in
            raise RuntimeError(problem)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The length of the whole queue, as Ray Serve asks for it."""
        counts = self.service.store.counts()
        return {JOBS: float(counts[Status.QUEUED] + counts[Status.IN_PROGRESS] - counts["paused"])}

    def __del__(self) -> None:
        """Saves the jobs under way when Ray Serve ends this replica."""
        if (made := getattr(self, "made", None)) is not None:
            made.close()


@contextmanager
def served_on_ray(
    open_pipe: Callable[[str], NovaPipeline],
    model: str,
    settings: ServeSettings,
    replicas: ReplicaSettings,
    keys: ApiKeys,
    device: str,
) -> Iterator[ReplicaPlan]:
    """The server is up. At the end, that of a Ray of our own is taken down, and its jobs are saved."""
    address = replicas.ray or LOCAL
    if address != LOCAL and (settings.folder is None or settings.database is None):
        raise InputError("a cluster has no folder or no database: expected --folder and --database, which all reach")
    least = max(LEAST_CORES, (replicas.most_replicas or replicas.replicas or 1) * (replicas.threads or 1))
    with ray_session(address, RayNeed("a server", "ray", "--engine local", least, tells=True)):
        try:
            from ray import serve
        except ImportError as error:
            raise InputError(f"a server on Ray needs ray[serve]: {first_line(error)}") from error
        import ray

        found = ray.cluster_resources()
        plan = plan_replicas(replicas, device, int(found.get("CPU", least)), int(found.get("GPU", 0)))
        try:
            serve.start(http_options=_http_options(settings))
            deploy(ReplicaSource(open_pipe, model, settings, keys, plan), replicas.jobs_each)
        except RuntimeError as error:
            serve.shutdown()
            raise InputError(f"no server could be started on Ray: {first_line(error)}") from error
        try:
            yield plan
        finally:
            if address == LOCAL:
                serve.shutdown()


def _http_options(settings: ServeSettings) -> Any:
    from ray.serve.config import HTTPOptions, ProxyLocation

    return HTTPOptions(host=settings.host, port=settings.port, location=ProxyLocation.EveryNode)


def deploy(source: ReplicaSource, jobs_each: float) -> None:
    """Begins to serve, or changes what is served, replica after replica. Waits until it is done."""
    from ray import serve

    plan, settings = source.plan, source.settings
    scaling = {
        "min_replicas": plan.least,
        "max_replicas": plan.most,
        "target_ongoing_requests": jobs_each,
        "metrics_interval_s": LOOK,
        "look_back_period_s": 2 * LOOK,
        "upscale_delay_s": UP,
        "downscale_delay_s": DOWN,
        "policy": {"policy_function": "nova_video.serving.replica_settings:replicas_wanted"},
    }
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=NAME,
        max_ongoing_requests=settings.connections,
        graceful_shutdown_timeout_s=settings.grace + LATE,
        graceful_shutdown_wait_loop_s=1.0,
        logging_config={"log_level": "WARNING", "enable_access_log": False},  # the guard writes a line a request
        ray_actor_options={"num_cpus": plan.threads, "num_gpus": 1 if plan.device == "cuda" else 0},
        **({"num_replicas": plan.least} if plan.least == plan.most else {"autoscaling_config": scaling}),
    )
    serve.run(deployment.bind(source), name=NAME, route_prefix="/")


def wait_for_end() -> None:
    """Waits until Ctrl-C or SIGTERM."""

    def stop(*_: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, stop)  # in place of Ray's handler, which aborts
    while True:
        time.sleep(3600)
