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

from nova_video.serving.feed import JobEvent
from nova_video.serving.jobs import Status

REQUEST_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.5, 1, 5, 30, 120)
MINUTE = 60
STAGE_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


@dataclass(frozen=True)
class JobMoments:
    """The times at which things of a running job were seen."""

    kind: str
    created_at: float
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
        self.registry.register(PresentGauges(count_jobs, self._rate))
        self._lock = threading.Lock()
        self._running: dict[str, JobMoments] = {}
        self._recent: list[tuple[float, int]] = []

    def see_request(self, scope: MutableMapping[str, Any], status: int, seconds: float) -> None:
        """Counts one request that ended."""
        route = getattr(scope.get("route"), "path", "other")
        self.requests.labels(scope.get("method", "WEBSOCKET"), route, str(status)).observe(seconds)

    def see_event(self, id: str, event: JobEvent) -> None:
        """Counts one piece of news of a job."""
        now = time.time()
        if event.type == "status":
            self._see_status(id, event.data, now)
            return
        with self._lock:
            before = self._running.get(id)
            if before is None:
                return
            if event.type == "set":
                self._running[id] = replace(before, first_set=before.first_set or now)
            elif event.type == "fragment":
                self._running[id] = replace(before, last_frame=now)
                self._recent = [*self._latest(now), (now, event.data["frames"])]
        if event.type == "set":
            self.sets.labels(before.kind).inc()
            if before.first_set is None:
                self._stage("first_preview", before.kind, now - before.created_at)
        elif event.type == "fragment":
            self.frames.labels(before.kind).inc(event.data["frames"])
            if before.last_frame is None:
                self._stage("first_frame", before.kind, now - before.created_at)

    def _see_status(self, id: str, job: Mapping[str, Any], now: float) -> None:
        ended = Status(job["status"]).ended
        with self._lock:
            before = self._running.pop(id, None)
            if not ended and job["started_at"] is not None:
                self._running[id] = before or JobMoments(job["kind"], job["created_at"])
        if before is None and job["started_at"] is not None:
            self._stage("queue", job["kind"], job["started_at"] - job["created_at"])
        if not ended:
            return
        code = "" if job["error"] is None else job["error"]["code"]
        self.ended.labels(job["kind"], job["status"], code).inc()
        self._stage("total", job["kind"], now - job["created_at"])
        if job["started_at"] is not None:
            self._stage("run", job["kind"], now - job["started_at"])
        if before is not None and before.last_frame is not None:
            self._stage("write", job["kind"], now - before.last_frame)

    def text(self) -> bytes:
        """Everything, in the text form of Prometheus."""
        return bytes(generate_latest(self.registry))

    def _stage(self, stage: str, kind: str, seconds: float) -> None:
        self.stages.labels(stage, kind).observe(max(seconds, 0.0))

    def _latest(self, now: float) -> list[tuple[float, int]]:
        """Times and numbers of the frames of the last minute."""
        return [(at, number) for at, number in self._recent if at > now - MINUTE]

    def _rate(self) -> float:
        """Frames a second in the last minute."""
        with self._lock:
            return sum(number for _, number in self._latest(time.time())) / MINUTE


class PresentGauges:
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
