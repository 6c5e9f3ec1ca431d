"""The OpenAI dialect, driven by the unmodified `openai` client over a real socket, with a tiny model."""

import asyncio
import base64
import io
import json
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from nova_video import NovaPipeline
from nova_video.io.decode import MediaFile
from nova_video.io.media import read_metadata
from nova_video.serving.app import create_app
from nova_video.serving.jobs import Status
from nova_video.serving.launch import guarded_app
from nova_video.serving.serve_settings import ServeSettings
from nova_video.serving.server import make_server, open_socket, url_of
from nova_video.serving.service import JobService

warnings.filterwarnings("ignore", "The Sora API")
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API")

QUICK = {"sets": 4, "diffusion_steps": 2, "seed": 7}
WHALE = "a whale moving left"


@pytest.fixture(scope="module")
def service(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> JobService:
    settings = ServeSettings(folder=str(tmp_path_factory.mktemp("serve")), port=0, queue=3)
    made = JobService(NovaPipeline.from_pretrained(str(tiny_checkpoint)), settings, "tiny")
    return made


@pytest.fixture(scope="module")
def url(service: JobService) -> Iterator[str]:
    whole = guarded_app(service, service.settings)
    whole.start()
    sock = open_socket(service.settings)
    server = make_server(whole.app, service.settings, whole.close)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([sock])), daemon=True)
    thread.start()
    yield url_of(sock)
    server.should_exit = True
    thread.join(30)


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def web(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def video(client: openai.OpenAI) -> Any:
    """A finished clip of nine frames."""
    return client.videos.create_and_poll(prompt=WHALE, extra_body={**QUICK, "num_frames": 9}, poll_interval_ms=50)


def picture_of(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def png(colour: Any = "green", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (96, 64), colour).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def refusal(answer: httpx.Response) -> tuple[str, str | None]:
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    return error["message"], error["param"]


# Images ---------------------------------------------------------------------------------------------------------------


def test_pictures_are_in_the_answer_each_with_its_seed(client: openai.OpenAI) -> None:
    made = client.images.generate(prompt="a whale", n=2, extra_body=QUICK)
    assert [entry.seed for entry in made.data] == [7, 8]
    alone = client.images.generate(prompt="a whale", extra_body={**QUICK, "seed": 8})
    assert made.data[1].b64_json == alone.data[0].b64_json or np.allclose(
        np.asarray(picture_of(made.data[1].b64_json), int), np.asarray(picture_of(alone.data[0].b64_json), int), atol=1
    )
    assert (made.size, made.num_inference_steps, made.seed, made.output_format) == ("96x64", 4, 7, "png")


@pytest.mark.parametrize(("output_format", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_a_picture_has_the_format_that_was_asked_for_and_its_record(
    client: openai.OpenAI, web: httpx.Client, tmp_path: Path, output_format: Any, kind: str
) -> None:
    made = client.images.generate(
        prompt="a whale", response_format="url", output_format=output_format, extra_body=QUICK
    )
    answer = web.get(made.data[0].url)
    assert (answer.headers["content-type"], Image.open(io.BytesIO(answer.content)).format) == (
        f"image/{output_format}",
        kind,
    )
    path = tmp_path / f"made.{output_format}"
    path.write_bytes(answer.content)
    assert read_metadata(path)["prompt"] == "a whale"


def test_a_stream_shows_the_canvas_at_equal_shares_of_the_sets(client: openai.OpenAI) -> None:
    for count in (0, 2, 3):
        events = list(client.images.generate(prompt="a whale", stream=True, partial_images=count, extra_body=QUICK))
        assert [event.type.rpartition(".")[2] for event in events] == ["partial_image"] * count + ["completed"]
        assert [event.partial_image_index for event in events[:-1]] == list(range(count))
    last = picture_of(events[-1].b64_json)
    assert len({event.b64_json for event in events}) == 4
    plain = client.images.generate(prompt="a whale", extra_body=QUICK)
    assert np.array_equal(np.asarray(last), np.asarray(picture_of(plain.data[0].b64_json)))


def test_masks_of_both_kinds_say_the_same(client: openai.OpenAI, web: httpx.Client) -> None:
    """OpenAI's is transparent where the picture is to change, and ours is white."""
    white = np.zeros((64, 96), np.uint8)
    white[:32] = 255
    clear = np.dstack([np.full((64, 96, 3), 90, np.uint8), 255 - white])
    files = [io.BytesIO(), io.BytesIO()]
    Image.fromarray(white).save(files[0], "PNG")
    Image.fromarray(clear, "RGBA").save(files[1], "PNG")
    made = [
        client.images.edit(image=png(), prompt="a whale", mask=("mask.png", file.getvalue()), extra_body=QUICK)
        for file in files
    ]
    assert made[0].data[0].b64_json == made[1].data[0].b64_json
    pixels = np.asarray(picture_of(made[0].data[0].b64_json))
    assert (pixels[32:] == (0, 128, 0)).all()
    assert not (pixels[:32] == (0, 128, 0)).all()
    sent = {"image": {"image_url": data_url(png())}, "prompt": "a whale", "mask": data_url(files[0].getvalue())}
    assert web.post("/v1/images/edits", json=sent | QUICK).json()["data"][0]["b64_json"] == made[0].data[0].b64_json


def test_an_edit_without_mask_or_strength_says_what_was_chosen(client: openai.OpenAI) -> None:
    made = client.images.edit(image=png(), prompt="a whale", extra_body=QUICK)
    assert made.warnings == ["strength is 0.5, since neither mask nor strength was given"]
    assert made.settings["strength"] == 0.5


# Videos ---------------------------------------------------------------------------------------------------------------


def test_a_video_tells_what_was_made(client: openai.OpenAI, video: Any) -> None:
    assert (video.status, video.progress, video.num_frames, video.size) == ("completed", 100, 9, "96x64")
    assert (video.num_inference_steps, video.seed, video.model, video.prompt) == (4, 7, "tiny", WHALE)
    assert float(video.seconds) == pytest.approx(9 / video.fps, abs=1e-3)
    assert video.created_at <= video.completed_at < video.expires_at


def test_the_header_tells_when_to_ask_again(client: openai.OpenAI) -> None:
    answer = client.videos.with_raw_response.create(prompt=WHALE, extra_body=QUICK)
    assert 200 <= int(answer.headers["openai-poll-after-ms"]) <= 2000
    made = client.videos.poll(answer.parse().id)
    assert "openai-poll-after-ms" not in client.videos.with_raw_response.retrieve(made.id).headers


def test_seconds_are_rounded_to_whole_latent_frames(client: openai.OpenAI, video: Any) -> None:
    for seconds, frames in (("0.5", 5), ("1", 13), ("0.8", 9)):
        made = client.videos.create(prompt=WHALE, seconds=seconds, extra_body={**QUICK, "fps": 12})
        assert (made.num_frames, made.seconds) == (frames, f"{frames / 12:.3f}".rstrip("0").rstrip("."))
        client.videos.delete(made.id)


def test_the_content_is_a_clip_of_which_ranges_may_be_fetched(
    client: openai.OpenAI, web: httpx.Client, video: Any, tmp_path: Path
) -> None:
    data = client.videos.download_content(video.id).read()
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)
    assert len(MediaFile(path).read()) == 9
    assert read_metadata(path)["seed"] == 7
    part = web.get(f"/v1/videos/{video.id}/content", headers={"range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, data[10:20])
    assert web.get(f"/v1/videos/{video.id}/content", headers={"range": "bytes=99999999-"}).status_code == 416
    assert int(web.head(f"/v1/videos/{video.id}/content").headers["content-length"]) == len(data)
    for variant in ("thumbnail", "spritesheet"):
        shown = client.videos.download_content(video.id, variant=variant).read()
        assert Image.open(io.BytesIO(shown)).format == "WEBP"


def test_lists_have_pages(client: openai.OpenAI, web: httpx.Client, video: Any) -> None:
    newest = [one.id for one in client.videos.list(limit=1)]
    oldest = [one.id for one in client.videos.list(limit=100, order="asc")]
    assert newest == oldest[::-1]
    assert video.id in newest
    page = web.get("/v1/videos", params={"limit": 1}).json()
    assert (page["first_id"], page["last_id"], page["has_more"]) == (newest[0], newest[0], len(newest) > 1)
    assert refusal(web.get("/v1/videos", params={"limit": 101}))[1] == "limit"
    assert refusal(web.get("/v1/videos", params={"page": 1})) == (
        "unknown query field page: expected none of that name",
        "page",
    )
    with pytest.raises(openai.NotFoundError):
        client.videos.list(after="video_none")


def frames_of(client: openai.OpenAI, id: str, folder: Path) -> np.ndarray:
    path = folder / f"{id}.mp4"
    path.write_bytes(client.videos.download_content(id).read())
    return MediaFile(path).read()


def test_a_remix_has_the_seed_and_settings_of_its_source(client: openai.OpenAI, video: Any, tmp_path: Path) -> None:
    made = client.videos.remix(video.id, prompt="a whale moving right")
    assert (made.remixed_from_video_id, made.prompt) == (video.id, "a whale moving right")
    assert (made.seed, made.num_frames, made.num_inference_steps) == (7, 9, 4)
    client.videos.delete(made.id)
    again = client.videos.poll(client.videos.remix(video.id, prompt=WHALE).id, poll_interval_ms=50)
    assert np.array_equal(frames_of(client, again.id, tmp_path), frames_of(client, video.id, tmp_path))


def test_an_extension_goes_on_with_the_clip(client: openai.OpenAI, video: Any, tmp_path: Path) -> None:
    """By the id of a video, or by its file."""
    data = client.videos.download_content(video.id).read()
    by_id = client.videos.extend(
        prompt=WHALE, seconds="0.3", video=openai.omit, extra_body={**QUICK, "video": {"id": video.id}}
    )
    by_file = client.videos.extend(prompt=WHALE, seconds="0.3", video=("clip.mp4", data), extra_body=QUICK)
    assert by_id.num_frames == by_file.num_frames == 9 + 4 * max(1, round(0.3 * video.fps / 4))
    assert by_id.source_video_id == video.id
    client.videos.delete(by_file.id)
    made = client.videos.poll(by_id.id, poll_interval_ms=50)
    assert (made.status, made.inputs) == ("completed", ["video"])
    frames = frames_of(client, made.id, tmp_path)
    assert len(frames) == made.num_frames
    given = frames_of(client, video.id, tmp_path).astype(int)
    assert np.abs(frames[:9] - given).mean() < np.abs(frames[4:] - given).mean() / 4  # but for the encoder's rounding


def test_an_edit_keeps_what_its_mask_keeps(client: openai.OpenAI, video: Any) -> None:
    body = {**QUICK, "mask": data_url(png(colour="white"))}
    made = client.videos.edit(
        prompt=WHALE, video=("clip.mp4", client.videos.download_content(video.id).read()), extra_body=body
    )
    assert (made.num_frames, made.inputs, made.warnings) == (9, ["mask_image", "video"], [])
    client.videos.delete(made.id)


def test_a_picture_is_the_first_frame(client: openai.OpenAI, web: httpx.Client) -> None:
    body = {**QUICK, "num_frames": 5}
    sent = [
        {"input_reference": ("first.png", png())},
        {"extra_body": {**body, "input_reference": {"image_url": data_url(png())}}},
        {"extra_body": {**body, "image_reference": f'{{"image_url": "{data_url(png())}"}}'}},
    ]
    for each in sent:
        made = client.videos.create(prompt=WHALE, **{"extra_body": body} | each)
        assert made.inputs == ["image"]
        client.videos.delete(made.id)


def test_a_deleted_video_is_gone_and_frees_the_worker(client: openai.OpenAI, service: JobService) -> None:
    made = client.videos.create(prompt=WHALE, extra_body={**QUICK, "num_frames": 401})
    while client.videos.retrieve(made.id).status == "queued":
        time.sleep(0.01)
    gone = client.videos.delete(made.id)
    assert (gone.deleted, gone.object) == (True, "video.deleted")
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(made.id)
    assert not service.results.has(made.id, "")


def test_sync_answers_with_the_file(web: httpx.Client) -> None:
    form = {name: str(value) for name, value in {**QUICK, "prompt": WHALE, "num_frames": 5}.items()}
    answer = web.post("/v1/videos/sync", data=form)
    assert (answer.status_code, answer.headers["content-type"], answer.headers["x-seed"]) == (200, "video/mp4", "7")
    assert answer.content[4:8] == b"ftyp"


def test_who_leaves_a_waiting_request_cancels_it(web: httpx.Client, client: openai.OpenAI) -> None:
    form = {**QUICK, "prompt": WHALE, "num_frames": 801}
    with pytest.raises(httpx.ReadTimeout):
        web.post("/v1/videos/sync", data=form, timeout=0.5)
    (job,) = [one for one in client.videos.list(limit=1) if one.num_frames == 801]
    ends = time.monotonic() + 10
    while (found := client.videos.retrieve(job.id)).status != "cancelled":
        assert time.monotonic() < ends, found
        time.sleep(0.05)


def test_who_leaves_a_stream_cancels_it(client: openai.OpenAI, service: JobService) -> None:
    slow = {**QUICK, "diffusion_steps": 300, "n": 10}
    stream = client.images.generate(prompt="a whale", stream=True, extra_body=slow)
    (job,) = service.list(kinds=("image",), limit=1)[0]
    stream.close()
    assert asyncio.run(asyncio.wait_for(service.wait(job.id), 10)).status is Status.CANCELLED


def test_the_asynchronous_client_is_served_as_well(url: str) -> None:
    async def ask() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            made = await client.videos.create_and_poll(prompt=WHALE, extra_body={**QUICK, "num_frames": 5})
            pictures = await client.images.generate(prompt="a whale", extra_body=QUICK)
            return made, pictures, await client.models.list()

    made, pictures, models = asyncio.run(ask())
    assert (made.status, len(pictures.data), models.data[0].id) == ("completed", 1, "tiny")


# Words ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "param", "message"),
    [
        ({}, "prompt", "prompt is missing: expected a sentence, or a timeline of them"),
        ({"prompt": " "}, "prompt", "prompt is ' ': expected a sentence that is not empty"),
        ({"promt": "a whale"}, "promt", "unknown field promt: expected prompt"),
        ({"true_cfg_scale": "2"}, "true_cfg_scale", "unknown field true_cfg_scale: expected guidance_scale"),
        ({"order": "os:system"}, "order", "unknown field order: expected none: a request names no code"),
        ({"size": "33x32"}, "size", "size is 33x32: expected width and height in multiples of 32"),
        ({"size": "big"}, "size", "size is 'big': expected WIDTHxHEIGHT in pixels, such as 128x128, or auto"),
        ({"size": "96x64", "width": "64"}, "size", "got size 96x64 and width 64: expected one of them"),
        ({"seconds": "long"}, "seconds", "seconds is 'long': expected a number of more than 0 and at most 1e+06"),
        ({"seconds": "1", "num_frames": "5"}, "num_frames", "got num_frames 5 and seconds 1: expected one of them"),
        ({"seed": "nan"}, "seed", "seed is 'nan': expected a whole number of at least 0"),
        ({"model": "sora-2"}, "model", "model is 'sora-2': expected tiny, the one that is loaded"),
        ({"lora": "style"}, "lora", "lora is 'style': expected none: the server runs without one"),
        ({"preset": "slow"}, "preset", "preset is 'slow': expected one of exact, balanced, fast"),
        ({"sets": "4", "num_inference_steps": "5"}, "sets", "got num_inference_steps 5 and sets 4: expected one"),
        ({"extra_params": "[]"}, "extra_params", "extra_params is []: expected a JSON object"),
        ({"extra_params": '{"sets": 4}', "sets": "4"}, "sets", "got sets twice, once in extra_params"),
        ({"timeline": '[[0, "a"]]'}, "timeline", "got a prompt and a timeline that begins at 0: expected one of them"),
        ({"image_reference": "https://a.example/b.png"}, "image_reference", "expected a file or a data: URL"),
        ({"image_reference": "/etc/passwd"}, "image_reference", "expected a file or a data: URL, nothing is fetched"),
        ({"video_reference": "data:video/mp4;base64,AAAA"}, "video_reference", "is a file of an unknown kind"),
        ({"mask": "data:image/png;base64,iVBORw0KGgo="}, "mask", "got mask without input_reference"),
        ({"num_frames": "1"}, "num_frames", "num_frames is 1: expected 2 or more"),
        ({"motion[][]": "2"}, "motion", "motion came as motion[][]: expected JSON in the one field motion"),
        ({"n": "2"}, "n", "unknown field n: expected a request for each video"),
    ],
)
def test_a_wrong_word_is_named_in_one_line(web: httpx.Client, words: dict[str, str], param: str, message: str) -> None:
    prompt = {} if {"promt"} & words.keys() or not words else {"prompt": WHALE}
    said, named = refusal(web.post("/v1/videos", data={**prompt, **words} or {"fps": "8"}))
    assert message in said
    assert "\n" not in said
    assert named == param


def test_json_under_the_name_of_a_form_is_told(web: httpx.Client) -> None:
    kind = {"content-type": "application/x-www-form-urlencoded"}  # what curl --data says
    said, _ = refusal(web.post("/v1/images/generations", content='{"prompt": "a whale"}', headers=kind))
    assert said.endswith("x-www-form-urlencoded, and the body is JSON: expected content-type application/json")


def test_two_references_are_refused(web: httpx.Client) -> None:
    words = {"prompt": WHALE, "image_reference": data_url(png()), "input_reference": data_url(png())}
    assert refusal(web.post("/v1/videos", data=words))[0] == (
        "got both of input_reference and image_reference: expected one of them"
    )


def test_json_is_refused_where_the_dialect_has_forms(web: httpx.Client) -> None:
    said, _ = refusal(web.post("/v1/videos", json={"prompt": WHALE}))
    assert said == (
        "content-type is 'application/json': expected multipart/form-data, a form with a field for each word"
    )


def test_every_option_works_in_forms_and_in_json(web: httpx.Client, client: openai.OpenAI) -> None:
    timeline = [[0, WHALE], [0.5, "a whale moving right"]]
    words = {"timeline": json.dumps(timeline), "motion": "[[0, 2.0], [0.5, 6.0]]", "context": 9, "num_frames": 9}
    made = client.videos.create(prompt=openai.omit, extra_body={**QUICK, **words})
    settings = {"motion_flow": [[0.0, 2.0], [0.5, 6.0]], "context_frames": 9}
    assert {name: made.settings[name] for name in settings} == settings
    assert made.timeline == timeline
    remix = web.post(f"/v1/videos/{made.id}/remix", json={"timeline": timeline, "preset": "fast"}).json()
    assert (remix["settings"]["preset"], remix["settings"]["motion_flow"]) == ("fast", settings["motion_flow"])
    for each in (made.id, remix["id"]):
        client.videos.delete(each)


def test_image_words_that_contradict_each_other_are_refused(web: httpx.Client) -> None:
    for words, said in [
        ({"partial_images": 2}, "partial_images is 2 without stream: expected stream true"),
        ({"stream": True, "response_format": "url"}, "response_format is 'url' with stream: expected b64_json"),
        ({"output_compression": 50}, "got output_compression for png, which loses nothing: expected jpeg or webp"),
        ({"quality": "hd"}, "quality is 'hd': expected auto or standard"),
        ({"background": "transparent"}, "background is 'transparent': expected auto or opaque"),
        ({"n": 11}, "n is 11: expected a whole number of at least 1 and at most 10"),
        ({"seconds": 2}, "unknown field seconds"),
    ]:
        assert refusal(web.post("/v1/images/generations", json={"prompt": "a whale", **words}))[0].startswith(said)


# Errors ---------------------------------------------------------------------------------------------------------------


def test_the_client_raises_its_own_errors(client: openai.OpenAI, web: httpx.Client) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.images.generate(prompt="a whale", size="17x17")
    assert wrong.value.param == "size"
    with pytest.raises(openai.NotFoundError):
        client.videos.download_content("video_none")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-image-1")
    assert client.models.retrieve("tiny").id == "tiny"
    assert web.put("/v1/videos").json()["error"]["code"] == "method_not_allowed"


def test_a_full_queue_tells_when_to_come_again(client: openai.OpenAI) -> None:
    made: list[str] = []

    def fill() -> None:
        for _ in range(12):
            made.append(client.videos.create(prompt=WHALE, extra_body={**QUICK, "num_frames": 401}).id)

    with pytest.raises(openai.RateLimitError) as full:
        fill()
    assert int(full.value.response.headers["retry-after"]) >= 1
    assert full.value.code == "queue_full"
    for each in made:
        client.videos.delete(each)


def test_a_job_that_fails_is_an_error_that_no_client_repeats(
    web: httpx.Client, service: JobService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(service.pipe, "start", fail)
    answer = web.post("/v1/images/generations", json={"prompt": "a whale", **QUICK})
    assert (answer.status_code, answer.headers["x-should-retry"]) == (503, "false")
    assert answer.json()["error"]["code"] == "out_of_memory"
    streamed = web.post("/v1/images/generations", json={"prompt": "a whale", "stream": True, **QUICK})
    assert streamed.text.startswith('event: error\ndata: {"error": {"message": ')


def test_the_schema_has_every_setting_with_its_bounds(service: JobService) -> None:
    schema = create_app(service).openapi()
    form = schema["paths"]["/v1/videos"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["examples"][0]["prompt"]
    assert form["additionalProperties"] is False
    assert form["properties"]["sets"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 65536}
    assert {"timeline", "mask", "strength", "preset", "context", "motion", "lora"} <= form["properties"].keys()
    assert not {"order", "guidance_rule", "memory_gb", "output_type"} & form["properties"].keys()
    assert Status.COMPLETED in schema["components"]["schemas"]["Status"]["enum"]


def test_the_reference_has_every_route_and_loads_nothing(web: httpx.Client) -> None:
    page = web.get("/docs")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    for path in web.get("/openapi.json").json()["paths"]:
        assert f" {path}</code>" in page.text
    assert "<td><code>sets</code></td><td>integer from 1 to 65,536</td>" in page.text
    assert not [mark for mark in ("src=", "<script", "@import", "url(") if mark in page.text]
    assert page.text.count("href=") == 1
