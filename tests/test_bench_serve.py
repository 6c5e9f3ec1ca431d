"""The measures of a server, without one: rows, their table, percentiles, forms and server-sent events."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tables import serve_table

from nova_video.bench.rows import record_row
from nova_video.bench.serve import AskedLoad, ServeRow, measure_load, percentile, read_serve_rows, serve_lines
from nova_video.bench.server_client import ServerClient, as_form
from nova_video.common.errors import InputError

ROW = ServeRow("emoji", 4, 16, "cpu (x86_64)", {}, "nova bench serve --clients 4", {"num_frames": 9})


class Answers(http.server.BaseHTTPRequestHandler):
    """A server whose clip has two sets and one fragment, and whose queue is full at the first request."""

    protocol_version = "HTTP/1.1"
    is_full = True

    def log_message(self, *_: object) -> None: ...

    def send(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("retry-after", "0.01")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        assert b'name="prompt"' in body
        if Answers.is_full:
            Answers.is_full = False
            self.send(429, b'{"error": {"message": "full"}}')
        else:
            self.send(200, b'{"id": "video_1", "status": "queued"}')

    def do_GET(self) -> None:
        if self.path.endswith("/events"):
            news = [("status", {"status": "queued"}), ("set", {}), ("set", {}), ("set", {}), ("set", {})]
            news += [("fragment", {"frames": 9}), ("status", {"status": "completed"})]
            text = ": hello\n\n" + "".join(f"event: {kind}\ndata: {json.dumps(data)}\n\n" for kind, data in news)
            self.send(200, text.encode(), "text/event-stream")
        else:
            self.send(200, json.dumps({"status": "completed", "num_frames": 9, "size": "128x128"}).encode())

    def do_DELETE(self) -> None:
        self.send(200, b"{}")


@pytest.fixture
def url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_load_is_measured_and_recorded(url: str, tmp_path: Path) -> None:
    row = measure_load(ServerClient(url), AskedLoad(4, 16, 2, {"prompt": "a panda"}), ROW)
    assert row.error is None
    assert (row.frames, row.size, row.requests) == (9, "128x128", 16)
    assert row.seconds is not None
    assert row.requests_per_second == pytest.approx(16 / row.seconds, rel=0.01)
    assert 0 < row.p50_seconds <= row.p95_seconds <= row.p99_seconds
    assert 0 < row.first_preview_seconds <= row.first_frame_seconds <= row.p99_seconds
    assert 0 < row.cancel_seconds <= row.cancel_seconds_most
    record_row(tmp_path / "serve.json", row)
    assert read_serve_rows(tmp_path / "serve.json") == [row]
    header, cells = serve_lines(row)
    assert len(header) == len(cells)
    table = serve_table([row])
    assert "| emoji | num_frames=9 | 4 | 16 | 9 |" in table
    assert "nova bench serve --clients 4" in table
    assert {line.count("|") for line in table.splitlines() if line.startswith("|")} == {16}


def test_a_server_that_is_not_there_is_an_error_of_its_row() -> None:
    row = measure_load(ServerClient("http://127.0.0.1:9"), AskedLoad(1, 1, 1, {"prompt": "a"}), ROW)
    assert "http://127.0.0.1:9 does not answer" in str(row.error)
    assert serve_lines(row) == [f"emoji, 4 clients: failed: {row.error}"]
    assert serve_table([row]) == "Nothing is recorded yet."


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(number) for number in range(1, 21)]
    assert [percentile(values, share) for share in (0.5, 0.95, 0.99, 1.0)] == [10, 19, 20, 20]
    assert percentile([3.0], 0.5) == 3


@pytest.mark.parametrize("values", [(0, 1, 1), (1, 0, 1), (1, 1, 10**9)])
def test_a_load_without_requests_is_refused(values: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="expected a whole number of at least 1"):
        AskedLoad(*values, {})


def test_a_form_keeps_fields_and_files() -> None:
    body, kind = as_form({"prompt": "a ü"}, {"image": b"\x89PNG"})
    mark = kind.partition("boundary=")[2]
    assert body.startswith(f"--{mark}\r\n".encode())
    assert body.endswith(f"\r\n--{mark}--\r\n".encode())
    assert "a ü".encode() in body
    assert b'name="image"; filename="image"\r\n\r\n\x89PNG\r\n' in body
