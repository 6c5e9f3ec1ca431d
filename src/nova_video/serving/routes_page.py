"""The page at `/`, and its routes besides the API: what the model knows, and how a result was made."""

import hashlib
import mimetypes
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Response
from pydantic import BaseModel, ConfigDict, Field

from nova_video.serving.about import about_model, prompt_problems
from nova_video.serving.answers import ErrorAnswer, file_answer
from nova_video.serving.command_line import command_line
from nova_video.serving.routing import Owner, Service
from nova_video.serving.service import NotFoundError

router = APIRouter()

PAGE = files("nova_video.serving") / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page loads from this server alone, runs no inline code and is shown in no frame."""
TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}
LONGEST_PROMPT = 10_000
MOST_PROMPTS = 100
MediaName = Literal["image", "video", "mask_image"]
JOB_ROUTE: dict[str, Any] = {"tags": ["page"], "responses": {404: {"model": ErrorAnswer, "description": "No such job"}}}


class TypedSentences(BaseModel):
    """Sentences that somebody types, to be checked against the words of the model."""

    model_config = ConfigDict(extra="forbid")

    prompts: Annotated[list[Annotated[str, Field(max_length=LONGEST_PROMPT)]], Field(max_length=MOST_PROMPTS)] = []
    negative_prompt: Annotated[str, Field(max_length=LONGEST_PROMPT)] = ""
    picture: bool = False


class Problems(BaseModel):
    """The parts of sentences that the model does not know, one line each."""

    problems: list[str]


def page_file(name: str) -> tuple[bytes, str] | None:
    """The bytes of a file of the page and their tag, or None where there is no such file."""
    known = {entry.name: entry for entry in PAGE.iterdir() if entry.is_file()}
    if name not in known:
        return None
    data = known[name].read_bytes()
    return data, f'"{hashlib.sha256(data).hexdigest()[:20]}"'


@router.get("/", include_in_schema=False)
def get_page(if_none_match: Annotated[str | None, Header()] = None) -> Response:
    return _answer("index.html", if_none_match)


@router.get("/page/{name}", include_in_schema=False)
def get_page_file(name: str, if_none_match: Annotated[str | None, Header()] = None) -> Response:
    return _answer(name, if_none_match)


@router.get("/v1/about", summary="Tells what the loaded model knows, its defaults, bounds and settings", tags=["page"])
def get_about(service: Service) -> dict[str, Any]:
    return about_model(service.pipe, service.settings, service.model)


@router.post("/v1/about/problems", summary="Finds words of sentences that the model does not know", tags=["page"])
def find_problems(service: Service, sentences: TypedSentences) -> Problems:
    vocabulary = service.pipe.settings.vocabulary
    found = prompt_problems(vocabulary, sentences.prompts, sentences.negative_prompt, sentences.picture)
    return Problems(problems=list(found))


@router.get("/v1/jobs/{job_id}", summary="Tells how a result is made, and the command that makes the same", **JOB_ROUTE)
def get_job(service: Service, owner: Owner, job_id: str) -> dict[str, Any]:
    job = service.get(job_id, owner)
    return {**job.as_dict(), "request": job.request, "inputs": job.inputs, "command": command_line(job)}


@router.get(
    "/v1/jobs/{job_id}/inputs/{name}", summary="Fetches what a job was given", response_class=Response, **JOB_ROUTE
)
def get_job_input(service: Service, owner: Owner, job_id: str, name: MediaName) -> Response:
    job = service.get(job_id, owner)
    if name not in job.inputs:
        raise NotFoundError(f"{job_id} was given no {name}: expected one of {', '.join(job.inputs) or 'none'}")
    return file_answer(service.results, job.id, job.inputs[name], _kind_of(job.inputs[name]), job.inputs[name])


@router.delete("/v1/jobs/{job_id}", summary="Removes a job of any kind and its files", status_code=204, **JOB_ROUTE)
def delete_job(service: Service, owner: Owner, job_id: str) -> None:
    service.delete(job_id, owner)


def _answer(name: str, known_tag: str | None) -> Response:
    """A file of the page; a browser asks each time whether it has changed, which costs it a few bytes."""
    found = page_file(name)
    if found is None:
        return Response("there is no such file of the page\n", 404, media_type="text/plain")
    data, tag = found
    headers = {"etag": tag, "cache-control": "no-cache", "x-content-type-options": "nosniff"}
    headers |= {"content-security-policy": POLICY, "referrer-policy": "no-referrer"}
    if known_tag is not None and tag in known_tag:
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=_kind_of(name), headers=headers)


def _kind_of(name: str) -> str:
    return TYPES.get(name[name.rfind(".") :]) or mimetypes.guess_type(name)[0] or "application/octet-stream"
