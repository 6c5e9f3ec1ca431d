"""A job: one video, picture or live session that was asked for, as the database keeps it."""

import secrets
import time
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, Literal

Kind = Literal["video", "image", "session"]
JobCommand = Literal["run", "pause", "stop", "cancel"]


class Status(StrEnum):
    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (Status.COMPLETED, Status.FAILED, Status.CANCELLED)


@dataclass(frozen=True)
class JobError:
    """Why a job failed, for its caller."""

    code: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Change:
    """Other words or numbers for a job from one of its frames on."""

    id: str
    frame: int | None
    """The pixel frame from which it holds; while it is queued, the one asked for. None: the next possible one."""
    values: dict[str, Any]
    """prompt, motion_flow, guidance_scale: those that are new."""
    state: Literal["queued", "accepted", "in_effect", "refused"] = "queued"
    """Accepted: the generation knows of it. In effect: frames with it are there."""
    message: str | None = None
    """Why it was refused."""

    @property
    def news(self) -> dict[str, Any]:
        """The facts that its caller is told."""
        told = {} if self.message is None else {"message": self.message}
        return {"id": self.id, "frame": self.frame, "state": self.state} | told


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row of the database. It is never changed: `JobStore.update` gives the next one."""

    id: str
    kind: Kind
    model: str
    prompt: str
    """The sentence, or those of a timeline, for lists."""
    request: dict[str, Any]
    """Settings of `GenerateRequest` as JSON, by their names, the seed among them; no media. "inf" is no end."""
    settings: dict[str, Any] = field(default_factory=dict)
    """All settings of the result, by the names of `Options`: the plan that the request was resolved to."""
    warnings: list[str] = field(default_factory=list)
    """Words of the prompt that the model does not know, one line each."""
    inputs: dict[str, str] = field(default_factory=dict)
    """image, video or mask_image -> the name of the uploaded file in the job's folder."""
    form: dict[str, Any] = field(default_factory=dict)
    """Further facts for the answers to the caller: size, seconds, output_format, remixed_from_video_id, ..."""
    owner: str = ""
    """A hash of the API key that asked for it; empty where the server has none."""
    status: Status = Status.QUEUED
    wanted: JobCommand = "run"
    """The wish of its caller, which the worker obeys at the next set."""
    paused_at: float | None = None
    stopped: bool = False
    """It was stopped, and its finished frames are the result."""
    sets_done: int = 0
    sets: int | None = None
    """Sets of the whole job; None: not known yet, or a session without end."""
    frames: int = 0
    """Finished pixel frames."""
    fragments: int = 0
    """Finished fragments of the live stream, one a latent frame."""
    first_frames: int = 1
    """Pixel frames of the first fragment; each later one has `stride` of them, or fewer at the end."""
    stride: int = 4
    computed: float = 0.0
    """Seconds of computing so far."""
    allowed: int | None = None
    """Pixel frames of a session without end that may be made by now; None: all. Its viewers allow more."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """Changes on the way, in order: the fields of `Change`."""
    error: JobError | None = None
    created_at: float = field(default_factory=time.time)
    started_at: float | None = None
    ended_at: float | None = None
    expires_at: float | None = None
    deadline_at: float | None = None
    """It fails if it has not ended by then. Time that it was paused is added."""
    worker: str | None = None
    """The process that computes it, until `lease`."""
    lease: float = 0.0
    """Time until which that process has it. Of a job that waits for its next turn: the end of its last one."""

    @property
    def paused(self) -> bool:
        return self.paused_at is not None

    @property
    def progress(self) -> int:
        """Per cent of its sets that are done."""
        if self.status is Status.COMPLETED:
            return 100
        return 0 if not self.sets else min(99, 100 * self.sets_done // self.sets)

    @property
    def without_claim(self) -> "Job":
        """The job as its caller sees it, to be compared."""
        return replace(self, worker=None, lease=0.0, allowed=None)

    @property
    def steps(self) -> list[Change]:
        """Its changes as records."""
        return [Change(**each) for each in self.changes]

    def fragment_frames(self, number: int) -> tuple[int, int]:
        """The first pixel frame of a finished fragment, and the one behind its last."""
        first = 0 if number == 0 else self.first_frames + self.stride * (number - 1)
        return first, min(self.first_frames + self.stride * number, self.frames)

    def as_dict(self) -> dict[str, Any]:
        """The facts that its caller may know, as JSON."""
        facts = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in PRIVATE_FIELDS}
        error = None if self.error is None else vars(self.error)
        return facts | {"status": str(self.status), "paused": self.paused, "progress": self.progress, "error": error}


PRIVATE_FIELDS = (
    "allowed",
    "owner",
    "worker",
    "lease",
    "wanted",
    "inputs",
    "request",
)  # fields that are the server's own


def new_id(kind: Kind) -> str:
    """A name that nobody guesses, in the form that clients know: video_..., image_..., session_..."""
    return f"{kind}_{secrets.token_hex(16)}"
