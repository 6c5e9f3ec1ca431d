"""The queue of a server without HTTP: jobs are taken, checked, worked off, steered and removed."""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nova_video import NovaPipeline
from nova_video.common.errors import InputError
from nova_video.io.decode import MediaFile
from nova_video.io.media import read_metadata
from nova_video.serving.jobs import Job, Status
from nova_video.serving.results import VIDEO
from nova_video.serving.serve_settings import ServeSettings
from nova_video.serving.service import JobService, NotFoundError, QueueFullError
from nova_video.serving.worker import ActiveJob, Worker

CLIP = {"prompt": "a whale moving left", "seed": 1, "num_frames": 5, "sets": 4, "diffusion_steps": 2}


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint: Path) -> NovaPipeline:
    return NovaPipeline.from_pretrained(str(tiny_checkpoint))


Make = Callable[..., JobService]


@pytest.fixture
def make(pipe: NovaPipeline, tmp_path: Path) -> Iterator[Make]:
    made = []

    def service(start: bool = True, **settings: Any) -> JobService:
        made.append(JobService(pipe, ServeSettings(**{"folder": str(tmp_path)} | settings)))
        if start:
            made[-1].start()
        return made[-1]

    yield service
    for one in made:
        one.close()


def wait(service: JobService, job: Job) -> Job:
    return asyncio.run(asyncio.wait_for(service.wait(job.id), 60))


def test_a_video_is_made_with_its_record_and_its_fragments(make: Make) -> None:
    service = make()
    job = wait(service, service.submit("video", CLIP))
    assert (job.status, job.progress, job.frames, job.fragments, job.error) == (Status.COMPLETED, 100, 5, 2, None)
    assert job.sets_done == job.sets
    assert service.worker.mean_seconds == pytest.approx(job.computed, rel=0.1)
    video = service.results.local / job.id / VIDEO
    assert len(MediaFile(video).read()) == 5
    record = read_metadata(video)
    assert (record["prompt"], record["seed"], record["settings"]["num_frames"]) == (CLIP["prompt"], 1, 5)


def test_events_tell_every_set_and_end(make: Make) -> None:
    service = make()
    job = service.submit("video", CLIP)

    async def collect() -> list[Any]:
        return [event async for event in service.events(job.id)]

    events = asyncio.run(asyncio.wait_for(collect(), 60))
    steps = [event.data["step"] for event in events if event.type == "set"]
    assert steps == sorted(steps)
    assert steps[-1] == service.get(job.id).sets
    assert [event.data["number"] for event in events if event.type == "fragment"][-1] == 1
    assert events[0].type == events[-1].type == "status"
    assert events[-1].data["status"] == "completed"


def test_nobody_sees_another_owners_job(make: Make) -> None:
    service = make(start=False)
    job = service.submit("video", CLIP, owner="a")
    for call in (service.get, service.delete):
        with pytest.raises(NotFoundError):
            call(job.id, owner="b")
    assert service.list("b") == ([], False)
    assert service.list("a")[0][0].id == job.id


def test_a_full_queue_says_when_to_come_again(make: Make) -> None:
    service = make(start=False, queue=1)
    service.submit("video", CLIP)
    with pytest.raises(QueueFullError, match="1 jobs wait already") as full:
        service.submit("video", CLIP)
    assert full.value.retry_after >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sets": 0}, "sets is 0: expected"),
        ({"nonsense": 1}, "unknown setting nonsense"),
        ({"order": "os:system"}, "order is 'os:system': expected none"),
        ({"num_frames": float("inf")}, "num_frames is inf: expected a number"),
        ({"num_frames": 5000}, "num_frames is 5000: expected at most 1,200"),
        ({"num_images_per_prompt": 2}, "2 clips: expected one"),
    ],
)
def test_wrong_requests_leave_nothing(make: Make, options: dict[str, Any], message: str) -> None:
    service = make(start=False)
    with pytest.raises(InputError, match=message):
        service.submit("video", CLIP | options)
    assert service.list() == ([], False)
    assert service.results.ids() == []


def video_of(service: JobService, job: Job) -> bytes:
    return service.results.read(job.id, VIDEO)


def until(service: JobService, job: Job, done: Callable[[Job], bool]) -> Job:
    """Looks at a job until something holds of it."""
    for _ in range(6000):
        if done(found := service.get(job.id)):
            return found
        time.sleep(0.005)
    raise AssertionError(found)


PICTURE = {"prompt": "an apple", "seed": 3, "sets": 4, "diffusion_steps": 2}
LONG = CLIP | {"num_frames": 17, "sets": 6}


def test_a_paused_job_keeps_its_place_and_its_result(make: Make) -> None:
    service = make()
    alone = wait(service, service.submit("video", CLIP | {"num_frames": 9}))
    job = service.submit("video", CLIP | {"num_frames": 9})
    until(service, job, lambda found: found.frames > 0)
    service.want(job.id, "pause")
    paused = until(service, job, lambda found: found.paused)
    assert paused.status == Status.IN_PROGRESS
    other = wait(service, service.submit("image", PICTURE))
    assert other.status == Status.COMPLETED
    assert service.get(job.id).frames == paused.frames
    service.want(job.id, "run")
    assert wait(service, job).status == Status.COMPLETED
    assert video_of(service, job) == video_of(service, alone)


def test_a_stopped_job_keeps_its_finished_frames(make: Make) -> None:
    service = make()
    job = service.submit("video", LONG)
    until(service, job, lambda found: found.frames >= 1)
    service.want(job.id, "stop")
    stopped = wait(service, job)
    assert (stopped.status, stopped.stopped) == (Status.COMPLETED, True)
    path = service.results.local / job.id / VIDEO
    assert len(MediaFile(path).read()) == stopped.frames < 17
    assert read_metadata(path)["settings"]["num_frames"] == stopped.frames


def test_a_job_that_has_not_begun_is_stopped_as_cancelled(make: Make) -> None:
    service = make(start=False)
    job = service.submit("video", CLIP)
    assert service.want(job.id, "stop").status == Status.CANCELLED


def test_a_deleted_job_is_gone_within_a_set(make: Make) -> None:
    service = make()
    job = service.submit("video", LONG)
    until(service, job, lambda found: found.sets_done > 0)
    service.delete(job.id)
    assert not service.worker.active
    assert service.results.ids() == []
    with pytest.raises(NotFoundError):
        service.get(job.id)


def test_a_short_job_does_not_wait_for_a_long_one(make: Make) -> None:
    service = make()
    long = service.submit("video", LONG)
    until(service, long, lambda found: found.frames > 0)
    wait(service, service.submit("image", PICTURE))
    assert service.get(long.id).status == Status.IN_PROGRESS


def test_an_error_in_one_job_harms_no_other(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    service = make()
    alone = wait(service, service.submit("video", CLIP))
    encode = Worker._take_frame

    def run_out_of_memory(self: Worker, active: ActiveJob, event: Any) -> bool:
        if active.job.settings["seed"] == 13 and event.index == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return encode(self, active, event)

    monkeypatch.setattr(Worker, "_take_frame", run_out_of_memory)
    failing, other = service.submit("video", CLIP | {"seed": 13}), service.submit("video", CLIP)
    failed = wait(service, failing)
    assert failed.status == Status.FAILED
    assert failed.error is not None
    assert failed.error.code == "out_of_memory"
    assert wait(service, other).status == Status.COMPLETED
    assert video_of(service, other) == video_of(service, alone)
    assert service.worker.is_alive


def test_a_change_holds_from_its_frame_on(make: Make) -> None:
    service = make()
    job = service.submit("video", LONG)
    until(service, job, lambda found: found.sets_done > 0)
    change = service.change(job.id, prompt="an apple moving right", frame=13)
    told = [event for event in asyncio.run(collect(service, job)) if event.type == "change"]
    assert change.frame == 13
    assert (told[-1].data["frame"], told[-1].data["state"]) == (13, "in_effect")
    assert service.get(job.id).prompt == "a whale moving left, then an apple moving right"
    with pytest.raises(InputError, match="completed: expected"):
        service.change(job.id, prompt="an apple")


def test_a_change_of_a_paused_job_is_made_when_it_goes_on(make: Make) -> None:
    service = make()
    job = service.submit("video", LONG)
    service.want(job.id, "pause")
    until(service, job, lambda found: found.paused)
    assert service.change(job.id, motion_flow=2.0).frame is None
    service.want(job.id, "run")
    assert wait(service, job).changes[0]["state"] == "in_effect"


async def collect(service: JobService, job: Job) -> list[Any]:
    return [event async for event in service.events(job.id)]


def test_jobs_of_one_shape_are_made_together(make: Make) -> None:
    service = make(batch=4)
    jobs = [service.submit("video", CLIP | {"seed": seed}) for seed in (1, 2)]
    assert {wait(service, job).status for job in jobs} == {Status.COMPLETED}
    assert {service.get(job.id).sets_done for job in jobs} == {8}


def test_results_may_be_in_any_file_system(make: Make, tmp_path: Path) -> None:
    service = make(folder="memory://jobs", database=f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    job = wait(service, service.submit("video", CLIP))
    assert video_of(service, job)[4:8] == b"ftyp"
    service.delete(job.id)
    assert service.results.ids() == []
    with pytest.raises(InputError, match="expected database as well"):
        make(folder="memory://jobs")


def test_jobs_are_swept_when_their_time_is_over(make: Make) -> None:
    service = make(keep_days=1e-9)
    job = wait(service, service.submit("image", PICTURE))
    service.worker.sweeper.sweep()
    with pytest.raises(NotFoundError):
        service.get(job.id)
    service.results.write("video_stray", VIDEO, b"")
    service.worker.sweeper.sweep()
    service.worker.sweeper.sweep()
    assert service.results.ids() == []


def test_a_job_that_is_late_fails(make: Make) -> None:
    service = make(start=False, deadline=1)
    job = service.submit("video", CLIP)
    service.store.update(job.id, deadline_at=1.0)
    service.worker.sweeper.sweep()
    late = service.get(job.id)
    assert late.error is not None
    assert (late.status, late.error.code) == (Status.FAILED, "deadline")
