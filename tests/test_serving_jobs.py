"""The queue of a server without HTTP: jobs are taken, checked, worked off, steered and removed."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nova_video import NovaPipeline
from nova_video.common.errors import InputError
from nova_video.io.decode import MediaFile
from nova_video.io.media import read_metadata
from nova_video.serving.jobs import Job, Status
from nova_video.serving.results import VIDEO
from nova_video.serving.service import JobService, NotFoundError, QueueFullError
from nova_video.serving.settings import ServeSettings

CLIP = {"prompt": "a whale moving left", "seed": 1, "num_frames": 9, "sets": 4, "diffusion_steps": 2}


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
    assert (job.status, job.progress, job.frames, job.fragments, job.error) == (Status.COMPLETED, 100, 9, 3, None)
    assert job.sets_done == job.sets
    video = service.results.local / job.id / VIDEO
    assert len(MediaFile(video).read()) == 9
    record = read_metadata(video)
    assert (record["prompt"], record["seed"], record["settings"]["num_frames"]) == (CLIP["prompt"], 1, 9)


def test_events_tell_every_set_and_end(make: Make) -> None:
    service = make()
    job = service.submit("video", CLIP)

    async def collect() -> list[Any]:
        return [event async for event in service.events(job.id)]

    events = asyncio.run(asyncio.wait_for(collect(), 60))
    steps = [event.data["step"] for event in events if event.type == "set"]
    assert steps == sorted(steps)
    assert steps[-1] == service.get(job.id).sets
    assert [event.data["number"] for event in events if event.type == "fragment"][-1] == 2
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
