"""Measures that Prometheus reads at /metrics: requests, the queue, seconds by stage, frames, and memory."""

import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from nova_video.serving.jobs import Job, Status

REQUEST_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.5, 1, 5, 30, 120)
STAGE_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


@dataclass(frozen=True)
class _Moments:
    """The times at which things of a running job were seen."""

    first_set: float | None = None
    last_frame: float | None = None


class ServerMetrics:
    """Counts what happens in a server. It is told of requests and of jobs, and asks the store for the rest."""

    def __init__(self, count_jobs: Callable[[], Mapping[str, int]]) -> None:
        """`count_jobs` tells how many jobs there are of each status."""
        self.registry = CollectorRegistry()
        self.requests = Histogram(
            "nova_request_seconds",
            "Seconds until a request was answered as a whole.",
            ("method", "route", "status"),
            buckets=REQUEST_SECONDS,
            registry=self.registry,
        )
        self.stages = Histogram(
            "nova_stage_seconds",
            "Seconds of each stage of a job: queue, first_preview and first_frame (both since the job was created), run"
            " (since it began), write (after the last frame) and total.",
            ("stage", "kind"),
            buckets=STAGE_SECONDS,
            registry=self.registry,
        )
        self.ended = Counter("nova_jobs_ended", "Jobs that ended.", ("kind", "status", "code"), registry=self.registry)
        self.frames = Counter("nova_frames", "Pixel frames that were made.", ("kind",), registry=self.registry)
        self.sets = Counter("nova_sets", "Sets of tokens that were sampled.", ("kind",), registry=self.registry)
        self.registry.register(_Present(count_jobs, self._rates))
        self._lock = threading.Lock()
        self._running: dict[str, _Moments] = {}
        self._recent: list[tuple[float, int]] = []

    def see_request(self, scope: MutableMapping[str, Any], status: int, seconds: float) -> None:
        """Counts one request that ended."""
        route = getattr(scope.get("route"), "path", "other")
        self.requests.labels(scope.get("method", "WEBSOCKET"), route, str(status)).observe(seconds)

    def see_set(self, job: Job) -> None:
        """Counts one set of tokens of a job."""
        self.sets.labels(job.kind).inc()
        with self._lock:
            moments = self._running.get(job.id, _Moments())
            is_first = moments.first_set is None
            self._running[job.id] = replace(moments, first_set=moments.first_set or time.time())
        if is_first:
            self._stage("first_preview", job, time.time() - job.created_at)

    def see_frames(self, job: Job, count: int) -> None:
        """Counts pixel frames that are in the job's folder."""
        now = time.time()
        self.frames.labels(job.kind).inc(count)
        with self._lock:
            moments = self._running.get(job.id, _Moments())
            is_first = moments.last_frame is None
            self._running[job.id] = replace(moments, last_frame=now)
            self._recent = [(at, number) for at, number in self._recent if at > now - 60] + [(now, count)]
        if is_first:
            self._stage("first_frame", job, now - job.created_at)

    def see_status(self, job: Job) -> None:
        """Counts a change of a job's status."""
        if job.status is Status.IN_PROGRESS and job.started_at is not None:
            with self._lock:
                is_new = job.id not in self._running
                self._running.setdefault(job.id, _Moments())
            if is_new:
                self._stage("queue", job, job.started_at - job.created_at)
        if not job.status.ended:
            return
        with self._lock:
            moments = self._running.pop(job.id, None)
        self.ended.labels(job.kind, str(job.status), "" if job.error is None else job.error.code).inc()
        end = job.ended_at or time.time()
        self._stage("total", job, end - job.created_at)
        if job.started_at is not None:
            self._stage("run", job, end - job.started_at)
        if moments is not None and moments.last_frame is not None:
            self._stage("write", job, end - moments.last_frame)

    def text(self) -> bytes:
        """Everything, in the text form of Prometheus."""
        return bytes(generate_latest(self.registry))

    def _stage(self, stage: str, job: Job, seconds: float) -> None:
        self.stages.labels(stage, job.kind).observe(max(seconds, 0.0))

    def _rates(self) -> float:
        """Frames a second in the last minute."""
        now = time.time()
        with self._lock:
            return sum(number for at, number in self._recent if at > now - 60) / 60


class _Present:
    """Gauges that are read when somebody asks."""

    def __init__(self, count_jobs: Callable[[], Mapping[str, int]], rate: Callable[[], float]) -> None:
        self.count_jobs = count_jobs
        self.rate = rate

    def collect(self) -> Iterable[GaugeMetricFamily]:
        counts = self.count_jobs()
        jobs = GaugeMetricFamily("nova_jobs", "Jobs that the server keeps, by status.", labels=["status"])
        for status in Status:
            jobs.add_metric([str(status)], counts.get(str(status), 0))
        yield jobs
        yield GaugeMetricFamily("nova_queue_length", "Jobs that wait.", counts.get("queued", 0))
        yield GaugeMetricFamily("nova_frames_per_second", "Frames a second, over the last minute.", self.rate())
        memory = GaugeMetricFamily("nova_memory_bytes", "Memory in use, and the most so far.", labels=["kind"])
        for kind, number in memory_in_use().items():
            memory.add_metric([kind], number)
        yield memory


def memory_in_use() -> dict[str, int]:
    """Bytes of this process, and of its GPU where it has one."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"process_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    status = Path("/proc/self/statm")
    if status.is_file():
        found["process"] = int(status.read_text().split()[1]) * resource.getpagesize()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["gpu"] = torch.cuda.memory_allocated()
        found["gpu_reserved"] = torch.cuda.memory_reserved()
        found["gpu_peak"] = torch.cuda.max_memory_allocated()
    return found
