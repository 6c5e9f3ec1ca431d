"""The settings of a server on Ray, each declared once; the flags of `nova serve` follow from them."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from nova_video.common.errors import InputError
from nova_video.common.option_fields import check_options, option, option_fields

MOST_REPLICAS = 4096
JOBS = "jobs"
"""The measure by which replicas are added: jobs that wait or run, of all replicas together."""


@dataclass(frozen=True, kw_only=True)
class ReplicaSettings:
    """How many processes serve, and what each has."""

    engine: Literal["local", "ray"] = option("local", "Serve in this process, or in several and on several machines.")
    replicas: int | None = option(
        None,
        "With --engine ray: processes that each hold the model.",
        low=1,
        high=MOST_REPLICAS,
        unset="one a GPU, else 1",
        metavar="N",
    )
    most_replicas: int | None = option(
        None,
        "With --engine ray: processes at most, as the queue grows.",
        low=1,
        high=MOST_REPLICAS,
        unset="as many as --replicas",
        metavar="N",
    )
    jobs_each: float = option(
        2.0,
        "With --most-replicas: there is one process for so many jobs that wait or run.",
        low=0,
        above=True,
        high=1000,
        metavar="N",
    )
    threads: int | None = option(
        None,
        "With --engine ray: threads of each process on a processor.",
        low=1,
        high=1024,
        unset="the cores, shared out",
        metavar="N",
    )
    ray: str | None = option(
        None,
        "With --engine ray: address of a Ray cluster. The command ends when the cluster serves; given again, it changes"
        " process after process.",
        unset="a Ray of this machine, which ends with the command",
        metavar="ADDRESS",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.engine == "local":
            for name, each in option_fields(self).items():
                if name != "engine" and getattr(self, name) != each.default:
                    raise InputError(f"got --{name.replace('_', '-')} without --engine ray: expected both")
        elif self.replicas is not None and self.most_replicas is not None and self.most_replicas < self.replicas:
            raise InputError(f"most_replicas is {self.most_replicas}: expected at least replicas, {self.replicas}")


@dataclass(frozen=True)
class ReplicaPlan:
    """How a Ray's GPUs or cores are shared out."""

    device: str
    least: int
    most: int
    threads: int
    """Threads of each replica; on GPUs, the cores that it takes."""


def plan_replicas(settings: ReplicaSettings, device: str, cores: int, gpus: int) -> ReplicaPlan:
    """Shares out what a Ray has; raises where it is too little. Replicas to come may wait for machines to come."""
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device is {device!r}: expected auto, cpu or cuda on Ray, which chooses among GPUs")
    if device == "cuda" and not gpus:
        raise InputError("device is 'cuda' and Ray finds no GPU: expected cpu")
    on_gpus = gpus > 0 and device != "cpu"
    least = settings.replicas or (gpus if on_gpus else 1)
    most = max(least, settings.most_replicas or least)
    if on_gpus:
        if least > gpus:
            raise InputError(f"replicas is {least}: expected at most {gpus}, the GPUs of this Ray")
        return ReplicaPlan("cuda", least, most, settings.threads or 1)
    threads = settings.threads or max(1, cores // most)
    if least * threads > cores:
        raise InputError(f"{least} replicas of {threads} threads: expected at most {cores} threads, the cores of Ray")
    return ReplicaPlan("cpu", least, most, threads)


def replicas_wanted(context: Any) -> tuple[int, dict[str, Any]]:
    """How many replicas Ray Serve is to have, by the queue. Each replica tells of the whole queue."""
    told = (context.aggregated_metrics or {}).get(JOBS, {}).values()
    jobs = max(told, default=0.0)
    wanted = math.ceil(jobs / context.config.target_ongoing_requests)
    least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return min(max(wanted, least), most), {}
