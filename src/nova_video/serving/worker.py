"""The worker: one thread that owns the pipeline and works the queue off.

**Turns.** Up to `MOST_ACTIVE` jobs are under way at once. They take turns, and a turn is one latent frame (a picture is
one frame): a short job is done after as many turns as it has frames, however long the others are. When more jobs wait,
the one that has had its share (`SHARE` seconds since it came in) is parked at the end of its turn: its state is saved,
its memory given back, and it waits behind the others for its next share.

**Order of writes.** A finished latent frame is first a fragment in the folder, then the saved state, then a number in
the database. A process that is killed in between leaves at most a fragment that the state knows nothing of; it is made
again with the same bytes.

**Sessions without end** are made as far as their viewers allow (`Job.allowed`). One that nobody watches any longer has
no turns, and is parked as paused after `VIEWERLESS` seconds, or as soon as others need its place.

**Obedience.** Whatever is wanted of a job (pause, stop, cancel) and its deadline are looked at after every set.
"""

import gc
import logging
import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nova_video.common.errors import InputError, first_line
from nova_video.io.fragments import FragmentEncoder, join_fragments
from nova_video.io.pixels import to_bytes
from nova_video.pipeline.events import FrameReady, LatentPreview, PartialFrame
from nova_video.pipeline.generation import Generation
from nova_video.pipeline.pipeline import NovaPipeline
from nova_video.pipeline.plan import Plan
from nova_video.pipeline.together import Together
from nova_video.serving.feed import Feed, JobEvent
from nova_video.serving.jobs import Change, Job, JobCommand, JobError, Status
from nova_video.serving.overview import as_png, draw_spritesheet, draw_thumbnail, read_fragment, small_webp
from nova_video.serving.provenance import complete_records, sentence_of_record, with_length
from nova_video.serving.results import (
    INIT,
    SPRITESHEET,
    STATE,
    THUMBNAIL,
    VIDEO,
    ResultFolder,
    fragment_name,
    image_name,
    partial_name,
)
from nova_video.serving.serve_settings import ServeSettings
from nova_video.serving.store import JobStore
from nova_video.serving.submission import generators_of, request_of, settings_of
from nova_video.serving.sweeper import Sweeper

MOST_ACTIVE = 4  # jobs that are in memory at once
SHARE = 10.0  # seconds of computing after which a job makes room for others that wait
VIEWERLESS = 5.0  # seconds that a session without viewers keeps its place
LOOK = 0.5  # seconds between two looks at the database, for what other processes want
TELL = 0.2  # seconds between two notes of the sets that are done
PREVIEW = 1 / 8  # seconds between two previews of a job
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # in messages of torch
DAY = 86400.0
MOST_PARTIALS = 3  # canvases on the way that a picture's caller may ask for
RECENT = 32  # jobs whose times are remembered

log = logging.getLogger(__name__)


@dataclass(eq=False)
class ActiveJob:
    """A job that is under way: its generation, and what of it is not yet in the folder."""

    job: Job
    """The job when it came in."""
    generation: Generation
    events: Iterator[Any]
    inputs: ExitStack
    """Holds the local copies of what was uploaded."""
    encoder: FragmentEncoder | None
    """None: it makes pictures."""
    current: Job = field(init=False)
    """The job as it was last written down."""
    fragments: int = 0
    frames: list[NDArray[np.uint8]] = field(default_factory=list)
    """Pixel frames of the next fragment, or the pictures."""
    changes: dict[str, Change] = field(default_factory=dict)
    """Changes that the generation was told of, by id."""
    held_at: float | None = None
    """Since when it waits for its viewers."""
    seconds: float = 0.0
    """Computed in the turns before this one, since it came in."""
    turn_at: float | None = None
    """Since when it has its turn."""
    told_at: float = 0.0
    shown_at: float = 0.0
    partials: int = 0
    """Canvases on the way that were kept."""
    sets_done: int = 0
    place: tuple[int, int] = (0, 0)
    """The latent frame in hand, and its sets that are done."""

    def __post_init__(self) -> None:
        self.current = self.job

    @property
    def id(self) -> str:
        return self.job.id

    @property
    def computed(self) -> float:
        """Seconds of computing so far, this turn's included."""
        turn = 0.0 if self.turn_at is None else time.monotonic() - self.turn_at
        return self.job.computed + self.seconds + turn

    @property
    def frames_done(self) -> int:
        """Pixel frames in the folder."""
        return 0 if self.encoder is None else self.generation.emitted - len(self.frames)

    def count_set(self, frame: int) -> dict[str, Any]:
        """Counts one more set, of this latent frame, and tells where the job stands."""
        self.sets_done += 1
        self.place = frame, 1 if frame != self.place[0] else self.place[1] + 1
        sets = len(self.generation.state.sizes(frame))
        total = self.generation.total_steps
        return {"step": self.sets_done, "total": total, "frame": frame, "set": self.place[1], "sets": sets}

    def hold(self, now: float) -> float:
        """Lets it wait for its viewers, and tells for how many seconds it has."""
        self.held_at = now if self.held_at is None else self.held_at
        return now - self.held_at

    def go_on(self) -> None:
        self.held_at = None

    def arrange(self, group: Together | None) -> None:
        """Lets its sets be made in a group or by themselves, from its next set on."""
        generation = self.generation
        if generation.group is group or self.frames or generation.hands_out:
            return
        self.leave()
        if group is not None:
            group.join(generation)
        self.events = generation.stream(preview=True)
        self.look()

    def look(self) -> None:
        """Sees where its generation stands: a stream that was closed may have been ahead."""
        at = self.generation.state
        self.sets_done = at.step
        self.place = at.done, 0 if at.open is None else at.open.sets

    def leave(self) -> None:
        """Stops sampling, and leaves its group."""
        self.events.close()  # type: ignore[attr-defined]  # a generator
        if isinstance(group := self.generation.group, Together):
            group.leave(self.generation)

    def close(self) -> None:
        try:
            self.leave()
        finally:
            self.inputs.close()


class DeadlineError(Exception):
    """A job took too long."""


class LostClaimError(Exception):
    """Another process has taken a job over, since this one had not held its claim."""


class Worker:
    """Works off the jobs of a store with one pipeline, in a thread of its own."""

    def __init__(
        self,
        pipe: NovaPipeline,
        store: JobStore,
        results: ResultFolder,
        feed: Feed,
        settings: ServeSettings,
        model: str,
    ) -> None:
        self.pipe, self.store, self.results, self.feed, self.settings = pipe, store, results, feed, settings
        self.model = model
        self.name = worker_name()
        self.active: deque[ActiveJob] = deque()
        """In the order of their turns."""
        self.times: deque[float] = deque(maxlen=RECENT)
        """Seconds that the latest finished jobs took to compute, begin to end."""
        self._wants: dict[str, JobCommand] = {}
        self._allowed: dict[str, int | None] = {}
        self._changes: dict[str, list[Change]] = {}
        self.batch = settings.batch or (4 if pipe.device.type == "cuda" else 1)
        self.group = Together(self.batch)
        self.sweeper = Sweeper(store, results, settings)
        self._alone: str | None = None
        """A job that had no memory beside others."""
        self._held: frozenset[str] = frozenset()
        """The jobs whose claims the keeper holds."""
        self._closing = threading.Event()
        self._news = threading.Event()
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)

    # From other threads -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins, with the jobs that a process of this machine left behind when it ended."""
        for name in self.store.workers():
            if is_dead(name):
                self.store.release(name)
        self._thread.start()
        self._keeper.start()

    def close(self) -> None:
        """Saves the jobs under way at their next set, and leaves them to be gone on with."""
        self._closing.set()
        self._news.set()
        for thread in (self._thread, self._keeper):
            if thread.is_alive():
                thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def mean_seconds(self) -> float:
        """Time that a job takes to compute, by the latest ones."""
        times = list(self.times)
        return sum(times) / len(times) if times else 5.0

    def poke(self, job: Job | None = None) -> None:
        """Tells of a new job, or of what is wanted of one under way."""
        if job is not None:
            self._hear(job)
        self._news.set()

    def _hear(self, job: Job) -> None:
        self._wants[job.id], self._allowed[job.id], self._changes[job.id] = job.wanted, job.allowed, job.steps

    # The threads ------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self._news.clear()
                self._admit()
                if (active := self._next_turn()) is not None:
                    self._take_turn(active)
                else:
                    self._news.wait(LOOK)
            except Exception:  # such as a database that is away for a while
                log.exception("the worker goes on after an error")
                self._closing.wait(1.0)
        for active in list(self.active):
            with suppress(Exception):
                self._park(active)

    def _keep(self) -> None:
        """Holds the claims of the jobs under way, and looks for what other processes want of them."""
        while not self._closing.wait(LOOK):
            if not self.is_alive:
                log.error("the worker's thread has ended: its jobs are left to others")
                return
            try:
                for job in self.store.renew(self.name, self._held):
                    self._hear(job)
                self.sweeper.sweep_if_due()
            except Exception:
                log.exception("the claims of the jobs under way could not be held")

    # Turns ------------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Takes jobs that wait while there is room."""
        if self._alone is not None and self._alone not in {active.id for active in self.active}:
            self._alone = None
            self._hold()
        while self._alone is None and len(self.active) < MOST_ACTIVE and not self._closing.is_set():
            job = self.store.claim(self.name)
            if job is None:
                return
            self._hold(job.id)
            self._hear(job)
            self._begin(job)

    def _hold(self, *ids: str) -> None:
        alone = () if self._alone is None else (self._alone,)
        self._held = frozenset((*ids, *alone, *(active.id for active in self.active)))

    def _begin(self, job: Job) -> None:
        """Starts a job or goes on with it from its saved state."""
        try:
            active = self._open(job)
        except Exception as error:
            self._fail(job, error)
            self._tidy()
            return
        self.active.append(active)
        started = {} if job.started_at is not None else {"started_at": time.time()}
        self._update(active, status=Status.IN_PROGRESS, paused_at=None, sets=active.generation.total_steps, **started)
        self._tell_status(active)

    def _open(self, job: Job) -> ActiveJob:
        if job.model != self.model:
            raise InputError(f"the job was for the model {job.model}: expected {self.model}, which is loaded now")
        with ExitStack() as stack:
            if self.results.has(job.id, STATE):
                (state,) = stack.enter_context(self.results.reading(job.id, STATE))
                generation = self.pipe.resume(state)
            else:
                names = list(job.inputs.values())
                paths = dict(zip(job.inputs, stack.enter_context(self.results.reading(job.id, *names)), strict=True))
                request = request_of(job.request, paths)
                generation = self.pipe.start(request, generators_of(request, self.pipe.device))
                generation.records = complete_records(generation, job, paths)
            plan = generation.plan
            encoder = None if job.kind == "image" else FragmentEncoder((plan.height, plan.width), plan.fps)
            if encoder is not None and not self.results.has(job.id, INIT):
                self.results.write(job.id, INIT, encoder.init)
            events = generation.stream(preview=True)
            active = ActiveJob(job, generation, events, stack.pop_all(), encoder)
        active.fragments = fragments_of(generation.plan, generation.emitted)
        active.look()
        active.partials = sum(self.results.has(job.id, partial_name(number, 0)) for number in range(MOST_PARTIALS))
        return active

    def _next_turn(self) -> ActiveJob | None:
        """Finds the job whose turn it is, and parks sessions that have waited long enough for their viewers."""
        now, wanted = time.monotonic(), []
        for active in list(self.active):
            if not self._waits_for_viewers(active):
                active.go_on()
                wanted.append(active)
                continue
            in_the_way = len(self.active) == MOST_ACTIVE and self.store.has_waiting()
            if active.hold(now) > VIEWERLESS or in_the_way:
                self._park(active, paused_at=time.time())
        together = self.batch > 1 and len(self.active) > 1
        for active in self.active:
            active.arrange(self.group if together else None)
        members = {active.generation: active for active in wanted if active.generation.group is not None}
        if members and wanted[0].generation in members:
            return members[self.group.turn(list(members))]
        return wanted[0] if wanted else None

    def _waits_for_viewers(self, active: ActiveJob) -> bool:
        """Tells whether a session is as far as its viewers allow, and nothing else is wanted of it."""
        allowed = self._allowed.get(active.id)
        ahead = allowed is not None and not active.frames and active.frames_done >= allowed
        return ahead and self._wants.get(active.id, "run") == "run"

    def _take_turn(self, active: ActiveJob) -> None:
        """One latent frame of a job, or less if something else is wanted of it."""
        active.turn_at, fragments = time.monotonic(), active.fragments
        try:
            going_on = (bool(active.frames) or self._obey(active)) and self._advance(active)
        except LostClaimError as error:
            log.warning("%s", error)
            self._drop(active)
            return
        except Exception as error:
            self._drop(active)
            if code_of(error) == "out_of_memory" and self.active:
                self._alone = active.id
            else:
                self._fail(active.job, error)
            self._tidy()
            if self._alone == active.id:
                self._retry_alone(active.job)
            return
        active.seconds, active.turn_at = active.computed - active.job.computed, None
        if not going_on or (active.generation.group is not None and active.fragments == fragments):
            return
        self.active.remove(active)
        self.active.append(active)
        if active.seconds > SHARE and len(self.active) == MOST_ACTIVE and self.store.has_waiting():
            self._park(active)

    def _retry_alone(self, job: Job) -> None:
        """Goes on with a job that had no memory beside others: they are parked, and wait until it has ended."""
        log.warning("no memory for the job %s beside %d others: it is made by itself", job.id, len(self.active))
        for other in list(self.active):
            self._park(other)
        self._tidy()
        found = self.store.get(job.id)
        if found is not None:
            self._hear(found)
            self._begin(found)

    def _advance(self, active: ActiveJob) -> bool:
        """Pulls events until a latent frame is in the folder, or of a group's member the next one.

        False: the job is no longer under way.
        """
        for event in active.events:
            if isinstance(event, FrameReady):
                if self._take_frame(active, event):
                    return self._obey(active)
                continue
            self._tell_set(active, event)
            if isinstance(event, PartialFrame) and not self._obey(active):
                return False
            if active.generation.group is not None:
                return True  # it may be another's turn
        self._finish(active, stopped=False)
        return False

    def _obey(self, active: ActiveJob) -> bool:
        """Does what is wanted of a job, between two sets. False: it is no longer under way."""
        job, wanted = active.job, self._wants.get(active.id, "run")
        if wanted == "cancel":
            self._cancel(active)
        elif wanted == "stop":
            self._finish(active, stopped=True)
        elif wanted == "pause":
            self._park(active, paused_at=time.time())
        elif job.deadline_at is not None and time.time() > job.deadline_at:
            raise DeadlineError(f"the job had not ended {self.settings.deadline:g} seconds after it was asked for")
        elif job.kind == "session" and active.frames_done >= self.settings.max_session * active.generation.plan.fps:
            self._finish(active, stopped=True)
        elif self._closing.is_set():
            self._park(active)
        else:
            self._change(active)
            return True
        return False

    def _change(self, active: ActiveJob) -> None:
        """Tells the generation of changes that it does not know. Those of an earlier process may be in its state."""
        for change in self._changes.get(active.id, ()):
            if change.id in active.changes or change.state == "refused":
                continue
            try:
                first = active.generation.change(**change.values, at=change.frame)
                after = replace(change, frame=first, state="accepted" if change.state == "queued" else change.state)
            except InputError as error:
                known = change.state != "queued"
                after = change if known else replace(change, state="refused", message=in_callers_words(error))
            active.changes[change.id] = after
            if after != change:
                sentence = sentence_of_record(active.generation.records[0])
                self._update(active, prompt=sentence, settings=settings_of(active.generation.plan))
                self._tell_change(active, after)

    def _tell_change(self, active: ActiveJob, change: Change) -> None:
        active.changes[change.id] = change
        if (job := self.store.set_change(active.id, change)) is not None:
            self.feed.post(active.id, JobEvent("status", job.as_dict()))

    # Frames and sets --------------------------------------------------------------------------------------------------

    def _take_frame(self, active: ActiveJob, event: FrameReady) -> bool:
        """Keeps a final frame. True: it completes a fragment, which is in the folder with the state behind it."""
        if active.encoder is None:
            pictures = [event.frame] if active.generation.unbatched else event.frame
            active.frames += [to_bytes(np.asarray(picture)) for picture in pictures]
            return False
        active.frames.append(to_bytes(event.frame))
        plan, number = active.generation.plan, active.fragments
        end = plan.first_pixel(number + 1)
        if event.index + 1 < (end if plan.num_frames is None else min(end, plan.num_frames)):
            return False
        first = active.frames_done
        data = active.encoder.encode(np.stack(active.frames), first)
        self.results.write(active.id, fragment_name(number), data)
        count = len(active.frames)
        active.frames.clear()
        active.fragments += 1
        self._save(active)
        for change in list(active.changes.values()):
            if change.state == "accepted" and change.frame is not None and change.frame < active.frames_done:
                self._tell_change(active, replace(change, state="in_effect"))
        self._update(active)
        self.feed.post(active.id, JobEvent("frame", {"index": event.index}))
        facts = {"number": number, "first_frame": first, "frames": count}
        self.feed.post(active.id, JobEvent("fragment", facts))
        return True

    def _save(self, active: ActiveJob) -> None:
        with self.results.writing(active.id, STATE) as path:
            active.generation.save(path)

    def _tell_set(self, active: ActiveJob, event: PartialFrame | LatentPreview) -> None:
        """Tells that one more set is done, with a preview if somebody wants one, and keeps canvases asked for."""
        facts, now = active.count_set(event.latent_frame), time.monotonic()
        if now - active.shown_at >= PREVIEW and self.feed.wants_previews(active.id):
            active.shown_at = now
            facts["preview"] = small_webp(self._pictures(active, event)[0])
        self.feed.post(active.id, JobEvent("set", facts))
        wanted = active.job.form.get("partial_images", 0)
        if active.partials < wanted and facts["set"] * (wanted + 1) >= facts["sets"] * (active.partials + 1):
            self._keep_partial(active, event)
        if now - active.told_at >= TELL:
            active.told_at = now
            self._update(active)

    def _keep_partial(self, active: ActiveJob, event: PartialFrame | LatentPreview) -> None:
        number = active.partials
        for image, picture in enumerate(self._pictures(active, event)):
            self.results.write(active.id, partial_name(number, image), as_png(picture))
        active.partials += 1
        self.feed.post(active.id, JobEvent("partial", {"number": number}))

    @staticmethod
    def _pictures(active: ActiveJob, event: PartialFrame | LatentPreview) -> list[NDArray[np.uint8]]:
        """The canvas so far of every picture."""
        made = event.frame
        return [to_bytes(made)] if active.generation.unbatched else [to_bytes(picture) for picture in made]

    # Ends -------------------------------------------------------------------------------------------------------------

    def _finish(self, active: ActiveJob, stopped: bool) -> None:
        """Makes the results of what is finished; of nothing, the job is cancelled."""
        if stopped and active.fragments == 0:
            self._cancel(active)
            return
        records = [with_length(record, active.frames_done) for record in active.generation.records]
        if active.encoder is None:
            for number, picture in enumerate(active.frames):
                self.results.write(active.id, image_name(number), as_png(picture, records[number]))
            self.results.write(active.id, THUMBNAIL, draw_thumbnail(active.frames[0]))
        else:
            self._join(active, records[0])
        self.results.remove(active.id, STATE)
        self.times.append(active.computed)
        self._end(active, Status.COMPLETED, stopped=stopped, frames=active.generation.emitted)

    def _join(self, active: ActiveJob, record: dict[str, Any]) -> None:
        """Writes the video, its thumbnail and its page of frames, from the fragments."""
        id, count, init = active.id, active.fragments, self.results.read(active.id, INIT)
        fragments = (self.results.read(id, fragment_name(number)) for number in range(count))
        self.results.write(id, VIDEO, join_fragments(init, fragments, record))

        def read(number: int) -> bytes:
            return init + self.results.read(id, fragment_name(number))

        self.results.write(id, SPRITESHEET, draw_spritesheet(read, count))
        self.results.write(id, THUMBNAIL, draw_thumbnail(read_fragment(read(0))[0]))

    def _cancel(self, active: ActiveJob) -> None:
        self._end(active, Status.CANCELLED)
        self.results.remove(active.id)

    def _end(self, active: ActiveJob, status: Status, **changes: Any) -> None:
        self._drop(active)
        now = time.time()
        ended = {
            "status": status,
            "ended_at": now,
            "expires_at": now + self.settings.keep_days * DAY,
            "paused_at": None,
        }
        self._update(active, worker=None, **ended, **changes)
        self._tell_status(active)

    def _park(self, active: ActiveJob, paused_at: float | None = None) -> None:
        """Saves a job and lets go of it, to be gone on with later."""
        if not active.frames:  # else what is saved already is gone on with
            self._save(active)
        self._drop(active)
        self._update(active, worker=None, lease=time.time(), paused_at=paused_at)
        self._tell_status(active)

    def _fail(self, job: Job, error: Exception) -> None:
        """Writes down why a job has failed."""
        now, code = time.time(), code_of(error)
        if code == "internal":
            log.error("the job %s failed", job.id, exc_info=error)
        else:
            log.warning("the job %s failed: %s", job.id, first_line(error))
        told = JobError(code, message_of(error, code))
        changes = {"status": Status.FAILED, "error": told, "ended_at": now, "paused_at": None}
        expires_at = now + self.settings.keep_days * DAY
        found = self.store.update(job.id, self.name, **changes, expires_at=expires_at, worker=None)
        self._wants.pop(job.id, None)
        self._allowed.pop(job.id, None)
        self._changes.pop(job.id, None)
        if found is not None:
            self.results.remove(job.id)
            self.feed.post(job.id, JobEvent("status", found.as_dict()))

    def _drop(self, active: ActiveJob) -> None:
        """Lets go of a job's memory."""
        with suppress(ValueError):
            self.active.remove(active)
        self._hold()
        self._wants.pop(active.id, None)
        self._allowed.pop(active.id, None)
        self._changes.pop(active.id, None)
        with suppress(Exception):  # what sampling had left behind when it failed
            active.close()

    def _tidy(self) -> None:
        """Gives memory back after an error."""
        self.pipe.engines.drop_graphs()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _update(self, active: ActiveJob, **changes: Any) -> None:
        """Writes down where a job stands, and what has changed besides."""
        stands = {
            "sets_done": active.sets_done,
            "frames": active.frames_done,
            "fragments": active.fragments,
            "computed": active.computed,
        }
        job = self.store.update(active.id, self.name, **stands | changes)
        if job is None:
            raise LostClaimError(f"the job {active.id} is another process's now")
        active.current = job

    def _tell_status(self, active: ActiveJob) -> None:
        self.feed.post(active.id, JobEvent("status", active.current.as_dict()))


def fragments_of(plan: Plan, frames: int) -> int:
    """The number of fragments that hold so many frames: the first ends with latent frame 0, and so on."""
    return 0 if frames == 0 else max(0, -(-(frames - plan.offset - 1) // plan.temporal_stride)) + 1


def in_callers_words(error: InputError) -> str:
    """One line about a change that is not possible: `at` of the generation is `frame` of its caller."""
    return first_line(error).replace("at is ", "frame is ", 1)


def code_of(error: Exception) -> str:
    """The code of an error, for a job's caller."""
    if isinstance(error, DeadlineError):
        return "deadline"
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    ):
        return "out_of_memory"
    return "invalid_request" if isinstance(error, InputError) else "internal"


def message_of(error: Exception, code: str) -> str:
    """One line about an error; of one of the server's own, no more than its kind."""
    if code == "out_of_memory":
        return "the job needed more memory than there is: expected fewer frames, a smaller size or fewer pictures"
    return f"the server had an error ({type(error).__name__})" if code == "internal" else first_line(error)


def worker_name() -> str:
    """The name of this process among those that share a database."""
    return f"{socket.gethostname()}/{os.getpid()}/{secrets.token_hex(4)}"


def is_dead(name: str) -> bool:
    """True for a process of this machine that is no more; this one's own number is an earlier one's."""
    host, _, rest = name.partition("/")
    number = rest.partition("/")[0]
    if host != socket.gethostname() or not number.isdecimal():
        return False
    return int(number) == os.getpid() or not Path(f"/proc/{number}").exists()
