"""Hostile requests to the whole application over a real socket: each is refused at once, and the next is unharmed."""

import base64
import io
import json
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
from PIL import Image

from nova_video import NovaPipeline
from nova_video.serving.launch import guarded_app
from nova_video.serving.serve_settings import ServeSettings
from nova_video.serving.server import make_server, open_socket, url_of
from nova_video.serving.service import JobService

FORM = {"prompt": "a whale moving left", "num_frames": "5", "sets": "2", "diffusion_steps": "1", "seed": "1"}
JSON = {"content-type": "application/json"}
IMAGE = {"prompt": "a red apple", "sets": 2, "diffusion_steps": 1, "seed": 1}


@pytest.fixture(scope="module")
def client(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("served")
    settings = ServeSettings(port=0, folder=str(folder), max_pixels=20_000, max_frames=40, body_mb=3, patience=0.5)
    service = JobService(NovaPipeline.from_pretrained(str(tiny_checkpoint)), settings, "tiny")
    with open_socket(settings) as sock:
        made = guarded_app(service, settings)
        made.start()
        server = make_server(made.app, settings, made.close)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        with httpx.Client(base_url=url_of(sock), timeout=10) as found:
            while found.get("/readyz").status_code != 200:
                time.sleep(0.02)
            yield found
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def picture(kind: str = "PNG", size: tuple[int, int] = (16, 16), frames: int = 1) -> bytes:
    made = io.BytesIO()
    pages = [Image.new("RGB", size, (number, 0, 0)) for number in range(frames)]
    pages[0].save(made, kind, **({"save_all": True, "append_images": pages[1:]} if frames > 1 else {}))
    return made.getvalue()


def png_bomb(side: int) -> bytes:
    """A png of side x side pixels, of which all but the first rows are zeros that compress to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 10**6)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def clip(size: tuple[int, int] = (16, 16), frames: int = 4) -> bytes:
    made = io.BytesIO()
    with av.open(made, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((size[1], size[0], 3), np.uint8))))
        container.mux(stream.encode())
    return made.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
FILES = {
    "a png of 60000 x 60000 pixels": png_bomb(60_000),
    "a png of 2^31 x 2^31 pixels": png_bomb(2**31 - 1),
    "a picture beyond the bound": picture(size=(200, 200)),
    "an animation of 500 frames": picture("GIF", (8, 8), 500),
    "half a png": picture(size=(100, 100))[:60],
    "half a clip": clip(frames=8)[:500],
    "a clip of large frames": clip((320, 240), 2),
    "a clip of many frames": clip(frames=60),
    "a playlist of files": PLAYLIST,
    "a list of files for ffmpeg": b"ffconcat version 1.0\nfile /etc/passwd\n",
    "a drawing with a file inside": SVG,
    "an archive": b"PK\x03\x04" + bytes(100),
    "a pickle": b"\x80\x04\x95" + bytes(60),
    "an empty file": b"",
    "a shell script": b"#!/bin/sh\nrm -rf /\n",
}
FIELDS: dict[str, dict[str, Any]] = {
    "no prompt": {"prompt": None},
    "a seed below 0": {"seed": "-1"},
    "a seed beyond 64 bits": {"seed": str(2**70)},
    "a seed of 5000 digits": {"seed": "9" * 5000},
    "a seed that is no number": {"seed": "NaN"},
    "a width of 0": {"width": "0", "height": "16"},
    "a size beyond all memory": {"size": "999999999x999999999"},
    "a size beyond the bound": {"size": "1024x1024"},
    "half a size": {"size": "16x"},
    "a size below 0": {"size": "-16x-16"},
    "too many frames": {"num_frames": "100000"},
    "frames beyond integers": {"num_frames": "1" + "0" * 400},
    "half a frame": {"num_frames": "4.5"},
    "seconds that are no number": {"num_frames": None, "seconds": "NaN"},
    "a rate of 0": {"fps": "0"},
    "a billion sets": {"sets": "1000000000"},
    "infinite guidance": {"guidance_scale": "Infinity"},
    "an object for a number": {"guidance_scale": '{"a": 1}'},
    "code as the order": {"order": "os:system"},
    "code as the rule of guidance": {"guidance_rule": "subprocess:run"},
    "memory of the server": {"memory_gb": "10000"},
    "another model": {"model": "../../etc/passwd"},
    "a lora of a path": {"lora": "/etc/passwd"},
    "a field that nobody knows": {"__class__": "x"},
    "a path for a picture": {"input_reference": "/etc/passwd"},
    "a file: URL": {"image_reference": "file:///etc/passwd"},
    "a URL inside": {"image_reference": '{"image_url": "http://169.254.169.254/latest/meta-data"}'},
    "a data: URL that is damaged": {"image_reference": "data:image/png;base64,@@@@"},
    "a data: URL with a bomb": {"image_reference": data_url(png_bomb(50_000))},
    "another one's video": {"video_reference": '{"id": "../../../etc/passwd"}'},
    "a timeline that nests": {"prompt": None, "timeline": "[" * 3000 + "]" * 3000},
    "a timeline of nothing": {"prompt": None, "timeline": "[]"},
    "more words that nest": {"extra_params": '{"a":' * 3000 + "1" + "}" * 3000},
    "more words with code": {"extra_params": '{"order": "os:system"}'},
}
PLACES = {
    "a path that climbs": ("GET", "/v1/videos/..%2f..%2f..%2fetc%2fpasswd"),
    "a file that climbs": ("GET", "/page/..%2f..%2fsettings.py"),
    "a zero byte": ("GET", "/v1/videos/%00/content"),
    "an id of 8000 letters": ("GET", f"/v1/videos/{'x' * 8000}"),
    "a page of -1": ("GET", "/v1/videos?limit=-1"),
    "a page of 10^9": ("GET", "/v1/videos?limit=1000000000"),
    "a page after nobody": ("GET", "/v1/videos?after=video_0"),
    "a variant that climbs": ("GET", "/v1/videos/x/content?variant=../../jobs.sqlite"),
    "a method that is not there": ("PUT", "/v1/videos"),
    "nothing to remove": ("DELETE", "/v1/videos/video_0"),
}
IMAGES: dict[str, Any] = {
    "no pictures": {**IMAGE, "n": 0},
    "10^12 pictures": {**IMAGE, "n": 10**12},
    "a text for a number": {**IMAGE, "n": "one"},
    "a list for the prompt": {**IMAGE, "prompt": ["a"] * 1000},
    "a list for everything": [IMAGE],
    "half a letter": {**IMAGE, "prompt": "\ud800"},
    "a letter that ends texts": {**IMAGE, "prompt": "a\0b"},
    "a file for the answer": {**IMAGE, "response_format": "/etc/passwd"},
    "more canvases than sets": {**IMAGE, "stream": True, "partial_images": 400},
}


def made(client: httpx.Client) -> bytes:
    """The bytes of a small picture."""
    answer = client.post("/v1/images/generations", json=IMAGE)
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


@pytest.fixture(scope="module")
def before(client: httpx.Client) -> bytes:
    return made(client)


@pytest.fixture
def unharmed(client: httpx.Client, before: bytes) -> Iterator[None]:
    """After each test the server answers, has nothing to do, and makes what it made before."""
    yield
    assert client.get("/healthz").status_code == 200
    assert client.get("/v1/videos").json()["data"] == []
    assert made(client) == before


def check_refused(answer: httpx.Response) -> None:
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 800
    assert "Traceback" not in answer.text
    assert "root:" not in answer.text
    assert answer.elapsed.total_seconds() < 1


def test_files(client: httpx.Client, unharmed: None) -> None:
    for name, data in FILES.items():
        answer = client.post("/v1/videos", data=FORM, files={"input_reference": ("../../evil.png", data)})
        assert 400 <= answer.status_code < 500, name
        check_refused(answer)


def test_masks(client: httpx.Client, unharmed: None) -> None:
    for name in ("a png of 60000 x 60000 pixels", "half a png", "a shell script", "a picture beyond the bound"):
        files = {"image": picture(size=(64, 64)), "mask": FILES[name]}
        check_refused(client.post("/v1/images/edits", data={"prompt": "a red apple"}, files=files))


def test_fields(client: httpx.Client, unharmed: None) -> None:
    for name, fields in FIELDS.items():
        values = {word: value for word, value in {**FORM, **fields}.items() if value is not None}
        answer = client.post("/v1/videos", files={word: (None, value) for word, value in values.items()})
        assert 400 <= answer.status_code < 500, name
        check_refused(answer)


def test_places(client: httpx.Client, unharmed: None) -> None:
    for method, place in PLACES.values():
        answer = client.request(method, place)
        check_refused(answer)


def test_images(client: httpx.Client, unharmed: None) -> None:
    for values in IMAGES.values():
        answer = client.post("/v1/images/generations", content=json.dumps(values), headers=JSON)
        check_refused(answer)


BODIES = [
    ("application/json", b'{"prompt": "a"}'),
    ("multipart/form-data", b"x"),
    ("multipart/form-data; boundary=a", b"--a\r\nno header\r\n\r\n"),
    (
        "multipart/form-data; boundary=a",
        b'--a\r\ncontent-disposition: form-data; name="prompt"\r\n\r\n\xff\xfe\r\n--a--\r\n',
    ),
    ("multipart/form-data; boundary=a", b'--a\r\ncontent-disposition: form-data; name="prompt"\r\n\r\na'),
    ("multipart/form-data; boundary=a", b'--a\r\ncontent-disposition: form-data; name="f%d"\r\n\r\n1\r\n' * 3000),
    ("multipart/form-data; boundary=" + "b" * 5000, b"--b"),
    ("application/x-www-form-urlencoded; charset=utf-16", b"prompt=%ff%fe%00"),
    ("text/xml", b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>'),
    ("application/octet-stream", bytes(1000)),
    ("multipart/form-data; boundary=a", bytes(3_000_001)),
]


def test_bodies(client: httpx.Client, unharmed: None) -> None:
    for kind, body in BODIES:
        check_refused(client.post("/v1/videos", content=body, headers={"content-type": kind}))


def test_letters_of_every_language_are_read_as_they_were_sent(client: httpx.Client) -> None:
    for body in ({"data": FORM | {"prompt": "a whälé 鯨 🐳"}}, {"files": {"prompt": (None, "a whälé 鯨 🐳")}}):
        answer = client.post("/v1/videos", **body).json()
        assert answer["prompt"] == "a whälé 鯨 🐳"
        assert client.delete(f"/v1/videos/{answer['id']}").status_code == 200


def test_there_are_sixty_and_more() -> None:
    assert len(FILES) + len(FIELDS) + len(PLACES) + len(IMAGES) + len(BODIES) >= 60
