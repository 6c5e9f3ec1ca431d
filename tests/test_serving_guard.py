"""Tests of what stands before the routes: keys, names, origins, sizes and time-outs, over a real socket."""

import hashlib
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from websockets.sync.client import connect

from nova_video.common.errors import InputError
from nova_video.serving.guard import ApiKeys, Guard, known_origins, read_json
from nova_video.serving.logs import LineFormatter, log_event
from nova_video.serving.serve_settings import ServeSettings
from nova_video.serving.server import make_server, open_socket, url_of

KEY = "sk-0123456789abcdef"


async def echo(request: Request) -> JSONResponse:
    body = await request.body()
    form = await request.form() if "multipart" in request.headers.get("content-type", "") else {}
    return JSONResponse({"bytes": len(body), "fields": len(form), "owner": request.state.owner})


async def say_hello(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text("hello")
    await websocket.close()


@contextmanager
def server(keys: ApiKeys | None = None, closing: bool = False, **values: Any) -> Iterator[str]:
    """The guard before an application that tells what it read, at a free port."""
    settings = ServeSettings(**{"port": 0, "patience": 0.4, "body_mb": 0.1, **values})
    app = Starlette(routes=[Route("/echo", echo, methods=["GET", "POST"]), WebSocketRoute("/socket", say_hello)])
    with open_socket(settings) as sock:
        running = make_server(Guard(app, settings, keys, lambda: closing), settings)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        url = url_of(sock)
        while not running.started:
            time.sleep(0.01)
        try:
            yield url
        finally:
            running.should_exit = True
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with server() as found:
        yield found


def raw(url: str, data: bytes, pieces: list[bytes] | None = None) -> tuple[int, bytes]:
    """Status and body of what is answered to bytes, and to pieces of which one is sent each 0.1 s."""
    port = int(url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=3) as sock:
        sock.sendall(data)
        for piece in pieces or []:
            time.sleep(0.1)
            sock.sendall(piece)
        answer = b""
        while part := sock.recv(65536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def head(method: str = "POST", path: str = "/echo", **headers: str) -> bytes:
    named = {"host": "localhost", "connection": "close", **headers}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in named.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


JSON = {"content_type": "application/json"}
REFUSED = {
    "a body that says it is too large": (413, head(content_length="100001") + b"x"),
    "a body in chunks that becomes too large": (
        413,
        head(transfer_encoding="chunked") + b"ffff\r\n" + b"x" * 65535 + b"\r\nffff\r\n" + b"x" * 65535 + b"\r\n",
    ),
    "a length that is no number": (400, head(content_length="ten")),
    "a negative length": (400, head(content_length="-1")),
    "two lengths": (400, head(content_length="1").replace(b"\r\n\r\n", b"\r\ncontent-length: 2\r\n\r\n") + b"xx"),
    "a chunk whose size is no number": (400, head(transfer_encoding="chunked") + b"zz\r\nhello\r\n"),
    "an unknown transfer encoding": (400, head(transfer_encoding="gzip") + b"x"),
    "a compressed body": (415, head(content_encoding="gzip", content_length="2") + b"\x1f\x8b"),
    "what is no HTTP": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n"),
    "a head without end": (400, b"GET /echo HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 70_000),
    "a header with a line break in its name": (400, head().replace(b"host", b"ho\nst:")),
    "no host": (400, b"GET /echo HTTP/1.1\r\n\r\n"),
    "two hosts": (400, head().replace(b"\r\n\r\n", b"\r\nhost: localhost\r\n\r\n")),
    "a host that was rebound": (403, head("GET", host="attacker.example")),
    "a host that looks like this one": (403, head("GET", host="localhost.attacker.example:80")),
    "a page of another site": (403, head(origin="http://attacker.example", content_length="0")),
    "a page without an origin": (403, head(origin="null", content_length="0")),
    "JSON with NaN": (400, head(content_length="11", **JSON) + b'{"a": NaN }'),
    "JSON with Infinity": (400, head(content_length="16", **JSON) + b'{"a": -Infinity}'),
    "JSON with a number beyond floats": (400, head(content_length="9", **JSON) + b"[1e99999]"),
    "JSON with a number of 5000 digits": (400, head(content_length="5000", **JSON) + b"1" * 5000),
    "JSON that nests 20000 lists": (400, head(content_length="40000", **JSON) + b"[" * 20000 + b"]" * 20000),
    "JSON that nests in an open string": (400, head(content_length="40001", **JSON) + b'"' + b'\\"' * 20000),
    "JSON that breaks off": (400, head(content_length="5", **JSON) + b'{"a":'),
    "JSON in UTF-16": (400, head(content_length="8", **JSON) + '{"a":1}'.encode("utf-16")[:8]),
    "JSON in Latin 1": (400, head(content_length="6", **JSON) + b'{"\xe9":1'),
    "half a body": (408, head(content_length="10") + b"hello"),
    "half a chunk": (408, head(transfer_encoding="chunked") + b"a\r\nhello"),
    "half a JSON body": (408, head(content_length="10", **JSON) + b"{"),
    "half a head": (408, b"POST /echo HTTP/1.1\r\nhost: loc"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_each_is_refused_within_a_second_and_the_next_request_is_unharmed(url: str, name: str) -> None:
    status, data = REFUSED[name]
    began = time.monotonic()
    answered, body = raw(url, data)
    assert answered == status
    assert time.monotonic() - began < 1
    assert json.loads(body)["error"]["message"]
    assert httpx.post(f"{url}/echo", content=b"hello").json()["bytes"] == 5


@pytest.mark.parametrize("start", [head(content_length="1000"), b"GET /echo HTTP/1.1\r\n"], ids=["body", "head"])
def test_what_trickles_is_refused_though_each_piece_comes_in_time(url: str, start: bytes) -> None:
    began = time.monotonic()
    status, _ = raw(url, start, [b"x"] * 3)
    assert status == 408
    assert time.monotonic() - began < 0.65  # 0.3 s and then 0.4 s of silence would be more


def test_what_is_taken_names_its_request_and_reads_as_it_was_sent(url: str) -> None:
    answer = httpx.post(f"{url}/echo", json={"a": [1, 2.5, "ü]]"]}, headers={"x-request-id": "mine-1"})
    assert answer.json() == {"bytes": len(answer.request.content), "fields": 0, "owner": ""}
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in answer.headers
    other = httpx.get(f"{url}/echo", headers={"x-request-id": "no good\tone", "origin": "http://other.example"})
    assert other.status_code == 200
    assert other.headers["x-request-id"].startswith("req_")
    assert "access-control-allow-origin" not in other.headers


def test_a_key_is_needed_and_names_the_owner(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    second = "another-key-of-23-bytes"
    file.write_text(f"# ours\n{KEY}\n\nsha256:{hashlib.sha256(second.encode()).hexdigest()}\n")
    with server(api_key=str(file)) as url:
        refused = httpx.get(f"{url}/echo")
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert refused.headers["www-authenticate"] == "Bearer"
        for wrong in (KEY[:-1], KEY + "x", f"sha256:{hashlib.sha256(KEY.encode()).hexdigest()}", "x"):
            assert httpx.get(f"{url}/echo", headers={"authorization": f"Bearer {wrong}"}).status_code == 401
        owners = [
            httpx.get(f"{url}/echo", headers={"authorization": f"Bearer {key}"}).json()["owner"]
            for key in (KEY, second)
        ]
        assert owners == [hashlib.sha256(key.encode()).hexdigest()[:32] for key in (KEY, second)]
        assert httpx.get(f"{url}/healthz").status_code == 404  # open, but not in this application
        assert httpx.get(f"{url}/page/../echo", headers={"authorization": ""}).status_code == 401
        with pytest.raises(Exception, match="401"):
            connect(f"{url.replace('http', 'ws')}/socket")
        offered: list[Any] = ["realtime", f"openai-insecure-api-key.{KEY}"]
        with connect(f"{url.replace('http', 'ws')}/socket", subprotocols=offered) as sock:
            assert (sock.recv(), sock.subprotocol) == ("hello", "realtime")


@pytest.mark.parametrize(("text", "said"), [("", "no API key"), ("short", "5 characters"), ("sha256:ab", "64 hex")])
def test_a_file_of_keys_that_protects_nothing_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(InputError, match=said):
        ApiKeys.read(str(tmp_path / "keys"))


def test_pages_of_named_origins_may_call() -> None:
    with server(cors="https://good.example, http://localhost:3000") as url:
        page = {"origin": "https://good.example"}
        answer = httpx.post(f"{url}/echo", headers=page)
        assert answer.headers["access-control-allow-origin"] == "https://good.example"
        asked = {"access-control-request-method": "POST"}
        allowed = httpx.options(f"{url}/echo", headers=page | asked)
        assert (allowed.status_code, allowed.headers["access-control-allow-methods"]) == (204, "GET, POST, DELETE")
        other = {"origin": "https://bad.example"}
        assert "access-control-allow-origin" not in httpx.options(f"{url}/echo", headers=other | asked).headers
        assert httpx.post(f"{url}/echo", headers=other).status_code == 403
        for origin, opens in (("https://good.example", True), ("https://bad.example", False), (url, True)):
            if opens:
                connect(f"{url.replace('http', 'ws')}/socket", origin=origin).close()  # type: ignore[arg-type]
            else:
                with pytest.raises(Exception, match="403"):
                    connect(f"{url.replace('http', 'ws')}/socket", origin=origin)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected origins"):
        known_origins(ServeSettings(cors="good.example"))


def test_a_server_that_shuts_down_takes_no_more_jobs_but_answers() -> None:
    with server(closing=True) as url:
        refused = httpx.post(f"{url}/echo")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert httpx.get(f"{url}/echo").status_code == 200


def test_a_taken_port_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1 port {port}: Address already in use"):
            open_socket(ServeSettings(port=port))


def test_json_of_strings_full_of_brackets_is_read() -> None:
    value = {"text": "[" * 200 + '\\"' * 50, "list": [[[1]]], "more": "}" * 100}
    assert read_json(json.dumps(value).encode()) == value


def test_the_log_is_one_line_an_event_without_prompts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nova_video.serving")
    log_event("job", prompt="a secret\nwish", seconds=1.25, note="two words", nothing=None, request_id="req_1")
    record = caplog.records[-1]
    line = LineFormatter(as_json=False, prompts=False).format(record)
    assert line.endswith(' info job request_id=req_1 seconds=1.25 note="two words"')
    told = json.loads(LineFormatter(as_json=True, prompts=True).format(record))
    assert {**told, "time": ""} == {
        "time": "",
        "level": "info",
        "event": "job",
        "request_id": "req_1",
        "prompt": "a secret\nwish",
        "seconds": 1.25,
        "note": "two words",
    }
    assert "\n" not in LineFormatter(as_json=False, prompts=True).format(record)
