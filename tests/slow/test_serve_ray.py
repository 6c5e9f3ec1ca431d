"""A server on a local Ray: two replicas share a queue, a rolling update moves a job by its saved state, and the end."""

import importlib.util
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nova_video.bench.server_client import ServerClient
from nova_video.cli.console import load_pipeline
from nova_video.io.media import read_frames
from nova_video.serving.guard import ApiKeys
from nova_video.serving.jobs import Job, Status
from nova_video.serving.replica_settings import ReplicaSettings
from nova_video.serving.serve_settings import ServeSettings
from nova_video.serving.server import open_socket, url_of
from nova_video.serving.store import JobStore

connect = pytest.importorskip("websockets.sync.client").connect
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray"),
]
WISH = {"prompt": "a whale moving left", "seed": 3, "sets": 8, "diffusion_steps": 4}


def seen(store: JobStore, id: str, frames: int) -> Job:
    """The job as soon as a replica has made so many frames of it."""
    for _ in range(2000):
        job = store.get(id)
        assert job is not None
        if job.frames >= frames and job.worker is not None:
            return job
        assert not job.status.ended
        time.sleep(0.05)
    raise AssertionError("no replica makes it")


def test_replicas_share_a_queue_and_hand_jobs_over(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from nova_video.serving.ray_app import ReplicaSource, deploy, served_on_ray

    with open_socket(ServeSettings(port=0)) as sock:
        url, port = url_of(sock), sock.getsockname()[1]
    settings = ServeSettings(port=port, folder=str(tmp_path / "served"))
    source: Any = partial(load_pipeline, str(tiny_checkpoint), dtype="float32")
    replicas = ReplicaSettings(engine="ray", replicas=2, threads=1)
    client = ServerClient(url)
    with served_on_ray(source, "tiny", settings, replicas, ApiKeys(), "cpu") as plan:
        client.wait_until_ready()
        store = JobStore(f"sqlite:///{tmp_path / 'served' / 'jobs.sqlite'}")
        with connect(f"{url.replace('http', 'ws')}/v1/realtime/video", max_size=None) as socket:
            socket.send(json.dumps({"type": "session.start", **WISH, "num_frames": 5}))
            told = [json.loads(each)["type"] for each in socket if isinstance(each, str)]
            assert told[-1] == "session.done"
            assert told.count("video.chunk_metadata") == 3
        ids = [client.create_video({**WISH, "num_frames": 97, "seed": seed})["id"] for seed in range(4)]
        long, workers = ids[0], set[str]()
        for _ in range(2000):
            workers |= store.workers()
            if len(workers) == 2:
                break
            time.sleep(0.05)
        assert len(workers) == 2
        before = seen(store, long, 9)
        deploy(ReplicaSource(source, "tiny", settings, ApiKeys(), plan), replicas.jobs_each)
        assert not store.workers() & workers
        for id in ids[1:]:
            client.ask("DELETE", f"/v1/videos/{id}")
        assert client.wait(long)["status"] == "completed"
        assert before.frames < 97
        again = client.create_video({**WISH, "num_frames": 97, "seed": 0})["id"]
        assert client.wait(again)["status"] == "completed"
        made = [tmp_path / "served" / id / "video.mp4" for id in (long, again)]
        assert (read_frames(made[0])[0] == read_frames(made[1])[0]).all()
        kept = client.create_video({**WISH, "num_frames": 97})["id"]
        seen(store, kept, 5)
    job = store.get(kept)
    assert job is not None
    assert (job.status, job.worker) == (Status.IN_PROGRESS, None)
    assert (tmp_path / "served" / kept / "state.safetensors").stat().st_size > 0
    assert job.frames >= 5
    store.close()
