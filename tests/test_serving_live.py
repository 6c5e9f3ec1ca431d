"""Live streams over a real socket: fragments as they are made, events, wishes, and the realtime protocol."""

import asyncio
import io
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import httpx
import pytest
from starlette.websockets import WebSocket
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from nova_video import NovaPipeline
from nova_video.io.fragments import boxes
from nova_video.serving import live_response, realtime
from nova_video.serving.launch import guarded_app
from nova_video.serving.pace import Pace
from nova_video.serving.serve_settings import ServeSettings
from nova_video.serving.server import make_server, open_socket, url_of
from nova_video.serving.service import JobService

CLIP = {"prompt": "a whale moving left", "seed": 1, "num_frames": 9, "sets": 4, "diffusion_steps": 2}
ENDLESS = {
    "type": "session.start",
    "prompt": "a whale moving left",
    "seed": 1,
    "endless": True,
    "sets": 4,
    "diffusion_steps": 2,
}


@dataclass(frozen=True)
class LiveServer:
    """A server on a free port, and its service."""

    service: JobService
    url: str

    def make(self, **options: Any) -> str:
        """Queues a clip, and returns its id."""
        return self.service.submit("video", CLIP | options).id

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=30)

    @asynccontextmanager
    async def socket(self, **options: Any) -> AsyncIterator[ClientConnection]:
        async with connect(f"{self.url.replace('http', 'ws')}/v1/realtime/video", max_size=None, **options) as socket:
            yield socket


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    settings = ServeSettings(folder=str(tmp_path_factory.mktemp("serve")), port=0, lead=1.0)
    service = JobService(NovaPipeline.from_pretrained(str(tiny_checkpoint)), settings)
    made, sock = guarded_app(service, settings), open_socket(settings)
    process = make_server(made.app, settings, made.close)
    thread = threading.Thread(target=lambda: process.run(sockets=[sock]))
    made.start()
    thread.start()
    yield LiveServer(service, url_of(sock))
    process.should_exit = True
    thread.join()


def decode(data: bytes) -> list[bytes]:
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0)]


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def within_a_minute() -> None:
        await asyncio.wait_for(test(), 60)

    asyncio.run(within_a_minute())


# The growing video ----------------------------------------------------------------------------------------------------


def test_viewers_of_one_stream_get_the_same_bytes(server: LiveServer) -> None:
    async def watch() -> None:
        id = server.make(num_frames=17)
        async with server.client() as client:
            answers = await asyncio.gather(*(client.get(f"/v1/videos/{id}/live.mp4") for _ in range(8)))
            late = await client.get(f"/v1/videos/{id}/live.mp4")
            now = await client.get(f"/v1/videos/{id}/live.mp4?from=now")
        assert {answer.content for answer in (*answers, late)} == {late.content}
        assert late.headers["content-type"] == "video/mp4"
        assert len(decode(late.content)) == 17
        assert len(decode(now.content)) == 4, "the newest fragment alone"
        video = server.service.results.read(id, "video.mp4")
        assert decode(late.content) == decode(video)

    run(watch)


def test_a_stream_plays_before_the_video_is_made(server: LiveServer) -> None:
    async def watch() -> None:
        id = server.make(num_frames=41, sets=8)
        async with server.client() as client, client.stream("GET", f"/v1/videos/{id}/live.mp4") as answer:
            first = await anext(answer.aiter_bytes())
            assert (await client.get(f"/v1/videos/{id}")).json()["status"] == "in_progress"
            assert [name for name, _ in boxes(first)] == ["ftyp", "moov", "moof", "mdat"]
        assert (await client_of_stop(server, id))["frames_done"] < 41

    run(watch)


async def client_of_stop(server: LiveServer, id: str) -> dict[str, Any]:
    async with server.client() as client:
        await client.post(f"/v1/videos/{id}/stop")
        await server.service.wait(id)
        found: dict[str, Any] = (await client.get(f"/v1/videos/{id}")).json()
        return found


def test_a_viewer_that_takes_nothing_is_dropped(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It neither slows the worker nor keeps more than a part of the stream in memory."""

    async def watch() -> None:
        sent: list[int] = []

        async def send(message: Any) -> None:
            sent.append(len(message.get("body", b"")))
            if len(sent) > 3:
                await asyncio.Event().wait()

        async def receive() -> Any:
            await asyncio.Event().wait()

        async def parts() -> Any:
            while True:
                yield b"x" * 1000

        response = live_response.LiveResponse(parts(), "video/mp4", stall_seconds=0.05)
        await response({}, receive, send)
        assert len(sent) == 4

    run(watch)


def test_a_client_that_leaves_ends_its_stream() -> None:
    async def watch() -> None:
        ended = asyncio.Event()

        async def parts() -> Any:
            try:
                yield b"first"
                await asyncio.Event().wait()
            finally:
                ended.set()

        async def send(message: Any) -> None:
            pass

        async def receive() -> Any:
            await asyncio.sleep(0.05)
            return {"type": "http.disconnect"}

        await live_response.LiveResponse(parts(), "video/mp4")({}, receive, send)
        assert ended.is_set()

    run(watch)


# Events and wishes ----------------------------------------------------------------------------------------------------


async def events_of(client: httpx.AsyncClient, id: str, query: str = "") -> AsyncIterator[tuple[str, dict[str, Any]]]:
    async with client.stream("GET", f"/v1/videos/{id}/events{query}") as answer:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        kind = ""
        async for line in answer.aiter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield kind, json.loads(line.removeprefix("data: "))


def test_events_tell_of_every_set_with_previews(server: LiveServer) -> None:
    async def watch() -> None:
        id = server.make()
        async with server.client() as client:
            told = [event async for event in events_of(client, id, "?previews=true")]
            again = [event async for event in events_of(client, id)]
        assert told[0][0] == "status"
        assert told[-1][1]["status"] == "completed"
        sets = [facts for kind, facts in told if kind == "set"]
        assert sets[-1]["step"] == sets[-1]["total"]
        assert any(facts.get("preview", "").startswith("data:image/webp;base64,") for facts in sets)
        assert [facts["number"] for kind, facts in told if kind == "fragment"] == [0, 1, 2]
        assert [kind for kind, _ in again] == ["status"], "of a job that has ended"

    run(watch)


def test_a_silent_stream_of_events_shows_that_it_lives() -> None:
    async def watch() -> None:
        sent = []

        async def parts() -> Any:
            await asyncio.sleep(0.1)
            yield b"news"

        async def send(message: Any) -> None:
            sent.append(message.get("body"))

        async def receive() -> Any:
            await asyncio.Event().wait()

        response = live_response.LiveResponse(parts(), "text/event-stream", b": still here\n\n", heartbeat_seconds=0.06)
        await response({}, receive, send)
        assert sent == [None, b": still here\n\n", b"news", b""]

    run(watch)


def test_pause_resume_and_stop(server: LiveServer) -> None:
    async def steer() -> None:
        id = server.make(num_frames=401, sets=8)
        place = f"/v1/videos/{id}"
        async with server.client() as client:
            steps = iter(["pause", "resume", "stop"])
            async for kind, facts in events_of(client, id):
                if (kind == "fragment" and facts["number"] == 1) or (kind == "status" and facts["paused"]):
                    await client.post(f"{place}/{next(steps)}")
                if kind == "fragment" and facts["number"] == 3:
                    await client.post(f"{place}/{next(steps)}")
            video = (await client.get(place)).json()
            assert (video["status"], video["stopped"], video["paused"]) == ("completed", True, False)
            content = (await client.get(f"{place}/content")).content
            assert len(decode(content)) == video["num_frames"] < 401
            refused = await client.post(f"{place}/pause")
            assert (refused.status_code, refused.json()["error"]["message"]) == (
                400,
                f"{id} is completed: expected a job that has not ended",
            )

    run(steer)


def test_streams_that_cannot_be(server: LiveServer) -> None:
    async def ask() -> None:
        picture = server.service.submit("image", CLIP | {"num_frames": 1}).id
        async with server.client() as client:
            for path in ("live.mp4", "events"):
                assert (await client.get(f"/v1/videos/video_0/{path}")).status_code == 404
            answer = await client.get(f"/v1/videos/{picture}/live.mp4")
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "video_id")
            answer = await client.get(f"/v1/videos/{picture}/live.mp4?from=then")
            assert "expected 'start' or 'now'" in answer.json()["error"]["message"]
            assert (await client.post("/v1/videos/video_0/stop")).status_code == 404

    run(ask)


# The realtime socket --------------------------------------------------------------------------------------------------


async def receive(socket: ClientConnection) -> dict[str, Any]:
    """The next message; a chunk comes with its data."""
    message: dict[str, Any] = json.loads(await socket.recv())
    if message["type"] == "video.chunk_metadata":
        data = await socket.recv()
        assert isinstance(data, bytes)
        assert len(data) == message["bytes"]
        message["data"] = data
    return message


async def receive_until(socket: ClientConnection, kind: str, **facts: Any) -> list[dict[str, Any]]:
    """All messages up to one of a kind with these facts."""
    found = [await receive(socket)]
    while found[-1]["type"] != kind or any(found[-1].get(name) != value for name, value in facts.items()):
        found.append(await receive(socket))
    return found


def chunks_of(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message for message in messages if message["type"] == "video.chunk_metadata"]


async def send(socket: ClientConnection, kind: str, **facts: Any) -> None:
    await socket.send(json.dumps({"type": kind, **facts}))


def test_a_session_of_so_many_frames(server: LiveServer) -> None:
    async def play() -> None:
        async with server.socket() as socket:
            words = {"format": "m4s", "size": "auto", "model": server.service.model, **CLIP}
            await send(socket, "session.start", **words)
            messages = await receive_until(socket, "session.done")
            with pytest.raises(ConnectionClosed):
                await socket.recv()
            assert socket.close_code == 1000
        assert messages[0]["type"] == "video.start"
        assert messages[0]["video"]["num_frames"] == 9
        head, *fragments = chunks_of(messages)
        assert (head["kind"], head["mime_type"][:22]) == ("init", 'video/mp4; codecs="avc')
        assert [(one["number"], one["first_frame"], one["frames"]) for one in fragments] == [
            (0, 0, 1),
            (1, 1, 4),
            (2, 5, 4),
        ]
        stream = b"".join(one["data"] for one in (head, *fragments))
        async with server.client() as client:
            assert (await client.get(f"/v1/videos/{messages[0]['id']}/live.mp4")).content == stream
        assert messages[-1]["video"]["status"] == "completed"

    run(play)


def test_an_endless_session_is_left_taken_up_and_stopped(server: LiveServer) -> None:
    async def play() -> None:
        async with server.socket() as socket:
            await socket.send(json.dumps(ENDLESS))
            id = (await receive(socket))["id"]
            first = chunks_of(await receive_until(socket, "video.chunk_metadata", number=1))
        await paused(server, id)
        kept = server.service.get(id).frames
        await asyncio.sleep(0.3)
        assert server.service.get(id).frames == kept
        async with server.socket() as socket:
            await send(socket, "session.resume", id=id, first=1)
            second = chunks_of(await receive_until(socket, "video.chunk_metadata", number=2))
            assert second[1]["data"] == first[2]["data"]
            await send(socket, "session.stop")
            messages = await receive_until(socket, "session.done")
            assert messages[-1]["video"]["stopped"]
        frames = decode(server.service.results.read(id, "video.mp4"))
        assert len(frames) == messages[-1]["video"]["num_frames"]

    run(play)


async def paused(server: LiveServer, id: str) -> None:
    while not server.service.get(id).paused:
        await asyncio.sleep(0.02)


def test_an_endless_session_does_not_run_away_from_its_viewer(server: LiveServer) -> None:
    async def play() -> None:
        async with server.socket() as socket:
            await socket.send(json.dumps(ENDLESS | {"fps": 12}))
            id = (await receive(socket))["id"]
            await send(socket, "session.ping", played=0)
            await receive_until(socket, "video.chunk_metadata", number=3)
            await send(socket, "session.ping", played=0)  # it has stopped to play
            await receive_until(socket, "session.pong")
            await asyncio.sleep(1.0)
            ahead = server.service.get(id).frames
            assert ahead <= 12 + 4 + 12, "one second and a fragment, and what its clock had played"
            await asyncio.sleep(0.5)
            assert server.service.get(id).frames == ahead
            await send(socket, "session.ping", played=ahead)
            await receive_until(socket, "video.chunk_metadata", first_frame=ahead)
            await send(socket, "session.stop")
            await receive_until(socket, "session.done")

    run(play)


def test_pace() -> None:
    pace = Pace(10, first=0, now=100.0)
    pace.send(5, 100.0)
    assert pace.played(100.2) == pytest.approx(2)
    assert pace.played(103.0) == 5, "it waits for more"
    pace.send(25, 103.0)
    assert pace.played(104.0) == pytest.approx(15)
    pace.tell(12, 104.0)
    assert pace.played(105.0) == pytest.approx(15), "it cannot have played less than before"
    pace.tell(90, 105.0)
    assert pace.played(109.0) == 25, "no more than it has"


def test_a_sentence_changes_on_the_way(server: LiveServer) -> None:
    """The clip is the one whose timeline had said so from the start, and receipts tell from which frame on."""

    async def play() -> None:
        async with server.socket() as socket:
            await send(socket, "session.start", **CLIP | {"num_frames": 21})
            event = {"prompt": "a whale moving right", "guidance_scale": 3.0}
            await send(socket, "session.interaction", interaction={"event_id": "e1", "event": event, "frame": 9})
            queued = await receive_until(socket, "session.interaction.queued")
            effect = await receive_until(socket, "session.interaction.in_effect")
            done = await receive_until(socket, "session.done")
        assert queued[-1] == {"type": "session.interaction.queued", "event_id": "e1", "frame": 9}
        assert effect[-1] == {"type": "session.interaction.in_effect", "event_id": "e1", "frame": 9}
        video = done[-1]["video"]
        words = [[0, "a whale moving left"], [9 / video["fps"], "a whale moving right"]]
        scale = video["settings"]["guidance_scale"]
        assert scale[1:] == [[9 / video["fps"], 3.0]]
        same = server.make(num_frames=21, prompt=words, guidance_scale=scale)
        await server.service.wait(same)
        read = server.service.results.read
        assert decode(read(video["id"], "video.mp4")) == decode(read(same, "video.mp4"))

    run(play)


def test_interactions_that_cannot_be(server: LiveServer) -> None:
    wrong: list[tuple[object, str]] = [
        (None, "interaction is None: expected an object with an event"),
        ({"event": {}}, "interaction is {'event': {}}: expected an object with an event"),
        ({"event": {"prompt": 3}}, "prompt is 3: expected a sentence"),
        ({"event": {"motion": [1]}}, "motion_flow is [1]: expected a number"),
        ({"event": {"guidance_scale": -1}}, "guidance_scale is -1: expected a number"),
        ({"event": {"multi_modal_data": {}}}, "unknown field multi_modal_data: expected one of prompt, motion"),
        ({"event": {"motion": 1, "motion_flow": 2}}, "got both of motion and motion_flow: expected one of them"),
        ({"event": {"prompt": "a whale"}, "frame": 2}, "frame is 2: expected"),
        ({"event": {"prompt": "a whale"}, "frame": True}, "frame is True: expected a frame of the video"),
        ({"event": {"prompt": "a whale"}, "transition_chunks": 3}, "transition_chunks is 3: expected 0"),
        ({"event": {"prompt": "a whale"}, "at": 3}, "unknown field at: expected"),
        ({"event": {"prompt": "a whale"}, "event_id": 3}, "event_id is 3: expected a text"),
    ]

    async def ask() -> None:
        async with server.socket() as socket:
            await socket.send(json.dumps(ENDLESS))
            await receive_until(socket, "video.chunk_metadata", number=1)
            for interaction, message in wrong:
                await send(socket, "session.interaction", interaction=interaction)
                error = (await receive_until(socket, "error"))[-1]
                assert (error["code"], error["message"][: len(message)]) == ("interaction_failed", message)
            await send(socket, "session.stop")
            await receive_until(socket, "session.done")

    run(ask)


def test_starts_that_cannot_be(server: LiveServer) -> None:
    """Each is answered in one line, and the next one is taken nonetheless."""
    wrong: list[tuple[str | bytes, str]] = [
        (b"\x00", "got a binary message: expected a JSON object"),
        ("{", "the message is no JSON"),
        ("[1]", "the message is [1]: expected a JSON object"),
        ("{}", "type is None: expected one, such as session.ping"),
        ('{"type": "session.stop"}', "type is 'session.stop': expected session.start or session.resume"),
        ('{"type": "session.start"}', "prompt is missing: expected a sentence"),
        ('{"type": "session.start", "prompt": "a whale", "format": "webm"}', "format is 'webm': expected one"),
        ('{"type": "session.start", "prompt": "a whale", "model": "x"}', "model is 'x': expected"),
        ('{"type": "session.start", "prompt": "a whale", "sice": "8x8"}', "unknown field sice: expected size"),
        ('{"type": "session.start", "prompt": "a whale", "endless": 2}', "endless is 2: expected"),
        (
            '{"type": "session.start", "prompt": "a whale", "endless": true, "seconds": 2}',
            "got endless and seconds: expected one of them",
        ),
        ('{"type": "session.resume"}', "id is None: expected the id of a session"),
        ('{"type": "session.resume", "id": "session_0"}', "there is no job session_0"),
        ('{"type": "session.resume", "id": "session_0", "from": 1}', "unknown field from: expected"),
    ]

    async def ask() -> None:
        async with server.socket() as socket:
            for text, message in wrong:
                await socket.send(text)
                error = await receive(socket)
                assert (error["type"], error["message"][: len(message)]) == ("error", message)
            await send(socket, "session.ping")
            assert await receive(socket) == {"type": "session.pong"}
            await send(socket, "session.start", **CLIP | {"num_frames": 5})
            await receive_until(socket, "session.done")

    run(ask)


def test_who_starts_nothing_is_sent_away(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(realtime, "START_SECONDS", 0.1)

    async def wait() -> None:
        async with server.socket() as socket:
            error = await receive(socket)
            assert (error["code"], error["message"]) == ("start_timeout", "no session was started in 0.1 seconds")
            with pytest.raises(ConnectionClosed):
                await socket.recv()
            assert socket.close_code == 1008

    run(wait)


def test_a_second_connection_takes_a_session_over(server: LiveServer) -> None:
    async def play() -> None:
        async with server.socket() as first, server.socket() as second:
            await first.send(json.dumps(ENDLESS))
            id = (await receive(first))["id"]
            await receive_until(first, "video.chunk_metadata", number=0)
            await send(second, "session.resume", id=id, first="now")
            assert (await receive_until(first, "error"))[-1]["code"] == "taken_over"
            await receive_until(second, "video.chunk_metadata", number=2)
            assert not server.service.get(id).paused
            await send(second, "session.pause")
            await receive_until(second, "session.status", paused=True)
            await send(second, "session.resume")
            await receive_until(second, "session.status", paused=False)
            await send(second, "session.stop")
            await receive_until(second, "session.done")

    run(play)


def test_a_client_that_takes_nothing_leaves_its_session_paused(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server keeps one message for it."""
    monkeypatch.setattr(realtime, "STALL_SECONDS", 0.2)
    held: list[int] = []

    async def stall_now(socket: WebSocket, data: bytes) -> None:
        held.append(len(data))
        await asyncio.Event().wait()

    monkeypatch.setattr(WebSocket, "send_bytes", stall_now)

    async def stall() -> None:
        async with server.socket() as socket:
            await socket.send(json.dumps(ENDLESS))
            id = (await receive_until(socket, "video.start"))[-1]["id"]
            await asyncio.wait_for(paused(server, id), 50)
            assert len(held) == 1

    run(stall)
