"""Makes batches on Ray: in actors that each hold the model, one a GPU or several on a processor."""

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nova_video.cli.arguments import Generate
from nova_video.cli.batch_maker import BatchEntry, BatchMaker, BatchPlace, EntryResult, ResultEngine
from nova_video.common.errors import InputError, first_line
from nova_video.common.ray_session import LEAST_CORES, LOCAL, RayNeed, ray_session

log = logging.getLogger(__name__)

MOST_WORKERS = 8  # on a processor where nobody says how many
RETRIES = 1  # of a group whose process ended
PATIENCE = 60.0  # seconds until it is said that workers are waited for


@dataclass(frozen=True)
class WorkerPlan:
    """How many workers there are, and what each has."""

    device: str
    workers: int
    threads: int
    """Threads of each worker; on GPUs also the cores that it takes."""


@contextmanager
def ray_engine(args: Generate, folder: Path) -> Iterator[ResultEngine]:
    """Makes everything in actors of a Ray."""
    cores = os.cpu_count() or 1
    least = max(LEAST_CORES, (args.workers or 1) * (args.threads or 1))
    with ray_session(args.ray or LOCAL, RayNeed("a batch", "ray", "--engine local", least)):
        plan = plan_workers(args, *_resources(least if args.ray is None else cores))
        place = BatchPlace(replace(args, device=plan.device, threads=plan.threads), folder.absolute())
        pool = ActorPool(plan, place)
        pool.load()
        yield ResultEngine(plan.device, plan.threads, pool.make)


def _resources(cores: int) -> tuple[int, int]:
    """The cores and GPUs of the Ray."""
    import ray

    found = ray.cluster_resources()
    return int(found.get("CPU", cores)), int(found.get("GPU", 0))


def plan_workers(args: Generate, cores: int, gpus: int) -> WorkerPlan:
    """Shares out a Ray's GPUs, or its cores; raises where there are too few."""
    wanted = args.device or "auto"
    if wanted not in ("auto", "cpu", "cuda"):
        raise InputError(f"device is {wanted!r}: expected auto, cpu or cuda on Ray, which chooses among GPUs")
    if wanted == "cuda" and not gpus:
        raise InputError("device is 'cuda' and Ray finds no GPU: expected cpu")
    if gpus and wanted != "cpu":
        workers, threads = args.workers or gpus, args.threads or 1
        if workers > gpus:
            raise InputError(f"workers is {workers}: expected at most {gpus}, the GPUs of this Ray")
        return WorkerPlan("cuda", workers, threads)
    threads = args.threads or max(1, cores // (args.workers or min(cores, MOST_WORKERS)))
    workers = args.workers or max(1, min(cores // threads, MOST_WORKERS))
    if workers * threads > cores:
        raise InputError(f"{workers} workers of {threads} threads: expected at most {cores} threads, the cores of Ray")
    return WorkerPlan("cpu", workers, threads)


class ActorPool:
    """Actors around `BatchMaker`, each of which has one group at a time. A process that ends is started again."""

    def __init__(self, plan: WorkerPlan, place: BatchPlace) -> None:
        import ray

        gpus = 1 if plan.device == "cuda" else 0
        options = {"num_cpus": plan.threads, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": RETRIES}
        self.actors = [ray.remote(BatchMaker).options(**options).remote(place) for _ in range(plan.workers)]

    def load(self) -> None:
        """Waits until one worker has its model; what is wrong with the model is raised here."""
        import ray

        waiting = [actor.load.remote() for actor in self.actors]
        done, _ = ray.wait(waiting, timeout=PATIENCE)
        if not done:
            log.info("waiting for Ray to start %d workers", len(self.actors))
            done, _ = ray.wait(waiting)
        self._get(done[0])

    def make(self, groups: Sequence[Sequence[BatchEntry]]) -> Iterator[list[EntryResult]]:
        """The results of groups in the order in which they are done."""
        import ray
        from ray.exceptions import RayActorError

        waiting, running = deque(groups), dict[Any, tuple[Any, Sequence[BatchEntry]]]()
        free = list(self.actors)
        while waiting or running:
            while waiting and free:
                actor, group = free.pop(), waiting.popleft()
                running[actor.make.remote(group)] = actor, group
            done, _ = ray.wait(list(running))
            for handle in done:
                actor, group = running.pop(handle)
                free.append(actor)
                try:
                    yield self._get(handle)
                except RayActorError as error:
                    text = f"the worker's process ended {RETRIES + 1} times: {first_line(error)}"
                    yield [EntryResult(entry.number, error=text) for entry in group]

    def _get(self, handle: Any) -> Any:
        """The result of a call; an error of ours is raised as it was."""
        import ray
        from ray.exceptions import RayTaskError

        try:
            return ray.get(handle)
        except RayTaskError as error:
            if isinstance(error.cause, InputError | OSError):
                raise error.cause from None
            raise InputError(f"the batch failed on Ray: {first_line(error.cause or error)}") from error
