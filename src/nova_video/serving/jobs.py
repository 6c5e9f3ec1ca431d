"""A job: one video, picture or live session that was asked for, as the database keeps it."""

import secrets
import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

Kind = Literal["video", "image", "session"]
Wanted = Literal["run", "pause", "stop", "cancel"]


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
class Job:
    """One row of the database. It is never changed: `JobStore.update` gives the next one."""

    id: str
    kind: Kind
    model: str
    prompt: str
    """The sentence, or those of a timeline, for lists."""
    request: dict[str, Any]
    """Settings of `GenerateRequest` as JSON, by their names, the seed among them; no media."""
    inputs: dict[str, str] = field(default_factory=dict)
    """image, video or mask_image -> the name of the uploaded file in the job's folder."""
    form: dict[str, Any] = field(default_factory=dict)
    """What the answers to the caller say besides: size, seconds, output_format, remixed_from_video_id, ..."""
    owner: str = ""
    """A hash of the API key that asked for it; empty where the server has none."""
    status: Status = Status.QUEUED
    wanted: Wanted = "run"
    """What its caller wants of it; the worker obeys at the next set."""
    paused: bool = False
    stopped: bool = False
    """It was stopped, and its finished frames are the result."""
    sets_done: int = 0
    sets: int | None = None
    """Sets of the whole job; None: not known yet, or a session without end."""
    frames: int = 0
    """Finished pixel frames."""
    error: JobError | None = None
    created_at: float = field(default_factory=time.time)
    started_at: float | None = None
    ended_at: float | None = None
    expires_at: float | None = None
    worker: str | None = None
    """The process that computes it, until `lease`."""
    lease: float = 0.0

    @property
    def progress(self) -> int:
        """Per cent of its sets that are done."""
        if self.status is Status.COMPLETED:
            return 100
        return 0 if not self.sets else min(99, 100 * self.sets_done // self.sets)


def new_id(kind: Kind) -> str:
    """A name that nobody guesses, in the form that clients know: video_..., image_..., session_..."""
    return f"{kind}_{secrets.token_hex(16)}"
