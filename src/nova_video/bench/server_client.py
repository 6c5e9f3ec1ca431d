"""A small client of `nova serve` by Python's own library, for measuring it: requests, forms and server-sent events."""

import contextlib
import http.client
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from nova_video.common.errors import InputError

START_SECONDS = 600
"""Time that a server may take to load and to warm up."""


class ServerError(InputError):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, retry_after: float) -> None:
        super().__init__(f"the server answered {status}: {message}")
        self.status = status
        self.retry_after = retry_after


@dataclass(frozen=True)
class ServerClient:
    """Speaks to one server, over a new connection for each request."""

    url: str
    key: str | None = None
    timeout: float = 600.0
    """Seconds without a byte before a request is given up."""
    headers: Mapping[str, str] = field(default_factory=dict)

    def send(
        self, method: str, path: str, body: bytes | None = None, kind: str = "application/json"
    ) -> http.client.HTTPResponse:
        """The answer, whose body is still to be read. ServerError for one that is no success."""
        parts = urlsplit(self.url)
        maker = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        if parts.hostname is None or parts.scheme not in ("http", "https"):
            raise InputError(f"url is {self.url!r}: expected one such as http://127.0.0.1:8000")
        connection = maker(parts.hostname, parts.port, timeout=self.timeout)
        headers = {"connection": "close", **self.headers}
        if self.key is not None:
            headers["authorization"] = f"Bearer {self.key}"
        if body is not None:
            headers["content-type"] = kind
        try:
            connection.request(method, parts.path.rstrip("/") + path, body, headers)
            answer = connection.getresponse()
        except OSError as error:
            connection.close()
            raise InputError(f"{self.url} does not answer: {error}") from error
        if answer.status >= 400:
            text = answer.read().decode("utf-8", "replace")
            with contextlib.suppress(ValueError, TypeError, KeyError):
                text = json.loads(text)["error"]["message"]
            raise ServerError(answer.status, text[:300], float(answer.headers.get("retry-after", 1)))
        return answer

    def read(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> bytes:
        with self.send(method, path, body, kind) as answer:
            return answer.read()

    def ask(self, method: str, path: str, values: Mapping[str, Any] | None = None) -> Any:
        """The JSON of an answer, to JSON."""
        body = None if values is None else json.dumps(values).encode()
        return json.loads(self.read(method, path, body))

    def create_video(self, fields: Mapping[str, Any], files: Mapping[str, bytes] | None = None) -> dict[str, Any]:
        """A new job; waits where the server says that its queue is full."""
        body, kind = as_form(fields, files or {})
        while True:
            try:
                return dict(json.loads(self.read("POST", "/v1/videos", body, kind)))
            except ServerError as error:
                if error.status != 429:
                    raise
                time.sleep(error.retry_after)

    def events(self, id: str, previews: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
        """The news of a job until it has ended."""
        with self.send("GET", f"/v1/videos/{id}/events{'?previews=1' if previews else ''}") as answer:
            kind, lines = "", list[str]()
            for raw in answer:
                line = raw.decode("utf-8").rstrip("\r\n")
                if line.startswith("event:"):
                    kind = line[6:].strip()
                elif line.startswith("data:"):
                    lines.append(line[5:].strip())
                elif not line and lines:
                    yield kind, json.loads("\n".join(lines))
                    kind, lines = "", []

    def wait(self, id: str, seconds: float = 600.0) -> dict[str, Any]:
        """The job as it ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            job = dict(self.ask("GET", f"/v1/videos/{id}"))
            if job["status"] not in ("queued", "in_progress"):
                return job
            time.sleep(0.05)
        raise InputError(f"the job {id} has not ended after {seconds:g} seconds")

    def wait_until_ready(self, seconds: float = START_SECONDS) -> None:
        end = time.monotonic() + seconds
        while True:
            try:
                self.read("GET", "/readyz")
                return
            except InputError as error:
                if time.monotonic() > end:
                    raise
                if isinstance(error, ServerError) and error.status != 503:
                    raise
            time.sleep(0.1)


def as_form(fields: Mapping[str, Any], files: Mapping[str, bytes]) -> tuple[bytes, str]:
    """The body and content type of a form."""
    mark = secrets.token_hex(16)
    parts = [
        f'--{mark}\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    for name, data in files.items():
        head = f'--{mark}\r\ncontent-disposition: form-data; name="{name}"; filename="{name}"\r\n\r\n'
        parts.append(head.encode() + data + b"\r\n")
    return b"".join([*parts, f"--{mark}--\r\n".encode()]), f"multipart/form-data; boundary={mark}"


@dataclass(frozen=True)
class OwnServer:
    """A server in a process of its own."""

    process: "subprocess.Popen[str]"
    client: ServerClient

    @property
    def memory(self) -> int:
        """Bytes that the process holds."""
        with open(f"/proc/{self.process.pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def end(self, number: int = signal.SIGTERM, seconds: float = 60.0) -> int:
        """Its exit code after a signal; one that does not end in time is killed."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


@contextlib.contextmanager
def own_server(flags: Sequence[str], folder: str | None = None, log: str | None = None) -> Iterator[OwnServer]:
    """A server that is ready, at a free port of this machine; ended at the end.

    Its results are in `folder`, or in one that is removed; its log goes to the file `log`, or nowhere.
    """
    with contextlib.ExitStack() as stack:
        place = folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="nova-serve-"))
        written = stack.enter_context(open(log or os.devnull, "a", encoding="utf-8"))
        command = [sys.executable, "-m", "nova_video", "serve", "--port", "0", "--folder", place, *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=written, text=True)
        stack.enter_context(process)
        assert process.stdout is not None
        server = None
        try:
            url = process.stdout.readline().strip()
            if not url:
                raise InputError(f"the server has not begun: expected what {' '.join(command[1:])} says")
            server = OwnServer(process, ServerClient(url))
            server.client.wait_until_ready()
            yield server
        finally:
            OwnServer(process, ServerClient("")).end()
