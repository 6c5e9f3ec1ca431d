"""The guard stands before every route: names, keys, origins, sizes and time-outs of requests, and their ids.

`Guard` wraps the application. A refusal is a JSON object in the form of OpenAI's errors; what is behind the guard never
sees the request. `request.state.owner` is the hash of the API key, empty without keys, and `request.state.request_id`
the id that the answer and the log name.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException

from nova_video.common.errors import InputError
from nova_video.io.text import read_text
from nova_video.serving.logs import REQUEST_ID, log_event
from nova_video.serving.serve_settings import ServeSettings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Observer = Callable[[Scope, int, float], None]
"""Is told of each request that ended, with its status and seconds."""

OWN_NAMES = ("localhost", "127.0.0.1", "[::1]")
OPEN_PATHS = re.compile(r"/|/docs|/openapi\.json|/healthz|/readyz|/favicon\.(ico|svg)|/page/.*")
"""Paths that need no API key: the page, which asks for one, the description of the API, and probes."""
SAFE = ("GET", "HEAD", "OPTIONS")
KEY_PROTOCOL = "openai-insecure-api-key."
"""A browser's WebSocket cannot send headers: its key comes as a subprotocol, as OpenAI's realtime API has it."""
REQUEST_ID_FORM = re.compile(r"[A-Za-z0-9._-]{1,64}")
LEAST_RATE = 10_000
"""Bytes a second that a body must come at, after `patience`."""
LEAST_KEY = 16
JSON_DEPTH = 64
JSON_DIGITS = 400
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True)
class Refusal:
    """A request that is not taken, and why."""

    status: int
    message: str
    code: str
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": None, "code": self.code}
        return json.dumps({"error": error}).encode()


class RefusalError(HTTPException):
    """Raised inside the application, where it reads a body that is refused."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.status, refusal.message)
        self.refusal = refusal


# Keys -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ApiKeys:
    """The API keys of a server, each as its SHA-256. None: the server needs none."""

    digests: tuple[bytes, ...] | None = None

    @classmethod
    def read(cls, path: str | None) -> "ApiKeys":
        """The keys in a file: one a line, as it is or as sha256:HEX. Lines that begin with # are left out."""
        if path is None:
            return cls()
        lines = [line.strip() for line in read_text(Path(path)).splitlines()]
        found = [_digest(path, line) for line in lines if line and not line.startswith("#")]
        if not found:
            raise InputError(f"{path} holds no API key: expected one a line")
        return cls(tuple(dict.fromkeys(found)))

    def owner(self, key: str) -> str | None:
        """The name that jobs of this key are kept under; None: no such key."""
        if self.digests is None:
            return ""
        digest = hashlib.sha256(key.encode()).digest()
        fits = [hmac.compare_digest(digest, known) for known in self.digests]  # all, so that the time tells nothing
        return digest.hex()[:32] if any(fits) else None


def _digest(path: str, line: str) -> bytes:
    if line.startswith("sha256:"):
        if re.fullmatch(r"[0-9a-f]{64}", line[7:]) is None:
            raise InputError(f"{path} has a line that begins with sha256: expected 64 hexadecimal digits after it")
        return bytes.fromhex(line[7:])
    if len(line) < LEAST_KEY or re.fullmatch(r"[\x21-\x7e]+", line) is None:
        raise InputError(
            f"{path} has an API key of {len(line)} characters: expected at least {LEAST_KEY} of ASCII, without spaces"
        )
    return hashlib.sha256(line.encode()).digest()


def key_of_request(headers: Headers) -> str:
    """The API key that a request brings; empty without one."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    return next((name.removeprefix(KEY_PROTOCOL) for name in _protocols(headers) if name.startswith(KEY_PROTOCOL)), "")


def _protocols(headers: Headers) -> list[str]:
    return [name.strip() for name in headers.get("sec-websocket-protocol", "").split(",") if name.strip()]


# Names and origins ----------------------------------------------------------------------------------------------------


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def known_hosts(settings: ServeSettings) -> frozenset[str] | None:
    """Names that the Host header may have; None: any."""
    if settings.hosts is not None:
        return frozenset({*_split(settings.hosts), *OWN_NAMES})
    if is_loopback(settings.host):
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        return frozenset({host, *OWN_NAMES})
    return None


def known_origins(settings: ServeSettings) -> tuple[str, ...]:
    """Origins whose pages may call the server, such as https://example.org; * is every one."""
    found = tuple(origin.rstrip("/") for origin in _split(settings.cors or ""))
    for origin in found:
        parts = urlsplit(origin)
        if origin != "*" and (parts.scheme not in ("http", "https") or not parts.netloc or parts.path or parts.query):
            raise InputError(f"cors is {origin!r}: expected origins such as https://example.org, separated by commas")
    return found


def _split(text: str) -> list[str]:
    return [part.strip().lower() for part in text.split(",") if part.strip()]


def _name_of(host: str) -> str:
    """The Host header without its port."""
    return host.rsplit(":", 1)[0].lower() if re.search(r":\d+$", host) else host.lower()


# Bodies ---------------------------------------------------------------------------------------------------------------


class BodyReader:
    """Hands on the body of one request, and refuses what is too large or too slow while it arrives."""

    def __init__(self, receive: Receive, limit: int, patience: float) -> None:
        self.receive = receive
        self.limit = limit
        self.patience = patience
        self.refusal: Refusal | None = None
        self._began = time.monotonic()
        self._bytes = 0
        self._whole = False

    async def __call__(self) -> Message:
        if self.refusal is not None:
            raise RefusalError(self.refusal)
        if self._whole:
            return await self.receive()
        allowed = self._began + self.patience + self._bytes / LEAST_RATE - time.monotonic()
        try:
            message = await asyncio.wait_for(self.receive(), min(self.patience, max(allowed, 0.001)))
        except TimeoutError:
            text = f"the body came too slowly: {self._bytes:,} bytes so far"
            raise self._refuse(Refusal(408, text, "request_timeout")) from None
        self._bytes += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._bytes > self.limit:
            raise self._refuse(too_large(self.limit))
        return message

    def _refuse(self, refusal: Refusal) -> RefusalError:
        self.refusal = refusal
        return RefusalError(refusal)


def too_large(limit: int) -> Refusal:
    text = f"the body has more than {limit:,} bytes: expected at most that (nova serve --body-mb)"
    return Refusal(413, text, "body_too_large")


def read_json(data: bytes) -> Any:
    """The value in a JSON body; InputError for what is none, or nests or counts beyond all reason."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"the body has the byte 0x{data[error.start]:02x} at {error.start}: expected UTF-8") from None
    _check_depth(text)
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_int=_whole_number, parse_float=_finite_number)
        _check_letters(value)
        return value
    except json.JSONDecodeError as error:
        raise InputError(f"the body is no JSON: {error.msg} at line {error.lineno} column {error.colno}") from None


def _check_depth(text: str) -> None:
    depth = 0
    for bracket in re.finditer(r'"(?:[^"\\]+|\\.)*+"?|[\[{]|[\]}]', text, re.DOTALL):
        mark = bracket[0]
        depth += (mark in "[{") - (mark in "]}") if len(mark) == 1 else 0
        if depth > JSON_DEPTH:
            raise InputError(f"the body nests more than {JSON_DEPTH} lists and objects: expected at most that")


def _check_letters(value: Any) -> None:
    """Refuses texts with half a letter of UTF-16 or with the letter 0, which no database and no file keeps."""
    if isinstance(value, str) and ("\0" in value or re.search("[\ud800-\udfff]", value)):
        raise InputError("the body has a text with letters that are none: expected Unicode without NUL")
    if isinstance(value, dict):
        _check_letters(list(value))
        _check_letters(list(value.values()))
    elif isinstance(value, list):
        for each in value:
            _check_letters(each)


def _no_constant(word: str) -> Any:
    raise InputError(f"the body has {word}: expected finite numbers")


def _finite_number(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise InputError(f"the body has {text[:20]}: expected finite numbers")
    return number


def _whole_number(text: str) -> int:
    if len(text) > JSON_DIGITS:
        raise InputError(f"the body has a number of {len(text)} digits: expected at most {JSON_DIGITS}")
    return int(text)


# The guard ------------------------------------------------------------------------------------------------------------


class Guard:
    """Checks every request before the application sees it, and writes one line a request into the log."""

    def __init__(
        self,
        app: App,
        settings: ServeSettings,
        keys: ApiKeys | None = None,
        is_closing: Callable[[], bool] = lambda: False,
        observers: Iterable[Observer] = (),
    ) -> None:
        self.app = app
        self.limit = int(settings.body_mb * 1e6)
        self.patience = settings.patience
        self.keys = ApiKeys.read(settings.api_key) if keys is None else keys
        self.hosts = known_hosts(settings)
        self.origins = known_origins(settings)
        self.is_closing = is_closing
        self.observers = tuple(observers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers, began = Headers(scope=scope), time.monotonic()
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID_FORM.fullmatch(given) else f"req_{secrets.token_hex(8)}"
        token = REQUEST_ID.set(request_id)
        named = {**SECURITY_HEADERS, **self._cors_headers(headers), "x-request-id": request_id}
        reader = BodyReader(receive, self.limit, self.patience)
        offered = [name for name in _protocols(headers) if not name.startswith(KEY_PROTOCOL)]
        answer = Answer(scope, send, named, reader, offered[0] if offered else None)
        try:
            refusal = self._refusal(scope, headers)
            if refusal is not None:
                await answer.refuse(refusal, receive)
            elif scope["type"] == "websocket":
                await self.app(scope, receive, answer)
            elif scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await answer.allow()
            else:
                await self._pass(scope, headers, reader, answer)
        finally:
            seconds = time.monotonic() - began
            for observe in self.observers:
                observe(scope, answer.status, seconds)
            if scope["path"] not in ("/healthz", "/readyz", "/metrics"):
                what = scope.get("method", "WEBSOCKET")
                log_event("request", method=what, path=scope["path"], status=answer.status, seconds=seconds)
            REQUEST_ID.reset(token)

    async def _pass(self, scope: Scope, headers: Headers, reader: BodyReader, answer: "Answer") -> None:
        taken: Receive = reader
        if headers.get("content-type", "").partition(";")[0].strip().lower().endswith("json"):
            try:
                taken = await checked_json(reader)
            except RefusalError as error:
                await answer.refuse(error.refusal)
                return
            except InputError as error:
                await answer.refuse(Refusal(400, str(error), "invalid_json"))
                return
        try:
            await self.app(scope, taken, answer)
        except RefusalError as error:
            if answer.status:
                raise
            await answer.refuse(error.refusal)

    def _refusal(self, scope: Scope, headers: Headers) -> Refusal | None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or (self.hosts is not None and _name_of(hosts[0]) not in self.hosts):
            expected = ", ".join(sorted(self.hosts or ["one name"]))
            text = f"the Host header is {', '.join(hosts)[:60]!r}: expected {expected}"
            return Refusal(403, f"{text} (nova serve --hosts)", "unknown_host")
        method = scope.get("method", "")
        if method not in SAFE and not self._is_welcome(headers):
            text = f"pages of {headers.get('origin', '')[:60]!r} may not call this server (nova serve --cors)"
            return Refusal(403, text, "unknown_origin")
        preflight = method == "OPTIONS" and "access-control-request-method" in headers
        owner = self.keys.owner(key_of_request(headers))
        if owner is None and not preflight and not (scope["type"] == "http" and OPEN_PATHS.fullmatch(scope["path"])):
            text = "expected an API key of this server, as in the header Authorization: Bearer KEY"
            return Refusal(401, text, "invalid_api_key", {"www-authenticate": "Bearer"})
        scope.setdefault("state", {})
        scope["state"]["owner"] = owner or ""
        scope["state"]["request_id"] = REQUEST_ID.get()
        if self.is_closing() and method not in SAFE:
            return Refusal(503, "the server is shutting down", "shutting_down", {"retry-after": "5"})
        length = headers.get("content-length", "0")
        if not re.fullmatch(r"\d{1,19}", length):
            return Refusal(400, f"content-length is {length[:40]!r}: expected a number of bytes", "invalid_header")
        if int(length) > self.limit:
            return too_large(self.limit)
        if headers.get("content-encoding", "identity").lower() != "identity":
            text = f"content-encoding is {headers['content-encoding'][:40]!r}: expected a body as it is"
            return Refusal(415, text, "unsupported_encoding")
        return None

    def _is_welcome(self, headers: Headers) -> bool:
        """True for what no browser sent for another site's page, and for origins that are allowed."""
        origin = headers.get("origin")
        if origin is None:
            return headers.get("sec-fetch-site", "none") in ("none", "same-origin")
        return urlsplit(origin).netloc.lower() == headers["host"].lower() or self._allows(origin)

    def _allows(self, origin: str) -> bool:
        return "*" in self.origins or origin.lower() in self.origins

    def _cors_headers(self, headers: Headers) -> dict[str, str]:
        """Headers that let another site's page read the answer, if it may."""
        origin = headers.get("origin")
        if origin is None or not self._allows(origin):
            return {"vary": "Origin"} if self.origins else {}
        found = {"access-control-allow-origin": origin, "vary": "Origin"}
        found["access-control-expose-headers"] = "x-request-id, openai-poll-after-ms, retry-after"
        found["cross-origin-resource-policy"] = "cross-origin"
        return found


async def checked_json(reader: BodyReader) -> Receive:
    """The whole of a JSON body after a check of it, to be read again by the application."""
    parts: list[bytes] = []
    while True:
        message = await reader()
        if message["type"] != "http.request":
            return _then([message], reader)
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            break
    data = b"".join(parts)
    if data:
        await asyncio.to_thread(read_json, data)
    return _then([{"type": "http.request", "body": data, "more_body": False}], reader)


def _then(messages: list[Message], rest: Receive) -> Receive:
    """Messages that are there already, and then what comes."""
    waiting = iter(messages)

    async def receive() -> Message:
        message = next(waiting, None)
        return await rest() if message is None else message

    return receive


class Answer:
    """Sends the answer to one request, with the headers that every answer has."""

    def __init__(
        self, scope: Scope, send: Send, headers: dict[str, str], reader: BodyReader, protocol: str | None
    ) -> None:
        """`protocol` is the subprotocol that a WebSocket takes, if the application names none."""
        self.scope = scope
        self.send = send
        self.headers = headers
        self.reader = reader
        self.protocol = protocol
        self.status = 0
        """Its status; 0: nothing was sent."""
        self._replaced = False

    async def __call__(self, message: Message) -> None:
        kind = message["type"]
        if kind == "websocket.accept":
            self.status = 101
            if message.get("subprotocol") is None and self.protocol is not None:
                message = {**message, "subprotocol": self.protocol}
        elif kind == "http.response.start":
            if self.reader.refusal is not None:
                self._replaced = True
                await self.refuse(self.reader.refusal)
                return
            self.status = message["status"]
            message = {**message, "headers": list(message.get("headers", []))}
            headers = MutableHeaders(raw=message["headers"])
            for name, value in self.headers.items():
                headers.setdefault(name, value)
        elif self._replaced and kind == "http.response.body":
            return
        await self.send(message)

    async def refuse(self, refusal: Refusal, receive: Receive | None = None) -> None:
        """Answers with an error; a WebSocket's first message is to be received before."""
        body = refusal.body()
        named = {**self.headers, **refusal.headers, "content-type": "application/json"}
        await self._send(refusal.status, named, body, receive)

    async def allow(self) -> None:
        """Answers a preflight of a browser."""
        named = dict(self.headers)
        if "access-control-allow-origin" in named:
            named["access-control-allow-methods"] = "GET, POST, DELETE"
            named["access-control-allow-headers"] = "authorization, content-type, last-event-id, x-request-id"
            named["access-control-max-age"] = "600"
        await self._send(204, named, b"", None)

    async def _send(self, status: int, named: dict[str, str], body: bytes, receive: Receive | None) -> None:
        self.status = status
        if body:
            named["content-length"] = str(len(body))
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in named.items()]
        prefix = "http"
        if self.scope["type"] == "websocket":
            if receive is not None:
                await receive()
            if "websocket.http.response" not in self.scope.get("extensions", {}):
                await self.send({"type": "websocket.close", "code": 1008})
                return
            prefix = "websocket.http"
        await self.send({"type": f"{prefix}.response.start", "status": status, "headers": raw})
        await self.send({"type": f"{prefix}.response.body", "body": body})
