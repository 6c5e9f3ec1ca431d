"""`JobService`: all that can be done with jobs, for every route, without anything of HTTP.

Its plain methods may be called from any thread. Those that say so wait, and are for threads; the async ones are for
event loops.
"""

import asyncio
import secrets
import tempfile
import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nova_video.common.errors import InputError
from nova_video.pipeline.pipeline import NovaPipeline
from nova_video.serving.feed import Feed, JobEvent
from nova_video.serving.jobs import Change, Job, JobCommand, Kind, new_id
from nova_video.serving.logs import log_event
from nova_video.serving.results import VIDEO, ResultFolder, fragment_name, image_name
from nova_video.serving.serve_settings import ServeSettings, own_folder
from nova_video.serving.store import JobStore
from nova_video.serving.submission import (
    MEDIA,
    Upload,
    as_json,
    check_change,
    check_request,
    checked_options,
    request_of,
    sentence_of,
    settings_of,
    warnings_of,
)
from nova_video.serving.uploads import check_upload
from nova_video.serving.worker import Worker

DAY = 86400.0
LOOK = 0.5  # seconds after which readers look for what other processes have done


class NotFoundError(LookupError):
    """There is no such job, or it is another owner's."""


class QueueFullError(Exception):
    """No more jobs are taken now."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds after which a place may be free."""


@dataclass(frozen=True)
class Fragment:
    """A piece of a live stream, which plays behind `live/init.mp4`."""

    number: int
    first_frame: int
    frames: int
    data: bytes


class JobService:
    """The jobs of one server: taken, checked, queued, watched, steered and removed."""

    def __init__(self, pipe: NovaPipeline, settings: ServeSettings, model: str | None = None) -> None:
        """Opens the folder and the database; `start` begins to work. `model` is the name that answers say."""
        self.pipe, self.settings = pipe, settings
        self.model = model or str(getattr(pipe.config, "_name_or_path", None) or "nova")
        self.results = ResultFolder(settings.folder or str(own_folder()))
        self.store = JobStore(settings.database or _own_database(self.results))
        self.feed = Feed()
        self.worker = Worker(pipe, self.store, self.results, self.feed, settings, self.model)

    def start(self) -> None:
        """Begins to work, also on jobs that an earlier process left behind."""
        self.worker.start()

    def close(self) -> None:
        """Saves the jobs under way at their next set, to be gone on with by the next process. Waits for it."""
        self.worker.close()
        self.store.close()

    # Jobs -------------------------------------------------------------------------------------------------------------

    def submit(
        self,
        kind: Kind,
        options: Mapping[str, Any],
        media: Mapping[str, Upload | Job] | None = None,
        form: Mapping[str, Any] | None = None,
        owner: str = "",
    ) -> Job:
        """Checks a request and queues it. For threads: it reads what was uploaded.

        `options` are fields of `GenerateRequest` by name, and `media` "image", "video" or "mask_image"; a job stands
        for its result. `form` is kept for the answers. Its `partial_images` (0 to 3) lets a picture's canvas be kept
        after equal shares of its sets, as `partial-0-0.png` and so on.
        """
        values = checked_options(kind, options)
        uploads = {name: self._upload_of(each) for name, each in (media or {}).items()}
        if foreign := [name for name in uploads if name not in MEDIA]:
            raise InputError(f"media has {foreign[0]}: expected {', '.join(MEDIA)}")
        for name, each in uploads.items():
            check_upload(name, each.data, self.settings, still=name == "image")
        files = {name: f"{name}{each.safe_suffix}" for name, each in uploads.items()}
        with tempfile.TemporaryDirectory() as folder:
            paths = {name: Path(folder) / file for name, file in files.items()}
            for name, path in paths.items():
                path.write_bytes(uploads[name].data)
            try:
                request = request_of(values, paths)
                plan = check_request(self.pipe, kind, self.settings, request)
            except InputError as error:
                raise InputError(str(error).replace(f"{folder}/", "")) from None
        now = time.time()
        job = Job(
            id=new_id(kind),
            kind=kind,
            model=self.model,
            prompt=sentence_of(request),
            request=as_json(values),
            settings=settings_of(plan),
            warnings=warnings_of(self.pipe, request, plan),
            inputs=files,
            form=dict(form or {}),
            owner=owner,
            first_frames=plan.first_pixel(1),
            stride=plan.temporal_stride,
            allowed=max(1, round(self.settings.lead * plan.fps)) if plan.num_frames is None else None,
            created_at=now,
            deadline_at=None if kind == "session" else now + self.settings.deadline,
        )
        for name, file in files.items():
            self.results.write(job.id, file, uploads[name].data)
        if (bound := self.store.add(job, self.settings.queue, self.settings.queue_per_key)) is not None:
            self.results.remove(job.id)
            raise self._full(bound)
        self.worker.poke()
        log_event("job", id=job.id, status=job.status, kind=job.kind, prompt=job.prompt)
        return job

    def _upload_of(self, source: Upload | Job) -> Upload:
        """Returns what was uploaded, or another job's result."""
        if isinstance(source, Upload):
            return source
        name = image_name(0) if source.kind == "image" else VIDEO
        try:
            return Upload(self.results.read(source.id, name), Path(name).suffix)
        except FileNotFoundError:
            raise InputError(f"{source.id} is {source.status}: expected a job with a result") from None

    def _full(self, bound: str) -> QueueFullError:
        most, whose = self.settings.queue, "wait"
        if bound == "owner":
            most, whose = self.settings.queue_per_key, "of this key wait or run"
        seconds = max(1, min(600, round(self.worker.mean_seconds)))
        return QueueFullError(f"{most} jobs {whose} already: expected a request in {seconds} seconds", seconds)

    def get(self, id: str, owner: str = "") -> Job:
        job = self.store.get(id)
        if job is None or job.owner != owner:
            raise NotFoundError(f"there is no job {id[:80]}")
        return job

    def list(
        self,
        owner: str = "",
        kinds: Collection[Kind] = (),
        after: str | None = None,
        limit: int = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> tuple[Sequence[Job], bool]:
        """A page of an owner's jobs behind the one named `after`, and whether there are more; no kinds are all."""
        if after is not None:
            self.get(after, owner)
        return self.store.page(owner, kinds, after, limit, order == "desc")

    def want(self, id: str, wanted: JobCommand, owner: str = "") -> Job:
        """Says what is wanted of a job: it is done within one set. One that has ended can only be stopped in vain."""
        job = self.get(id, owner)
        if job.status.ended:
            if wanted in ("stop", "cancel"):
                return job
            raise InputError(f"{id} is {job.status}: expected a job that has not ended")
        changed = self.store.want(id, wanted, time.time() + self.settings.keep_days * DAY)
        if changed is None:
            return self.get(id, owner)
        self.worker.poke(changed)
        if changed.status.ended:
            self.results.remove(id)
        self.feed.post(id, JobEvent("status", changed.as_dict()))
        return changed

    def change(
        self,
        id: str,
        *,
        prompt: str | None = None,
        motion_flow: float | None = None,
        guidance_scale: float | None = None,
        frame: int | None = None,
        owner: str = "",
    ) -> Change:
        """Changes a job's sentence or numbers from a pixel frame on, or as soon as possible. Its events tell when."""
        job = self.get(id, owner)
        given = {"prompt": prompt, "motion_flow": motion_flow, "guidance_scale": guidance_scale}
        values = {name: value for name, value in given.items() if value is not None}
        check_change(job, values, frame)
        change = Change(id=f"change_{secrets.token_hex(8)}", frame=frame, values=values)
        changed = self.store.set_change(id, change)
        if changed is None:
            raise InputError(f"{id} has ended: expected a job that has not")
        self.worker.poke(changed)
        self.feed.post(id, JobEvent("status", changed.as_dict()))
        return change

    def allow(self, id: str, frames: int) -> None:
        """Lets a session without end be made up to a frame, since somebody will have watched those before it."""
        if (job := self.store.allow(id, frames)) is not None:
            self.worker.poke(job)

    def delete(self, id: str, owner: str = "") -> Job:
        """Removes a job and its files; one under way is cancelled first. For threads: waits a set at most."""
        job = self.want(id, "cancel", owner)
        while not job.status.ended and self.worker.is_alive:
            time.sleep(0.005)
            found = self.store.get(id)
            if found is None:
                return job
            job = found
        self.results.remove(id)
        self.store.remove(id)
        return job

    # Watching ---------------------------------------------------------------------------------------------------------

    async def events(self, id: str, previews: bool = False, owner: str = "") -> AsyncGenerator[JobEvent, None]:
        """The present state of a job, then its news, until it has ended. Closing the iterator ends it as well."""
        reader = self.feed.open(id, previews)
        try:
            told = await asyncio.to_thread(self.get, id, owner)
            known = told.fragments
            yield JobEvent("status", told.as_dict())
            while not told.status.ended:
                event = await reader.next(LOOK)
                if event is not None and event.type != "status":
                    if event.type == "fragment":
                        known = event.data["number"] + 1
                    yield event
                    continue
                try:
                    now = await asyncio.to_thread(self.get, id, owner)
                except NotFoundError:
                    return
                for number in range(known, now.fragments):  # another process made them
                    first, end = now.fragment_frames(number)
                    yield JobEvent("fragment", {"number": number, "first_frame": first, "frames": end - first})
                known = max(known, now.fragments)
                before = {each.id: each.state for each in told.steps}
                for change in now.steps:
                    if before.get(change.id) != change.state:
                        yield JobEvent("change", change.news)
                if now.without_claim != told.without_claim:
                    told = now
                    yield JobEvent("status", now.as_dict())
        finally:
            self.feed.close(id, reader)

    async def fragments(
        self, id: str, first: int | Literal["now"] = 0, owner: str = ""
    ) -> AsyncGenerator[Fragment, None]:
        """The fragments of a job from one on, then those that come, until it has ended.

        Each reader takes them from the folder at its own speed, and holds one at a time.
        """
        reader = self.feed.open(id)
        try:
            job = await asyncio.to_thread(self.get, id, owner)
            number = max(0, job.fragments - 1) if first == "now" else first
            while True:
                while number < job.fragments:
                    try:
                        data = await asyncio.to_thread(self.results.read, id, fragment_name(number))
                    except FileNotFoundError:
                        return
                    yield fragment_of(job, number, data)
                    number += 1
                if job.status.ended:
                    return
                while (event := await reader.next(LOOK)) is not None and event.type not in ("fragment", "status"):
                    pass
                try:
                    job = await asyncio.to_thread(self.get, id, owner)
                except NotFoundError:
                    return
        finally:
            self.feed.close(id, reader)

    async def wait(self, id: str, owner: str = "") -> Job:
        """Waits until a job has ended."""
        async for _ in self.events(id, owner=owner):
            pass
        return await asyncio.to_thread(self.get, id, owner)


def fragment_of(job: Job, number: int, data: bytes) -> Fragment:
    """A fragment with its place in the clip."""
    first, end = job.fragment_frames(number)
    return Fragment(number, first, end - first, data)


def _own_database(results: ResultFolder) -> str:
    if results.local is None:
        raise InputError("folder is not on this machine: expected database as well, a SQLAlchemy URL")
    return f"sqlite:///{results.local / 'jobs.sqlite'}"
