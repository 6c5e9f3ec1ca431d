"""Videos in the OpenAI dialect: asked for by a form, looked at, fetched, and made into others."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from nova_video.serving.answers import (
    ErrorAnswer,
    VideoDeleted,
    VideoList,
    VideoObject,
    error_answer,
    failure_answer,
    file_answer,
    poll_after,
    video_object,
)
from nova_video.serving.bodies import read_body
from nova_video.serving.dialect import WordedRequest
from nova_video.serving.jobs import Job, JobError, Status
from nova_video.serving.results import SPRITESHEET, THUMBNAIL, VIDEO
from nova_video.serving.routing import REFUSALS, Owner, Service, body_of, end_of, in_thread
from nova_video.serving.schemas import RequestWords, VideoCreate, VideoEdit, VideoExtend, VideoRemix, WordError
from nova_video.serving.service import JobService, NotFoundError

router = APIRouter(prefix="/v1/videos", tags=["videos"], responses=REFUSALS)

FORM, JSON = "multipart/form-data", "application/json"
VARIANTS = {
    "video": (VIDEO, "video/mp4", ".mp4"),
    "thumbnail": (THUMBNAIL, "image/webp", ".webp"),
    "spritesheet": (SPRITESHEET, "image/webp", "-sheet.webp"),
}
"""A variant of `content` -> its file, media type, and the end of its name."""
BINARY: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in ("video/mp4", "image/webp")}
    },
    206: {"description": "The range of bytes that was asked for"},
    409: {"model": ErrorAnswer, "description": "The video is not completed"},
}
FAILURES: dict[int | str, dict[str, Any]] = {
    500: {"model": ErrorAnswer, "description": "The work failed"},
    503: {"model": ErrorAnswer, "description": "The work took more memory than there is"},
    504: {"model": ErrorAnswer, "description": "The work took longer than the server allows"},
}


class PageQuery(BaseModel):
    """Which videos to list."""

    model_config = ConfigDict(extra="forbid")

    after: str | None = Field(None, description="The id of the video that the page comes after.")
    limit: int = Field(20, ge=1, le=100, description="How many at most.")
    order: Literal["asc", "desc"] = Field("desc", description="Oldest or newest first.")


class ContentQuery(BaseModel):
    """Which file of a video to fetch."""

    model_config = ConfigDict(extra="forbid")

    variant: Literal["video", "thumbnail", "spritesheet"] = Field("video", description="What to fetch.")


# Asking ---------------------------------------------------------------------------------------------------------------


def video_request(
    service: JobService, values: dict[str, Any], owner: str, model: type[RequestWords] = VideoCreate
) -> WordedRequest:
    """The request for a new video."""
    asked = WordedRequest(service, model, values, owner)
    asked.require_prompt()
    asked.take_references()
    asked.round_length()
    if asked.options.get("num_frames") == 1:
        raise WordError("num_frames is 1: expected 2 or more, /v1/images/generations makes pictures", "num_frames")
    return asked


def _create(service: JobService, values: dict[str, Any], owner: str) -> Job:
    return video_request(service, values, owner).submit("video")


def _create_with_end(service: JobService, values: dict[str, Any], owner: str) -> Job:
    asked = video_request(service, values, owner)
    if asked.is_endless:
        raise WordError("num_frames is inf: expected a number, a video without end is no file", "num_frames")
    return asked.submit("video")


def _edit(service: JobService, values: dict[str, Any], owner: str) -> Job:
    asked = WordedRequest(service, VideoEdit, values, owner)
    asked.require_prompt()
    asked.take_clip()
    asked.edit_by_default()
    asked.round_length()
    return asked.submit("video")


def _extend(service: JobService, values: dict[str, Any], owner: str) -> Job:
    asked = WordedRequest(service, VideoExtend, values, owner)
    asked.require_prompt()
    asked.take_clip()
    asked.extend()
    return asked.submit("video")


def _remix(service: JobService, id: str, values: dict[str, Any], owner: str) -> Job:
    asked = WordedRequest(service, VideoRemix, values, owner)
    asked.repeat(video_of(service, id, owner))
    asked.round_length()
    return asked.submit("video")


async def _body(request: Request, service: JobService, form_alone: bool = False) -> dict[str, Any]:
    return await read_body(request, int(service.settings.body_mb * 1e6), form_alone)


def _object(job: Job) -> JSONResponse:
    return JSONResponse(video_object(job).model_dump(mode="json"), headers=poll_after(job))


@router.post(
    "", response_model=VideoObject, openapi_extra=body_of(VideoCreate, FORM), summary="Asks for a video, by a form"
)
async def create_video(request: Request, service: Service, owner: Owner) -> Response:
    values = await _body(request, service, form_alone=True)
    return _object(await in_thread(_create, service, values, owner))


@router.post(
    "/sync",
    response_class=Response,
    openapi_extra=body_of(VideoCreate, FORM),
    responses={200: BINARY[200], **FAILURES},
    summary="Asks for a video and waits for the file",
)
async def create_video_sync(request: Request, service: Service, owner: Owner) -> Response:
    values = await _body(request, service, form_alone=True)
    job = await end_of(request, service, await in_thread(_create_with_end, service, values, owner), owner)
    if job.status is not Status.COMPLETED:
        return failure_answer(job.error or JobError("cancelled", "the video was cancelled before it had a frame"))
    return await in_thread(content_answer, service, job, "video")


@router.post(
    "/edits",
    response_model=VideoObject,
    openapi_extra=body_of(VideoEdit, FORM, JSON),
    summary="Makes parts of a clip anew: those under a mask, or a share of all",
)
async def edit_video(request: Request, service: Service, owner: Owner) -> Response:
    return _object(await in_thread(_edit, service, await _body(request, service), owner))


@router.post(
    "/extensions",
    response_model=VideoObject,
    openapi_extra=body_of(VideoExtend, FORM, JSON),
    summary="Goes on with a clip for so many seconds",
)
async def extend_video(request: Request, service: Service, owner: Owner) -> Response:
    return _object(await in_thread(_extend, service, await _body(request, service), owner))


@router.post(
    "/{video_id}/remix",
    response_model=VideoObject,
    openapi_extra=body_of(VideoRemix, JSON, FORM),
    summary="Makes a video again with another sentence or other settings, from the same seed",
)
async def remix_video(request: Request, service: Service, owner: Owner, video_id: str) -> Response:
    return _object(await in_thread(_remix, service, video_id, await _body(request, service), owner))


# Looking --------------------------------------------------------------------------------------------------------------


def video_of(service: JobService, id: str, owner: str) -> Job:
    """A video or live session by its id."""
    job = service.get(id, owner)
    if job.kind == "image":
        raise NotFoundError(f"{id} is an image: expected the id of a video")
    return job


@router.get("", summary="Lists videos")
def list_videos(service: Service, owner: Owner, page: Annotated[PageQuery, Query()]) -> VideoList:
    if page.after is not None:
        video_of(service, page.after, owner)
    jobs, more = service.list(owner, ("video", "session"), page.after, page.limit, page.order)
    data = [video_object(job) for job in jobs]
    if not data:
        return VideoList(data=data)
    return VideoList(data=data, has_more=more, first_id=data[0].id, last_id=data[-1].id)


@router.get("/{video_id}", response_model=VideoObject, summary="Tells how far a video is")
def get_video(service: Service, owner: Owner, video_id: str) -> Response:
    return _object(video_of(service, video_id, owner))


@router.delete("/{video_id}", summary="Cancels a video if it is being made, and removes it")
async def delete_video(service: Service, owner: Owner, video_id: str) -> VideoDeleted:
    job = await in_thread(video_of, service, video_id, owner)
    await in_thread(service.delete, job.id, owner)
    return VideoDeleted(id=job.id)


@router.head("/{video_id}/content", include_in_schema=False)
@router.get("/{video_id}/content", response_class=Response, responses=BINARY, summary="Fetches a video or its pictures")
def get_content(service: Service, owner: Owner, video_id: str, query: Annotated[ContentQuery, Query()]) -> Response:
    return content_answer(service, video_of(service, video_id, owner), query.variant)


def content_answer(service: JobService, job: Job, variant: str) -> Response:
    """A file of a completed video; ranges of its bytes may be asked for."""
    if job.status is not Status.COMPLETED:
        message = f"video {job.id} is {job.status}: expected a completed one"
        headers = {"x-should-retry": "false"}
        return error_answer(409, message, headers, param="video_id", code="video_not_completed")
    name, kind, end = VARIANTS[variant]
    facts = {"x-video-id": job.id, "x-seed": str(job.request["seed"])}
    return file_answer(service.results, job.id, name, kind, f"{job.id}{end}", facts)
