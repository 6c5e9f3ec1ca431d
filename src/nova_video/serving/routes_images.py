"""Pictures in the OpenAI dialect: the answer has them, or links to them, or streams them while they fill in."""

import base64
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from nova_video.serving.answers import (
    ErrorAnswer,
    ErrorFacts,
    ImageObject,
    ImagesAnswer,
    failure_answer,
    picture_as,
    size_of,
    warnings_of,
)
from nova_video.serving.bodies import read_body
from nova_video.serving.dialect import WordedRequest
from nova_video.serving.jobs import Job, JobError, Status
from nova_video.serving.live_response import LiveResponse
from nova_video.serving.results import image_name, partial_name
from nova_video.serving.routing import REFUSALS, Owner, Service, body_of, cancel, end_of, in_thread
from nova_video.serving.schemas import ImageCreate, ImageEdit, WordError
from nova_video.serving.service import JobService, NotFoundError

router = APIRouter(prefix="/v1/images", tags=["images"], responses=REFUSALS)

FORM, JSON = "multipart/form-data", "application/json"
KINDS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
OUTCOMES: dict[int | str, dict[str, Any]] = {
    200: {"model": ImagesAnswer, "content": {"text/event-stream": {"schema": {"type": "string"}}}},
    500: {"model": ErrorAnswer, "description": "The work failed"},
    503: {"model": ErrorAnswer, "description": "The work took more memory than there is"},
    504: {"model": ErrorAnswer, "description": "The work took longer than the server allows"},
}
HEARTBEAT = b": still here\n\n"
CANCELLATION = JobError("cancelled", "the picture was cancelled")


class PictureQuery(BaseModel):
    """Which picture of a request to fetch."""

    model_config = ConfigDict(extra="forbid")

    index: int = Field(0, ge=0, le=9, description="Its number among those of the request, from 0 on.")


@router.post(
    "/generations",
    response_class=Response,
    responses=OUTCOMES,
    openapi_extra=body_of(ImageCreate, JSON, FORM),
    summary="Makes pictures of a sentence",
)
async def create_images(request: Request, service: Service, owner: Owner) -> Response:
    job = await in_thread(_create, service, await _body(request, service), owner)
    return await _answer(request, service, job, owner, "image_generation")


@router.post(
    "/edits",
    response_class=Response,
    responses=OUTCOMES,
    openapi_extra=body_of(ImageEdit, FORM, JSON),
    summary="Makes parts of a picture anew: those under a mask, or a share of all",
)
async def edit_images(request: Request, service: Service, owner: Owner) -> Response:
    job = await in_thread(_edit, service, await _body(request, service), owner)
    return await _answer(request, service, job, owner, "image_edit")


@router.head("/{image_id}/content", include_in_schema=False)
@router.get("/{image_id}/content", response_class=Response, summary="Fetches a picture that an answer links to")
def get_image(service: Service, owner: Owner, image_id: str, query: Annotated[PictureQuery, Query()]) -> Response:
    job = service.get(image_id, owner)
    if job.kind != "image" or job.status is not Status.COMPLETED:
        raise NotFoundError(f"{image_id} is no finished picture: expected the id of one")
    try:
        data = _picture(service, job, image_name(query.index))
    except FileNotFoundError:
        raise NotFoundError(f"{image_id} has no picture {query.index}: expected one that is kept") from None
    return Response(data, media_type=KINDS[_format(job)])


# Asking ---------------------------------------------------------------------------------------------------------------


async def _body(request: Request, service: JobService) -> dict[str, Any]:
    return await read_body(request, int(service.settings.body_mb * 1e6))


def _create(service: JobService, values: dict[str, Any], owner: str) -> Job:
    return _submit(WordedRequest(service, ImageCreate, values, owner))


def _edit(service: JobService, values: dict[str, Any], owner: str) -> Job:
    asked = WordedRequest(service, ImageEdit, values, owner)
    asked.take_picture()
    asked.edit_by_default()
    return _submit(asked)


def _submit(asked: WordedRequest) -> Job:
    """Checks the words of the dialect against each other, and asks for one frame."""
    form = asked.form
    if form.get("partial_images") and not form.get("stream"):
        raise WordError(f"partial_images is {form['partial_images']} without stream: expected stream true", "stream")
    if form.get("stream") and form.get("response_format") == "url":
        raise WordError("response_format is 'url' with stream: expected b64_json", "response_format")
    if "output_compression" in form and form.get("output_format", "png") == "png":
        raise WordError(
            "got output_compression for png, which loses nothing: expected jpeg or webp", "output_compression"
        )
    return asked.submit("image")


async def _answer(request: Request, service: JobService, job: Job, owner: str, event: str) -> Response:
    if job.form.get("stream"):
        return LiveResponse(_stream(service, job, owner, event), "text/event-stream", HEARTBEAT)
    job = await end_of(request, service, job, owner)
    if job.status is not Status.COMPLETED:
        return failure_answer(job.error or CANCELLATION)
    answer = await in_thread(_images_answer, service, job, str(request.base_url))
    return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")


# Answering ------------------------------------------------------------------------------------------------------------


def _count(job: Job) -> int:
    found: int = job.form.get("n", 1)
    return found


def _format(job: Job) -> str:
    found: str = job.form.get("output_format", "png")
    return found


def _picture(service: JobService, job: Job, name: str) -> bytes:
    """A stored picture in the format that was asked for."""
    return picture_as(service.results.read(job.id, name), _format(job), job.form.get("output_compression"))


def _as_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _images_answer(service: JobService, job: Job, base: str) -> ImagesAnswer:
    pictures = []
    for index in range(_count(job)):
        facts: dict[str, Any] = {"seed": job.request["seed"] + index}
        if job.form.get("response_format") == "url":
            facts["url"] = f"{base}v1/images/{job.id}/content?index={index}"
        else:
            facts["b64_json"] = _as_text(_picture(service, job, image_name(index)))
        pictures.append(ImageObject(**facts))
    return ImagesAnswer(
        created=int(job.created_at),
        data=pictures,
        id=job.id,
        model=job.model,
        output_format=_format(job),
        size=size_of(job),
        num_inference_steps=job.settings.get("sets"),
        seed=job.request["seed"],
        request=job.request,
        settings=job.settings,
        warnings=warnings_of(job),
    )


async def _stream(service: JobService, job: Job, owner: str, kind: str) -> AsyncGenerator[bytes, None]:
    """The canvas on the way and at the end, as server-sent events. A client that leaves cancels the job."""
    try:
        async with aclosing(service.events(job.id, owner=owner)) as events:
            async for news in events:
                if news.type == "partial":
                    number = news.data["number"]
                    for index in range(_count(job)):
                        data = await in_thread(_picture, service, job, partial_name(number, index))
                        yield _event(job, f"{kind}.partial_image", data, partial_image_index=number, image=index)
        job = await in_thread(service.get, job.id, owner)
        if job.status is not Status.COMPLETED:
            yield _failure(job.error or CANCELLATION)
            return
        for index in range(_count(job)):
            data = await in_thread(_picture, service, job, image_name(index))
            facts = {"image": index, "seed": job.request["seed"] + index, "warnings": warnings_of(job)}
            yield _event(job, f"{kind}.completed", data, **facts)
    except (NotFoundError, FileNotFoundError):
        yield _failure(JobError("not_found", f"{job.id} was removed while it was made"))
    finally:
        if not job.status.ended:
            await cancel(service, job, owner)


def _failure(error: JobError) -> bytes:
    """The server-sent event that ends a stream without its picture."""
    told = ErrorFacts(message=error.message, type="server_error", code=error.code)
    return f"event: error\ndata: {json.dumps({'error': told.model_dump()})}\n\n".encode()


def _event(job: Job, kind: str, data: bytes, **facts: Any) -> bytes:
    """One server-sent event with a picture."""
    told = {
        "type": kind,
        "id": job.id,
        "b64_json": _as_text(data),
        "created_at": int(job.created_at),
        "size": size_of(job),
        "background": "opaque",
        "quality": "auto",
        "output_format": _format(job),
        **facts,
    }
    return f"event: {kind}\ndata: {json.dumps(told)}\n\n".encode()
