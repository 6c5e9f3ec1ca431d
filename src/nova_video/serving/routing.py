"""All routes share these: the service, the owner of a request, bodies in OpenAPI, and waiting for a job."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, HTTPConnection

from nova_video.serving.answers import ErrorAnswer
from nova_video.serving.jobs import Job
from nova_video.serving.schemas import RequestWords
from nova_video.serving.service import JobService, NotFoundError

T = TypeVar("T")

LOOK = 0.5  # seconds between two looks whether the client is still there


def service_of(connection: HTTPConnection) -> JobService:
    """The service that the application is over."""
    found: JobService = connection.app.state.service
    return found


def owner_of(connection: HTTPConnection) -> str:
    """The hash of the API key that a request brings, which the guard wrote down; empty without keys."""
    owner: str = getattr(connection.state, "owner", "")
    return owner


Service = Annotated[JobService, Depends(service_of)]
Owner = Annotated[str, Depends(owner_of)]

REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "Wrong input, named in one line"},
    404: {"model": ErrorAnswer, "description": "There is no such job"},
    429: {"model": ErrorAnswer, "description": "The queue is full; Retry-After tells when to come again"},
}


def body_of(model: type[RequestWords], *kinds: str) -> dict[str, Any]:
    """The part of OpenAPI that tells of a body, which the route reads itself."""
    schema = model.model_json_schema()
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema} for kind in kinds}}}


async def in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Runs what blocks, such as decoding, beside the event loop."""
    return await run_in_threadpool(function, *arguments)


async def end_of(request: Request, service: JobService, job: Job, owner: str) -> Job:
    """The job when it has ended. If the client leaves before, the job is cancelled."""
    waiting = asyncio.ensure_future(service.wait(job.id))
    try:
        while not (await asyncio.wait({waiting}, timeout=LOOK))[0]:
            if await request.is_disconnected():
                raise ClientDisconnect
        return waiting.result()
    except (ClientDisconnect, asyncio.CancelledError):
        waiting.cancel()
        await cancel(service, job, owner)
        raise


async def cancel(service: JobService, job: Job, owner: str) -> None:
    """Cancels a job that nobody waits for any more, if it is still there."""
    with suppress(NotFoundError):
        await asyncio.to_thread(service.want, job.id, "cancel", owner)
