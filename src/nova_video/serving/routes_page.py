"""The page at `/`, and the routes that it needs besides the API: what the model knows, and how a result was made."""

import hashlib
import mimetypes
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Header, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from nova_video.serving.about import about_model, prompt_problems
from nova_video.serving.command_line import command_line

if TYPE_CHECKING:
    from nova_video.serving.service import JobService

PAGE = files("nova_video.serving") / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page loads from this server alone, runs no inline code and is shown in no frame."""
TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}
LONGEST_PROMPT = 10_000
MOST_PROMPTS = 100


class Sentences(BaseModel):
    """Sentences that somebody types, to be checked against the words of the model."""

    model_config = ConfigDict(extra="forbid")

    prompts: Annotated[list[Annotated[str, Field(max_length=LONGEST_PROMPT)]], Field(max_length=MOST_PROMPTS)] = []
    negative_prompt: Annotated[str, Field(max_length=LONGEST_PROMPT)] = ""
    picture: bool = False


class Problems(BaseModel):
    """What the model does not know of sentences, one line each."""

    problems: list[str]


@cache
def page_file(name: str) -> tuple[bytes, str] | None:
    """The bytes of a file of the page and their tag, or None where there is no such file."""
    known = {entry.name: entry for entry in PAGE.iterdir() if entry.is_file()}
    if name not in known:
        return None
    data = known[name].read_bytes()
    return data, f'"{hashlib.sha256(data).hexdigest()[:20]}"'


def page_router(service: "JobService") -> APIRouter:
    """The routes of the page, over a service of jobs."""
    router = APIRouter()

    @router.get("/", include_in_schema=False)
    def page(if_none_match: Annotated[str | None, Header()] = None) -> Response:
        return _answer("index.html", if_none_match)

    @router.get("/page/{name}", include_in_schema=False)
    def file(name: str, if_none_match: Annotated[str | None, Header()] = None) -> Response:
        return _answer(name, if_none_match)

    @router.get("/v1/about", summary="What the loaded model knows, its defaults, bounds and settings", tags=["page"])
    def about() -> dict[str, Any]:
        return about_model(service.pipe, service.settings, service.model)

    @router.post("/v1/about/problems", summary="Words of sentences that the model does not know", tags=["page"])
    def problems(sentences: Sentences) -> Problems:
        vocabulary = service.pipe.settings.vocabulary
        found = prompt_problems(vocabulary, sentences.prompts, sentences.negative_prompt, sentences.picture)
        return Problems(problems=list(found))

    @router.get("/v1/jobs/{id}", summary="A job, its settings and the command that makes the same", tags=["page"])
    def job(id: str, request: Request) -> dict[str, Any]:
        found = service.get(id, getattr(request.state, "owner", ""))
        return {
            "id": found.id,
            "kind": found.kind,
            "status": found.status,
            "paused": found.paused,
            "stopped": found.stopped,
            "progress": found.progress,
            "frames": found.frames,
            "created_at": int(found.created_at),
            "error": found.error and {"code": found.error.code, "message": found.error.message},
            "request": found.request,
            "inputs": found.inputs,
            "command": command_line(found),
        }

    return router


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
    suffix = name[name.rfind(".") :]
    kind = TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
    return Response(data, media_type=kind, headers=headers)
