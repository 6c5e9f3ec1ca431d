"""Routes that follow a video while it is made: its events, its growing file, and pause, resume and stop."""

import asyncio
import base64
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from nova_video.common.errors import InputError
from nova_video.serving.answers import VideoObject, video_object
from nova_video.serving.feed import JobEvent
from nova_video.serving.jobs import Job, JobCommand
from nova_video.serving.live_response import LiveResponse
from nova_video.serving.pace import Pacemaker
from nova_video.serving.results import INIT
from nova_video.serving.routing import REFUSALS, Owner, Service
from nova_video.serving.service import JobService

router = APIRouter(prefix="/v1/videos", tags=["live"], responses=REFUSALS)

RETRY = b"retry: 2000\n\n"  # milliseconds after which a browser that lost the events asks again
HEARTBEAT = b": still here\n\n"
BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
TEXT: dict[str, Any] = {"schema": {"type": "string"}}


class LiveQuery(BaseModel):
    """Where a viewer begins."""

    model_config = ConfigDict(extra="forbid")

    start: Literal["start", "now"] = Field(
        "start", alias="from", description="Play from the beginning, or from the newest frames on."
    )


class EventsQuery(BaseModel):
    """The news that a reader of events is told."""

    model_config = ConfigDict(extra="forbid")

    previews: bool = Field(False, description="Send small pictures of the canvas with the events of sets.")


# Streams --------------------------------------------------------------------------------------------------------------


@router.get(
    "/{video_id}/live.mp4",
    response_class=Response,
    summary="Plays a video while it is made",
    responses={200: {"content": {"video/mp4": BINARY}, "description": "Fragmented MP4, which a browser plays at once"}},
)
def play_live(service: Service, owner: Owner, video_id: str, query: Annotated[LiveQuery, Query()]) -> Response:
    job = moving_job(service, video_id, owner)
    return LiveResponse(_video(service, job, 0 if query.start == "start" else "now"), "video/mp4")


@router.get(
    "/{video_id}/events",
    response_class=Response,
    summary="Tells what happens to a video",
    responses={
        200: {
            "content": {"text/event-stream": TEXT},
            "description": "Server-sent events: status at once and at each change; set, frame, fragment, change",
        }
    },
)
def tell_events(service: Service, owner: Owner, video_id: str, query: Annotated[EventsQuery, Query()]) -> Response:
    job = service.get(video_id, owner)
    return LiveResponse(_events(service, job, query.previews), "text/event-stream", HEARTBEAT)


async def _video(service: JobService, job: Job, first: int | Literal["now"]) -> AsyncGenerator[bytes, None]:
    """The head of the stream, then its fragments as they come."""
    begun = False
    async with aclosing(service.fragments(job.id, first, job.owner)) as fragments, Pacemaker(service, job) as pace:
        async for fragment in fragments:
            head = b"" if begun else await asyncio.to_thread(service.results.read, job.id, INIT)
            begun = True
            pace.begin(fragment.first_frame)
            yield head + fragment.data
            pace.send(fragment.first_frame + fragment.frames)


async def _events(service: JobService, job: Job, previews: bool) -> AsyncGenerator[bytes, None]:
    """The events as a browser's EventSource reads them."""
    yield RETRY
    async with aclosing(service.events(job.id, previews, job.owner)) as events:
        async for event in events:
            yield f"event: {event.type}\ndata: {json.dumps(facts_of_event(event))}\n\n".encode()


def facts_of_event(event: JobEvent) -> dict[str, Any]:
    """The facts of an event as JSON; a preview is a data: URL."""
    facts = dict(event.data)
    if isinstance(preview := facts.get("preview"), bytes):
        facts["preview"] = f"data:image/webp;base64,{base64.b64encode(preview).decode()}"
    return facts


# Wishes ---------------------------------------------------------------------------------------------------------------


@router.post("/{video_id}/pause", summary="Pauses a video at its next set")
def pause_video(service: Service, owner: Owner, video_id: str) -> VideoObject:
    return _want(service, video_id, "pause", owner)


@router.post("/{video_id}/resume", summary="Goes on with a paused video")
def resume_video(service: Service, owner: Owner, video_id: str) -> VideoObject:
    return _want(service, video_id, "run", owner)


@router.post("/{video_id}/stop", summary="Stops a video, and keeps its finished frames as the result")
def stop_video(service: Service, owner: Owner, video_id: str) -> VideoObject:
    return _want(service, video_id, "stop", owner)


def _want(service: JobService, id: str, wanted: JobCommand, owner: str) -> VideoObject:
    return video_object(service.want(moving_job(service, id, owner).id, wanted, owner))


def moving_job(service: JobService, id: str, owner: str) -> Job:
    """The job of a video or session; InputError for a picture's."""
    job = service.get(id, owner)
    if job.kind == "image":
        raise InputError(f"video_id is {id}, a picture: expected a video")
    return job
