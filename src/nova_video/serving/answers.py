"""The answers of the server: objects of the OpenAI dialect, its errors, and files."""

import logging
import os
import re
import tempfile
import time
from collections.abc import Mapping
from io import BytesIO
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from PIL import Image, PngImagePlugin
from pydantic import BaseModel, ConfigDict
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from nova_video.common.checks import quote, shorten
from nova_video.common.errors import InputError
from nova_video.io.media import EXIF_DESCRIPTION, JPEG_EXIF_LIMIT, PNG_KEY
from nova_video.io.text import printable
from nova_video.serving.jobs import Job, JobError, Status
from nova_video.serving.results import ResultFolder
from nova_video.serving.schemas import WordError
from nova_video.serving.service import NotFoundError, QueueFullError

FIRST_WORD = re.compile(r"(?:got (?:both of |neither of )?)?([a-z][a-z_]*)(?= |:)")
STATUS_OF_FAILURE = {"invalid_request": 400, "out_of_memory": 503, "deadline": 504, "cancelled": 409}
"""HTTP statuses of a job that failed while its caller waited."""
NO_RETRY = {"x-should-retry": "false"}  # the openai client tries again otherwise, and gets the same
QUALITY = 90  # of jpeg and webp
POLL = (200, 2000)  # milliseconds: bounds of what clients are told to wait

log = logging.getLogger(__name__)


# Objects --------------------------------------------------------------------------------------------------------------


class ErrorFacts(BaseModel):
    """Why something failed."""

    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """The answer to a request that is refused, or whose work failed."""

    error: ErrorFacts


class VideoError(BaseModel):
    """Why a video failed."""

    code: str
    message: str


class VideoObject(BaseModel):
    """A video: asked for, being made, or made."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "video_0f3a",
                    "object": "video",
                    "status": "in_progress",
                    "progress": 37,
                    "created_at": 1764547200,
                    "model": "emoji",
                    "prompt": "a red apple moving left",
                    "seconds": "2.125",
                    "size": "128x128",
                    "num_frames": 17,
                    "fps": 8.0,
                    "seed": 7,
                }
            ]
        }
    )

    id: str
    object: Literal["video"] = "video"
    status: Status
    progress: int
    """Per cent of its sets that are done."""
    created_at: int
    started_at: int | None = None
    completed_at: int | None = None
    expires_at: int | None = None
    error: VideoError | None = None
    model: str
    prompt: str | None = None
    timeline: list[tuple[float, str]] | None = None
    """[seconds, sentence] pairs, where the sentence changes."""
    remixed_from_video_id: str | None = None
    source_video_id: str | None = None
    """The video that it is an edit or extension of."""
    seconds: str
    """Length of what is made; "inf" has no end."""
    size: str
    width: int
    height: int
    num_frames: int | None = None
    fps: float
    num_inference_steps: int | None = None
    """Sets of each frame's tokens."""
    seed: int | None = None
    frames_done: int = 0
    """Pixel frames that are final."""
    sets_done: int = 0
    paused: bool = False
    stopped: bool = False
    """It was stopped early, and its finished frames are the result."""
    inputs: list[str] = []
    """Media that it was given: image, video, mask_image."""
    request: dict[str, Any] = {}
    """Settings that were asked for."""
    settings: dict[str, Any] = {}
    """All settings of the result."""
    warnings: list[str] = []
    """Words that the model does not know, and what was chosen for the caller."""


class VideoList(BaseModel):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[VideoObject]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class VideoDeleted(BaseModel):
    """The answer to DELETE."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class ImageObject(BaseModel):
    """One picture, or a link to it."""

    b64_json: str | None = None
    url: str | None = None
    seed: int | None = None


class ImagesAnswer(BaseModel):
    """The pictures of one request."""

    created: int
    data: list[ImageObject]
    id: str
    model: str
    output_format: str
    size: str
    background: Literal["opaque"] = "opaque"
    num_inference_steps: int | None = None
    seed: int | None = None
    request: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    warnings: list[str] = []


class ModelObject(BaseModel):
    """The loaded model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "nova-video"


class ModelList(BaseModel):
    """The loaded model, as a list."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


def size_of(job: Job) -> str:
    return f"{job.settings['width']}x{job.settings['height']}"


def seconds_of(frames: int | None, fps: float) -> str:
    """A length as the dialect has it, a text; "inf" has no end."""
    return "inf" if frames is None else f"{frames / fps:.3f}".rstrip("0").rstrip(".")


def warnings_of(job: Job) -> list[str]:
    return [*job.warnings, *job.form.get("notes", [])]


def video_object(job: Job) -> VideoObject:
    """A job as its caller sees it."""
    settings, prompt = job.settings, job.request.get("prompt")
    frames = (
        job.frames if job.status.ended and (job.stopped or settings["num_frames"] is None) else settings["num_frames"]
    )
    return VideoObject(
        id=job.id,
        status=job.status,
        progress=job.progress,
        created_at=int(job.created_at),
        started_at=_whole(job.started_at),
        completed_at=_whole(job.ended_at) if job.status is Status.COMPLETED else None,
        expires_at=_whole(job.expires_at),
        error=None if job.error is None else VideoError(code=job.error.code, message=job.error.message),
        model=job.model,
        prompt=job.prompt,
        timeline=prompt if isinstance(prompt, list) else None,
        remixed_from_video_id=job.form.get("remixed_from_video_id"),
        source_video_id=job.form.get("source_video_id"),
        seconds=seconds_of(frames, settings["fps"]),
        size=size_of(job),
        width=settings["width"],
        height=settings["height"],
        num_frames=frames,
        fps=settings["fps"],
        num_inference_steps=settings.get("sets"),
        seed=job.request.get("seed"),
        frames_done=job.frames,
        sets_done=job.sets_done,
        paused=job.paused,
        stopped=job.stopped,
        inputs=sorted(job.inputs),
        request=job.request,
        settings=settings,
        warnings=warnings_of(job),
    )


def poll_after(job: Job) -> dict[str, str]:
    """The header that tells clients when to ask again: after a quarter of the time that is left."""
    wait = 500.0
    if job.started_at is not None and job.sets and job.sets_done:
        left = (time.time() - job.started_at) * (job.sets - job.sets_done) / job.sets_done
        wait = 1000 * left / 4
    return {} if job.status.ended else {"openai-poll-after-ms": str(round(min(max(wait, POLL[0]), POLL[1])))}


def _whole(moment: float | None) -> int | None:
    return None if moment is None else int(moment)


# Errors ---------------------------------------------------------------------------------------------------------------


def error_answer(status: int, message: str, headers: dict[str, str] | None = None, **facts: Any) -> JSONResponse:
    """An error as OpenAI's clients read it, in one line."""
    return JSONResponse({"error": ErrorFacts(message=printable(message), **facts).model_dump()}, status, headers)


def failure_answer(error: JobError) -> JSONResponse:
    """The error of a job that ended without a result while its caller waited."""
    status = STATUS_OF_FAILURE.get(error.code, 500)
    kind = "invalid_request_error" if status == 400 else "server_error"
    return error_answer(status, error.message, NO_RETRY, type=kind, code=error.code)


def add_error_handlers(app: FastAPI) -> None:
    """Every error is answered in one form and in one line."""
    app.add_exception_handler(InputError, _answer_input)
    app.add_exception_handler(NotFoundError, _answer_not_found)
    app.add_exception_handler(QueueFullError, _answer_full)
    app.add_exception_handler(RequestValidationError, _answer_query)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    app.add_exception_handler(Exception, _answer_defect)


async def _answer_input(request: Request, error: Exception) -> Response:
    if isinstance(error, WordError):
        return error_answer(400, str(error), param=error.word, code=error.code)
    found = FIRST_WORD.match(str(error))
    return error_answer(400, str(error), param=found[1] if found else None)


async def _answer_not_found(request: Request, error: Exception) -> Response:
    return error_answer(404, str(error), code="not_found")


async def _answer_full(request: Request, error: Exception) -> Response:
    assert isinstance(error, QueueFullError)
    headers = {"retry-after": str(max(1, round(error.retry_after)))}
    return error_answer(429, str(error), headers, type="rate_limit_error", code="queue_full")


async def _answer_query(request: Request, error: Exception) -> Response:
    """Says what is wrong in a path or query."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    word = shorten(str(first["loc"][-1]), 60)
    if first["type"] == "extra_forbidden":
        return error_answer(
            400, f"unknown query field {word}: expected none of that name", param=word, code="unknown_field"
        )
    expected = first["msg"].removeprefix("Input should be ")
    return error_answer(400, f"{word} is {quote(first.get('input'))}: expected {expected}", param=word)


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {shorten(request.url.path, 100)}: {error.detail}"
    headers = dict(error.headers) if error.headers else None
    return error_answer(error.status_code, message, headers, code=str(error.detail).lower().replace(" ", "_"))


async def _answer_nobody(request: Request, error: Exception) -> Response:
    """For a client that left; nobody reads it."""
    return error_answer(400, "the request ended in the middle: expected the whole body")


async def _answer_defect(request: Request, error: Exception) -> Response:
    """For a defect of the server, which is in its log."""
    return error_answer(
        500,
        f"the server failed ({type(error).__name__}): its log tells more",
        NO_RETRY,
        type="server_error",
        code="internal",
    )


# Files ----------------------------------------------------------------------------------------------------------------


def file_answer(
    results: ResultFolder, id: str, name: str, kind: str, download: str, facts: Mapping[str, str] | None = None
) -> Response:
    """A result, of which clients may ask for a range of bytes, with facts about it as headers."""
    headers = {"content-disposition": f'inline; filename="{download}"', **(facts or {})}
    if results.local is not None:
        path = results.local / id / name
        if not path.is_file():
            raise NotFoundError(f"{id} has no {name}: expected a result that is still kept")
        return FileResponse(path, media_type=kind, headers=headers)
    try:
        data = results.read(id, name)
    except FileNotFoundError:
        raise NotFoundError(f"{id} has no {name}: expected a result that is still kept") from None
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.write(data)
    return FileResponse(file.name, media_type=kind, headers=headers, background=BackgroundTask(os.unlink, file.name))


def picture_as(png: bytes, output_format: str, quality: int | None = None) -> bytes:
    """A picture in another format, with its record."""
    if output_format == "png":
        return png
    with Image.open(BytesIO(png)) as picture:
        assert isinstance(picture, PngImagePlugin.PngImageFile)
        picture.load()
        record = picture.text.get(PNG_KEY)
        exif = Image.Exif()
        if record is not None and len(record) < JPEG_EXIF_LIMIT:
            exif[EXIF_DESCRIPTION] = record
        made = BytesIO()
        kept = QUALITY if quality is None else quality
        picture.convert("RGB").save(made, output_format.upper(), exif=exif.tobytes(), quality=kept)
    return made.getvalue()
