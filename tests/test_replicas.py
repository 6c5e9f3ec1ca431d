"""A server on Ray: how replicas are shared out and added, without a Ray."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from conftest import Run
from nova_video.common.errors import InputError
from nova_video.serving.replica_settings import JOBS, ReplicaPlan, ReplicaSettings, plan_replicas, replicas_wanted


def plan(cores: int, gpus: int, device: str = "auto", **settings: Any) -> ReplicaPlan:
    return plan_replicas(ReplicaSettings(engine="ray", **settings), device, cores, gpus)


def test_replicas_share_what_ray_has() -> None:
    assert plan(8, 0) == ReplicaPlan("cpu", 1, 1, 8)
    assert plan(8, 0, replicas=2) == ReplicaPlan("cpu", 2, 2, 4)
    assert plan(8, 0, most_replicas=4) == ReplicaPlan("cpu", 1, 4, 2)
    assert plan(8, 2) == ReplicaPlan("cuda", 2, 2, 1)
    assert plan(8, 2, replicas=1, most_replicas=16) == ReplicaPlan("cuda", 1, 16, 1)  # machines may come
    assert plan(8, 2, device="cpu", threads=3) == ReplicaPlan("cpu", 1, 1, 3)


@pytest.mark.parametrize(
    ("cores", "gpus", "settings", "expected"),
    [
        (8, 2, {"replicas": 3}, "replicas is 3: expected at most 2, the GPUs"),
        (8, 0, {"replicas": 4, "threads": 4}, "4 replicas of 4 threads: expected at most 8"),
        (8, 0, {"device": "cuda"}, "device is 'cuda' and Ray finds no GPU"),
        (8, 1, {"device": "cuda:0"}, "device is 'cuda:0': expected auto, cpu or cuda"),
        (8, 0, {"replicas": 4, "most_replicas": 2}, "most_replicas is 2: expected at least replicas, 4"),
        (8, 0, {"jobs_each": 0}, "jobs_each is 0"),
    ],
)
def test_too_little_is_refused(cores: int, gpus: int, settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        plan(cores, gpus, **settings)


@pytest.mark.parametrize("flag", ["--replicas", "--threads", "--most-replicas"])
def test_flags_of_ray_are_refused_without_it(flag: str, run: Run) -> None:
    code, printed, said = run("serve", flag, 2)
    assert (code, printed) == (2, "")
    assert f"got {flag} without --engine ray: expected both" in said


@dataclass
class Config:
    target_ongoing_requests: float = 2.0


@dataclass
class Context:
    """Stands in for what Ray Serve tells a policy."""

    aggregated_metrics: dict[str, dict[str, float]] | None
    capacity_adjusted_min_replicas: int = 1
    capacity_adjusted_max_replicas: int = 4
    config: Config = field(default_factory=Config)


def test_replicas_follow_the_queue() -> None:
    def wanted(*told: float) -> int:
        return replicas_wanted(Context({JOBS: dict(zip("abcd", told, strict=False))}))[0]

    assert [wanted(jobs) for jobs in (0, 1, 2, 3, 6, 100)] == [1, 1, 1, 2, 3, 4]
    assert wanted(5, 6) == 3  # each tells of the whole queue
    assert replicas_wanted(Context(None)) == (1, {})
