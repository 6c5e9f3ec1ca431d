"""`WS /v1/realtime/video`: one viewer and one live session, over JSON messages and fragments of mp4.

The client sends objects with a `type`:

- session.start: the words of a video request, and `endless` for no end; or session.resume: `id`, and `first`, the
  fragment to begin with. One of them within `START_SECONDS`.
- session.interaction: `interaction` has `event_id`, `event` (prompt, motion, guidance_scale) and perhaps `frame`, from
  which on it is to hold. At the next possible frame without it.
- session.pause, session.resume without id, session.stop, and session.ping, which may have `played`: how many frames
  the viewer has played.

The server sends video.start, then video.chunk_metadata with one binary message right behind it for the head of the
stream and for each fragment; session.interaction.queued and session.interaction.in_effect; session.status whenever
something changes; video.preview, if `previews` asked for them; session.pong; error, in one line with a code; and
session.done at the end.

A client that leaves, or takes nothing for `STALL_SECONDS`, leaves its session paused and kept. A session without end
is made no more than `lead` seconds ahead of what its client has played.
"""

import asyncio
import json
import time
from contextlib import aclosing, suppress
from typing import Any, Literal

from fastapi import APIRouter, WebSocket, WebSocketDisconnect

from nova_video.common.checks import quote
from nova_video.common.errors import InputError, unknown
from nova_video.io.fragments import mime_type
from nova_video.serving.answers import video_object
from nova_video.serving.bodies import read_object
from nova_video.serving.jobs import Job, JobCommand, Status
from nova_video.serving.pace import Pacemaker
from nova_video.serving.results import INIT
from nova_video.serving.routes_live import facts_of_event, moving_job
from nova_video.serving.routes_videos import video_request
from nova_video.serving.routing import in_thread, owner_of, service_of
from nova_video.serving.schemas import SessionStart, WordError
from nova_video.serving.service import JobService, NotFoundError, QueueFullError

router = APIRouter()

START_SECONDS = 10.0
"""A client that has not started a session after so long is sent away."""
STALL_SECONDS = 60.0
"""A client that takes nothing for so long has left."""
EVENT_WORDS = {
    "prompt": "prompt",
    "motion": "motion_flow",
    "motion_flow": "motion_flow",
    "guidance_scale": "guidance_scale",
}
"""Words of an interaction -> the name that `JobService.change` has for it."""
CHUNKS = (None, 0, 1)
"""Lengths of a transition: a change holds at once, from its frame on."""
WISHES: dict[str, JobCommand] = {"session.pause": "pause", "session.resume": "run", "session.stop": "stop"}
REFUSALS = (InputError, NotFoundError, QueueFullError)
POLICY = 1008  # the code of a WebSocket that is closed since its client did not keep to the rules


class LeaveError(Exception):
    """The connection ends, with a last error for its client."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Seats:
    """The connections of sessions: one each, the newest."""

    def __init__(self) -> None:
        self._taken: dict[str, asyncio.Event] = {}

    def take(self, id: str) -> asyncio.Event:
        """Takes a session over; the event that comes back is set when the next one does."""
        if (before := self._taken.get(id)) is not None:
            before.set()
        self._taken[id] = asyncio.Event()
        return self._taken[id]

    def leave(self, id: str, seat: asyncio.Event) -> bool:
        """Leaves a session; False if another connection has it already."""
        if self._taken.get(id) is not seat:
            return False
        del self._taken[id]
        return True


@router.websocket("/v1/realtime/video")
async def play_realtime(socket: WebSocket) -> None:
    await Connection(socket, service_of(socket), owner_of(socket), socket.app.state.seats).serve()


class Connection:
    """One client's connection, from its start to its end."""

    def __init__(self, socket: WebSocket, service: JobService, owner: str, seats: Seats) -> None:
        self.socket, self.service, self.owner, self.seats = socket, service, owner, seats
        self._lock = asyncio.Lock()  # one message, or a pair of them, at a time
        self._events: dict[str, str | None] = {}
        """Changes that this client asked for, by their ids -> its own ids of them."""
        self._previews = False

    async def serve(self) -> None:
        """Runs the connection to its end. Nobody is told of a client that left."""
        await self.socket.accept()
        code = 1000
        with suppress(WebSocketDisconnect, TimeoutError):
            try:
                job, first = await self._start()
                await self._take_part(job, first)
            except LeaveError as error:
                code = POLICY
                await self._tell_error(error.code, str(error))
            await asyncio.wait_for(self.socket.close(code), STALL_SECONDS)

    # Start ------------------------------------------------------------------------------------------------------------

    async def _start(self) -> tuple[Job, int | Literal["now"]]:
        """The session that the client starts or takes up again, and the fragment that it begins with."""
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                async with asyncio.timeout(end - time.monotonic()):
                    message = await self._receive()
            except TimeoutError:
                raise LeaveError("start_timeout", f"no session was started in {START_SECONDS:g} seconds") from None
            try:
                if message["type"] == "session.start":
                    return await in_thread(self._submit, message), 0
                if message["type"] == "session.resume":
                    return await in_thread(self._take_up, message)
                if message["type"] != "session.ping":
                    raise WordError(
                        f"type is {quote(message['type'])}: expected session.start or session.resume", "type"
                    )
                await self._send({"type": "session.pong"})
            except REFUSALS as error:
                await self._tell_error(code_of_refusal(error), str(error))

    def _submit(self, message: dict[str, Any]) -> Job:
        words = {word: value for word, value in message.items() if word != "type"}
        if words.get("endless") is True:
            if told := {"num_frames", "seconds"} & words.keys():
                raise WordError(f"got endless and {min(told)}: expected one of them", "endless")
            words["num_frames"] = "inf"
        self._previews = words.get("previews") is True
        return video_request(self.service, words, self.owner, SessionStart).submit("session")

    def _take_up(self, message: dict[str, Any]) -> tuple[Job, int | Literal["now"]]:
        if others := message.keys() - {"type", "id", "first", "previews"}:
            raise unknown("field", min(others)[:60], ["id", "first", "previews"])
        id, first = message.get("id"), message.get("first", 0)
        if not isinstance(id, str):
            raise WordError(f"id is {quote(id)}: expected the id of a session", "id")
        job = moving_job(self.service, id, self.owner)
        if first != "now" and (type(first) is not int or not 0 <= first <= job.fragments):
            raise WordError(f"first is {quote(first)}: expected now, or a fragment from 0 to {job.fragments}", "first")
        self._previews = message.get("previews") is True
        if not job.status.ended:
            job = self.service.want(id, "run", self.owner)
        return job, first

    # The session ------------------------------------------------------------------------------------------------------

    async def _take_part(self, job: Job, first: int | Literal["now"]) -> None:
        """Plays a session; one that its client leaves is paused, unless another connection has taken it over."""
        seat = self.seats.take(job.id)
        try:
            await self._play(job, first, seat)
        finally:
            if self.seats.leave(job.id, seat):
                await asyncio.shield(asyncio.to_thread(self._pause, job))

    def _pause(self, job: Job) -> None:
        with suppress(InputError, NotFoundError):  # it has ended, or was deleted
            if not self.service.get(job.id, self.owner).status.ended:
                self.service.want(job.id, "pause", self.owner)

    async def _play(self, job: Job, first: int | Literal["now"], seat: asyncio.Event) -> None:
        """Plays a session to its end, or until its client leaves."""
        await self._send({"type": "video.start", "id": job.id, "video": video_object(job).model_dump(mode="json")})
        async with Pacemaker(self.service, job) as pace:
            sending = asyncio.ensure_future(self._send_video(job, first, pace))
            listening = asyncio.ensure_future(self._listen(job, pace))
            telling = asyncio.ensure_future(self._tell_news(job))
            leaving = asyncio.ensure_future(seat.wait())
            tasks = {sending, listening, leaving}
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if sending in done and sending.exception() is None:  # the last news of it may still be on the way
                    await asyncio.wait({telling}, timeout=STALL_SECONDS)
            finally:
                for task in (*tasks, telling):
                    task.cancel()
                await asyncio.gather(*tasks, telling, return_exceptions=True)
        if leaving in done:
            raise LeaveError("taken_over", "another connection has taken the session up")
        for task in done:
            task.result()
        await self._send_end(job)

    async def _send_end(self, job: Job) -> None:
        """Tells how a session has ended."""
        try:
            job = await asyncio.to_thread(self.service.get, job.id, self.owner)
        except NotFoundError:
            raise LeaveError("cancelled", "the session was deleted") from None
        if job.error is not None:
            raise LeaveError(job.error.code, job.error.message)
        if job.status is not Status.COMPLETED:
            raise LeaveError(str(job.status), f"the session is {job.status}")
        await self._send({"type": "session.done", "id": job.id, "video": video_object(job).model_dump(mode="json")})

    async def _send_video(self, job: Job, first: int | Literal["now"], pace: Pacemaker) -> None:
        """Sends the head of the stream, then its fragments as they come, each behind its facts."""
        begun = False
        async with aclosing(self.service.fragments(job.id, first, self.owner)) as fragments:
            async for fragment in fragments:
                if not begun:
                    init = await asyncio.to_thread(self.service.results.read, job.id, INIT)
                    await self._send({"kind": "init", "mime_type": mime_type(init)}, init)
                    pace.begin(fragment.first_frame)
                    begun = True
                facts = {"number": fragment.number, "first_frame": fragment.first_frame, "frames": fragment.frames}
                await self._send({"kind": "fragment", **facts}, fragment.data)
                pace.send(fragment.first_frame + fragment.frames)

    async def _tell_news(self, job: Job) -> None:
        """Tells of changes that are in effect, of the session's state and, if asked for, its canvas."""
        told: tuple[Any, ...] = ()
        async with aclosing(self.service.events(job.id, self._previews, self.owner)) as events:
            async for event in events:
                facts = facts_of_event(event)
                if event.type == "status" and told != (told := (facts["status"], facts["paused"])):
                    await self._send({"type": "session.status", "status": told[0], "paused": told[1]})
                elif event.type == "change":
                    await self._tell_change(facts)
                elif event.type == "set" and "preview" in facts:
                    await self._send({"type": "video.preview", **facts})

    async def _tell_change(self, facts: dict[str, Any]) -> None:
        """Tells that a change is in effect, or is not possible."""
        event_id = self._events.get(facts["id"], facts["id"])
        if facts["state"] == "refused":
            await self._tell_error("interaction_failed", facts["message"], event_id)
        elif facts["state"] == "in_effect":
            await self._send({"type": "session.interaction.in_effect", "event_id": event_id, "frame": facts["frame"]})

    # What the client says ---------------------------------------------------------------------------------------------

    async def _listen(self, job: Job, pace: Pacemaker) -> None:
        """Does what the client says, until it leaves."""
        while True:
            message = await self._receive()
            try:
                await self._obey(job, pace, message)
            except REFUSALS as error:
                await self._tell_error(code_of_refusal(error), str(error))

    async def _obey(self, job: Job, pace: Pacemaker, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind == "session.interaction":
            await self._change(job, message)
        elif kind in WISHES and message.keys() == {"type"}:
            await in_thread(self.service.want, job.id, WISHES[kind], self.owner)
        elif kind == "session.ping":
            if (played := message.get("played")) is not None:
                if type(played) is not int or played < 0:
                    raise WordError(f"played is {quote(played)}: expected how many frames were played", "played")
                pace.tell(played)
            await self._send({"type": "session.pong"})
        elif kind in ("session.start", *WISHES):
            raise WordError(f"{kind} came in a running session: expected it on a connection of its own", "type")
        else:
            raise unknown("type", str(kind)[:60], ["session.interaction", "session.ping", *WISHES])

    async def _change(self, job: Job, message: dict[str, Any]) -> None:
        """Queues a change, and says so."""
        given = message.get("interaction")
        event_id = given.get("event_id") if isinstance(given, dict) else None
        try:
            values = values_of_interaction(given)
            async with self._lock:  # the receipt comes before the one for its effect
                change = await in_thread(lambda: self.service.change(job.id, owner=self.owner, **values))
                self._events[change.id] = event_id
                receipt = {"event_id": event_id, "frame": change.frame}
                await self._send_now({"type": "session.interaction.queued", **receipt})
        except REFUSALS as error:
            await self._tell_error("interaction_failed", str(error), event_id)

    # Messages ---------------------------------------------------------------------------------------------------------

    async def _receive(self) -> dict[str, Any]:
        """The next message that is an object with a type; the client is told of others."""
        while True:
            received = await self.socket.receive()
            if received["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(received.get("code", 1006))
            try:
                text = received.get("text")
                if text is None:
                    raise InputError("got a binary message: expected a JSON object")
                message = read_object(text, "the message")
                if not isinstance(message.get("type"), str):
                    raise WordError(f"type is {quote(message.get('type'))}: expected one, such as session.ping", "type")
                return message
            except InputError as error:
                await self._tell_error(code_of_refusal(error), str(error))

    async def _tell_error(self, code: str, message: str, event_id: str | None = None) -> None:
        facts = {} if event_id is None else {"event_id": event_id}
        await self._send({"type": "error", "code": code, "message": message, **facts})

    async def _send(self, message: dict[str, Any], data: bytes | None = None) -> None:
        """Sends a message, or the facts of a chunk and the chunk, with no other message in between."""
        async with self._lock:
            if data is None:
                await self._send_now(message)
                return
            await self._send_now({"type": "video.chunk_metadata", **message, "bytes": len(data)})
            await asyncio.wait_for(self.socket.send_bytes(data), STALL_SECONDS)

    async def _send_now(self, message: dict[str, Any]) -> None:
        await asyncio.wait_for(self.socket.send_text(json.dumps(message)), STALL_SECONDS)


def values_of_interaction(given: object) -> dict[str, Any]:
    """The arguments of `JobService.change` that an interaction means."""
    if not isinstance(given, dict) or not isinstance(given.get("event"), dict) or not given["event"]:
        raise WordError(f"interaction is {quote(given)}: expected an object with an event", "interaction")
    if others := given.keys() - {"event_id", "event", "frame", "transition_chunks"}:
        raise unknown("field", min(others)[:60], ["event_id", "event", "frame", "transition_chunks"])
    if not isinstance(given.get("event_id"), str | None):
        raise WordError(f"event_id is {quote(given['event_id'])}: expected a text", "event_id")
    if given.get("transition_chunks") not in CHUNKS:
        chunks = quote(given["transition_chunks"])
        raise WordError(f"transition_chunks is {chunks}: expected 0, a change holds at once", "transition_chunks")
    values: dict[str, Any] = {}
    for word, value in given["event"].items():
        name = EVENT_WORDS.get(word)
        if name is None:
            raise unknown("field", word[:60], list(EVENT_WORDS))
        if name in values:
            raise WordError("got both of motion and motion_flow: expected one of them", word)
        values[name] = value
    frame = given.get("frame")
    if frame is not None:
        if type(frame) is not int or frame < 0:
            raise WordError(f"frame is {quote(frame)}: expected a frame of the video", "frame")
        values["frame"] = frame
    return values


def code_of_refusal(error: Exception) -> str:
    """The code of a request that is refused."""
    if isinstance(error, NotFoundError):
        return "not_found"
    if isinstance(error, QueueFullError):
        return "queue_full"
    return (error.code if isinstance(error, WordError) else None) or "invalid_request"
