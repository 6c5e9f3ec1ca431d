"""A server that is killed in the middle loses nothing: the next one goes on, with the very same result."""

import random
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from nova_video import NovaPipeline
from nova_video.serving.jobs import Job, Status
from nova_video.serving.results import VIDEO
from nova_video.serving.serve_settings import ServeSettings
from nova_video.serving.service import JobService
from nova_video.serving.store import JobStore

pytestmark = pytest.mark.slow

KILLS = 2
CLIP = {"prompt": "a whale moving left", "seed": 5, "num_frames": 17, "sets": 8, "diffusion_steps": 2}
SERVER = """
import sys, time
from nova_video import NovaPipeline
from nova_video.serving.service import JobService
from nova_video.serving.serve_settings import ServeSettings
service = JobService(NovaPipeline.from_pretrained(sys.argv[1]), ServeSettings(folder=sys.argv[2]), model="tiny")
service.start()
time.sleep(600)
"""


def until(store: JobStore, id: str, sets: int) -> Job:
    """Waits until so many sets of a job are done, or it has ended."""
    for _ in range(30_000):
        job = store.get(id)
        assert job is not None
        if job.status.ended or job.sets_done >= sets:
            return job
        time.sleep(0.01)
    raise AssertionError(job)


def test_a_killed_server_goes_on_with_the_same_result(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pipe = NovaPipeline.from_pretrained(str(tiny_checkpoint))
    with closing(JobService(pipe, ServeSettings(folder=str(tmp_path / "whole")), model="tiny")) as service:
        service.start()
        whole = service.submit("video", CLIP)
        sets = until(service.store, whole.id, 10**9).sets
        expected = service.results.read(whole.id, VIDEO)
    assert sets is not None
    folder = str(tmp_path / "killed")
    with closing(JobService(pipe, ServeSettings(folder=folder), model="tiny")) as service:
        job = service.submit("video", CLIP)
        moments = sorted(random.Random(0).sample(range(4, sets - 4), KILLS))
        for moment in [*moments, 10**9]:
            with subprocess.Popen([sys.executable, "-c", SERVER, str(tiny_checkpoint), folder]) as server:
                found = until(service.store, job.id, moment)
                server.kill()
            if moment != 10**9:
                assert found.status == Status.IN_PROGRESS
        assert (found.status, found.error) == (Status.COMPLETED, None)
        assert found.sets_done == sets
        assert service.results.read(job.id, VIDEO) == expected
