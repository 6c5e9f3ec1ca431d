"""Requests that are made at random from the server's own schema: none is answered by a failure of the server."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis

from nova_video import NovaPipeline
from nova_video.serving.launch import guarded_app
from nova_video.serving.serve_settings import ServeSettings
from nova_video.serving.server import make_server, open_socket, url_of
from nova_video.serving.service import JobService

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = ServeSettings(
        folder=str(tmp_path_factory.mktemp("serve")), port=0, queue=2, max_pixels=96 * 64, max_frames=21, deadline=1
    )
    whole = guarded_app(JobService(NovaPipeline.from_pretrained(str(tiny_checkpoint)), settings, "tiny"), settings)
    whole.start()
    sock = open_socket(settings)
    server = make_server(whole.app, settings, whole.close)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([sock])), daemon=True)
    thread.start()
    yield url_of(sock)
    server.should_exit = True
    thread.join(30)


PLAIN = hypothesis.settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)

WAITING = ("/v1/images/generations", "/v1/images/edits", "/v1/videos/sync")


def test_no_request_of_the_schema_makes_the_server_fail(url: str) -> None:
    for found in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        operation = found.ok()
        waits = operation.method == "post" and operation.path in WAITING

        @hypothesis.settings(PLAIN, max_examples=5 if waits else 15)
        @hypothesis.given(case=operation.as_strategy())
        def check(case: Any) -> None:
            answer = case.call(base_url=url, timeout=20)
            late = answer.status_code == 504 and answer.json()["error"]["code"] == "deadline"
            assert answer.status_code < 500 or late, f"{case.method} {case.path}: {answer.status_code} {answer.text}"
            if answer.status_code >= 400:
                assert answer.json()["error"]["message"].splitlines()[1:] == []

        check()


def test_the_server_is_well_afterwards(url: str) -> None:
    assert httpx.get(f"{url}/readyz").status_code == 200
