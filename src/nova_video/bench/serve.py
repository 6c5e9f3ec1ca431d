"""Measures a server, as `nova bench serve` does. Each row is one number of clients that ask at the same time.

Every request is a clip with a seed of its own. A client asks, follows the job's events to its end and asks again.
Cancelling is measured by itself: a job is cancelled after its first set, and the time is that until the server has let
go of it.
"""

import json
import math
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from nova_video.bench.rows import read_records, short
from nova_video.bench.sample import digits
from nova_video.bench.server_client import ServerClient
from nova_video.common.checks import check_number
from nova_video.common.errors import InputError

LONG = 401
"""Frames of the jobs that are cancelled, which would take long."""


@dataclass(frozen=True)
class ServeRow:
    """A server, measured with some clients at the same time. Seconds of a job are since its request was sent."""

    config: str
    """The model."""
    clients: int
    requests: int
    device: str
    versions: dict[str, str]
    command: str
    """The command as typed in the repository's root."""
    changed: dict[str, Any] = field(default_factory=dict)
    """Settings of the requests, by their names."""

    frames: int | None = None
    size: str | None = None
    seconds: float | None = None
    """Seconds of all requests together."""
    requests_per_second: float | None = None
    frames_per_second: float | None = None
    p50_seconds: float | None = None
    """Half of the jobs were done within so many seconds."""
    p95_seconds: float | None = None
    p99_seconds: float | None = None
    first_preview_seconds: float | None = None
    """Median until the first set of tokens is told."""
    first_frame_seconds: float | None = None
    """Median until the first frame can be played."""
    set_seconds: float | None = None
    """Median between two sets of one job that runs alone."""
    cancel_seconds: float | None = None
    """Median until a running job is gone after DELETE."""
    cancel_seconds_most: float | None = None
    error: str | None = None

    @property
    def kind(self) -> tuple[Any, ...]:
        return self.config, self.clients, self.device, json.dumps(self.changed, sort_keys=True)


@dataclass(frozen=True)
class AskedLoad:
    """The requests to send."""

    clients: int
    requests: int
    cancels: int
    fields: Mapping[str, Any]
    """The settings of each request, by their names."""

    def __post_init__(self) -> None:
        for name in ("clients", "requests", "cancels"):
            check_number(name, getattr(self, name), 1, integer=True, high=100_000)


@dataclass(frozen=True)
class JobTimes:
    """The seconds of one job since its request was sent."""

    total: float
    first_preview: float | None
    first_frame: float | None
    answer: dict[str, Any]


def follow_job(client: ServerClient, fields: Mapping[str, Any]) -> JobTimes:
    """Asks for a clip and follows it to its end."""
    began = time.monotonic()
    preview = frame = None
    job = client.create_video(fields)
    for kind, data in client.events(job["id"]):
        now = time.monotonic() - began
        if kind == "set":
            preview = preview or now
        elif kind == "fragment":
            frame = frame or now
        elif kind == "status" and data["status"] not in ("queued", "in_progress"):
            break
    job = client.wait(job["id"])
    if job["status"] != "completed":
        raise InputError(f"the job {job['id']} is {job['status']}: {(job.get('error') or {}).get('message')}")
    return JobTimes(time.monotonic() - began, preview, frame, job)


def measure_load(client: ServerClient, asked: AskedLoad, base: ServeRow) -> ServeRow:
    """The row of one number of clients; one that fails has its error in it."""
    try:
        return _measure(client, asked, base)
    except (InputError, OSError) as error:
        return ServeRow(**{**vars(base), "error": str(error)})


def _measure(client: ServerClient, asked: AskedLoad, base: ServeRow) -> ServeRow:
    follow_job(client, {**asked.fields, "seed": 0})  # what the first job of a server makes anew does not count
    began = time.monotonic()
    with ThreadPoolExecutor(asked.clients) as pool:
        jobs = [{**asked.fields, "seed": 1 + number} for number in range(asked.requests)]
        times = list(pool.map(lambda fields: follow_job(client, fields), jobs))
    seconds = time.monotonic() - began
    totals = sorted(each.total for each in times)
    frames = [int(each.answer.get("num_frames") or 0) for each in times]
    cancels, sets = measure_cancels(client, asked)
    measured = {
        "frames": frames[0] or None,
        "size": times[0].answer.get("size"),
        "seconds": digits(seconds),
        "requests_per_second": digits(len(times) / seconds),
        "frames_per_second": digits(sum(frames) / seconds),
        **{f"p{share}_seconds": digits(percentile(totals, share / 100)) for share in (50, 95, 99)},
        "first_preview_seconds": _median([each.first_preview for each in times]),
        "first_frame_seconds": _median([each.first_frame for each in times]),
        "set_seconds": _median(sets),
        "cancel_seconds": _median(cancels),
        "cancel_seconds_most": digits(max(cancels)),
    }
    return ServeRow(**{**vars(base), **measured})


def measure_cancels(client: ServerClient, asked: AskedLoad) -> tuple[list[float], list[float]]:
    """Seconds of each cancel of a running job, and those between its sets before."""
    cancels, sets = list[float](), list[float]()
    for number in range(asked.cancels):
        fields = {name: value for name, value in asked.fields.items() if name != "seconds"}
        job = client.create_video({**fields, "num_frames": LONG, "seed": number})
        seen = list[float]()
        for kind, _ in client.events(job["id"]):
            if kind == "set":
                seen.append(time.monotonic())
            if len(seen) == 4:
                break
        sets += [after - before for before, after in pairwise(seen)]
        began = time.monotonic()
        client.ask("DELETE", f"/v1/videos/{job['id']}")
        cancels.append(time.monotonic() - began)
    return cancels, sets


def percentile(values: list[float], share: float) -> float:
    """The least of the sorted values that at least this share of them does not exceed."""
    return values[math.ceil(round(len(values) * share, 6)) - 1]


def _median(values: list[float] | list[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return digits(statistics.median(found)) if found else None


def read_serve_rows(path: Path) -> list[ServeRow]:
    """Reads the rows that `nova bench serve` wrote."""
    return read_records(path, ServeRow)


def serve_lines(row: ServeRow) -> list[str]:
    """A header and the row under it; or what went wrong."""
    if row.error is not None:
        return [f"{row.config}, {row.clients} clients: failed: {row.error}"]
    cells = {
        "model": row.config,
        "clients": str(row.clients),
        "requests": str(row.requests),
        "frames": str(row.frames),
        "clips/s": short(row.requests_per_second),
        "frames/s": short(row.frames_per_second),
        "p50 s": short(row.p50_seconds),
        "p95 s": short(row.p95_seconds),
        "p99 s": short(row.p99_seconds),
        "preview s": short(row.first_preview_seconds),
        "1st frame s": short(row.first_frame_seconds),
        "set s": short(row.set_seconds),
        "cancel s": short(row.cancel_seconds),
        "at most": short(row.cancel_seconds_most),
    }
    widths = [max(len(name), len(cell)) for name, cell in cells.items()]
    return [
        "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True))
        for line in (cells, cells.values())
    ]
