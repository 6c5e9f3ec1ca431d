"""What the page gets from the server: its files, what the model knows, and the command that makes the same."""

import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from nova_video import NovaPipeline
from nova_video.cli.arguments import Edit, Generate, parse
from nova_video.cli.flags import given_options
from nova_video.pipeline.options import Options
from nova_video.serving.about import example_sentences
from nova_video.serving.app import create_app
from nova_video.serving.command_line import command_line
from nova_video.serving.jobs import Change, Job
from nova_video.serving.routes_page import PAGE
from nova_video.serving.serve_settings import ServeSettings
from nova_video.serving.service import JobService
from nova_video.text.vocabulary import Vocabulary

EMOJI = Path(__file__).parents[1] / "src" / "nova_video" / "models" / "emoji"
FILES = sorted(entry.name for entry in PAGE.iterdir())


@pytest.fixture(scope="module")
def client(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    """An application whose worker does not run: jobs stay queued."""
    settings = ServeSettings(folder=str(tmp_path_factory.mktemp("serve")))
    return TestClient(create_app(JobService(NovaPipeline.from_pretrained(str(tiny_checkpoint)), settings, "tiny")))


@pytest.mark.parametrize("name", FILES)
def test_files_of_the_page_come_with_a_policy_and_a_tag(client: TestClient, name: str) -> None:
    answer = client.get(f"/page/{name}")
    assert "default-src 'none'; script-src 'self'" in answer.headers["content-security-policy"]
    assert answer.content == (PAGE / name).read_bytes()
    again = client.get(f"/page/{name}", headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_the_page_asks_no_other_server_and_names_files_that_exist(client: TestClient) -> None:
    assert client.get("/").content == client.get("/page/index.html").content
    assert client.get("/page/..%2Froutes_page.py").status_code == 404
    for name in FILES:
        text = (PAGE / name).read_text(encoding="utf-8")
        assert re.findall(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)[a-z]", text.replace("// ", "")) == []
        assert set(re.findall(r"""(?:from "\./|(?:href|src)="page/)([\w.]+)""", text)) <= set(FILES)


def test_about_has_what_the_form_is_made_of(client: TestClient) -> None:
    about, model = client.get("/v1/about").json(), client.app.state.service.pipe.capabilities  # type: ignore[attr-defined]
    assert (about["sizes"]["height"], about["sizes"]["width"]) == model.image_size
    assert about["sizes"]["size_multiple"] == model.size_multiple
    named = [name for group in about["groups"] for name in group["names"]]
    assert set(named) <= set(about["request"]["properties"])
    assert {"seed", "sets", "guidance_scale", "preset", "solver", "context_frames"} <= set(named)
    assert not {"order", "guidance_rule", "memory_gb", "compile"} & set(named)
    assert about["words"] is None


def test_examples_are_sentences_that_the_model_knows() -> None:
    vocabulary = Vocabulary.load(EMOJI)
    assert vocabulary is not None
    examples = example_sentences(vocabulary)
    assert len(set(examples)) == 8
    assert [vocabulary.problems(example) for example in examples] == [[]] * 8


def test_problems_of_sentences(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"prompts": ["a wale moving left", "a whale"], "negative_prompt": "blurry"}
    assert client.post("/v1/about/problems", json=asked).json() == {"problems": []}  # a model of any text
    settings = client.app.state.service.pipe.settings  # type: ignore[attr-defined]
    monkeypatch.setitem(vars(settings), "vocabulary", Vocabulary.load(EMOJI))
    assert client.post("/v1/about/problems", json=asked).json()["problems"] == [
        'not known: "wale"; did you mean "whale"?',
        'not known: "blurry" (negative prompt)',
    ]
    two = {"prompts": ["red apple above banana"]}
    assert "pictures alone" in client.post("/v1/about/problems", json=two).json()["problems"][0]
    assert client.post("/v1/about/problems", json=two | {"picture": True}).json() == {"problems": []}


def test_a_job_tells_its_settings_inputs_and_command(client: TestClient) -> None:
    picture = (Path(__file__).parents[1] / "docs" / "images" / "overview.png").read_bytes()
    sent = {"prompt": "a whale", "num_frames": "9", "seed": "5"}
    id = client.post("/v1/videos", data=sent, files={"input_reference": ("a.png", picture)}).json()["id"]
    job = client.get(f"/v1/jobs/{id}").json()
    assert job["request"] == {"prompt": "a whale", "num_frames": 9, "seed": 5}
    assert job["command"] == "nova generate 'a whale' --image image.png --model tiny --num-frames 9 --seed 5"
    assert client.get(f"/v1/jobs/{id}/inputs/image").content == picture
    assert client.get(f"/v1/jobs/{id}/inputs/video").status_code == 404
    assert client.delete(f"/v1/jobs/{id}").status_code == 204
    assert client.get(f"/v1/jobs/{id}").status_code == 404


# The command ----------------------------------------------------------------------------------------------------------

REQUESTS: list[dict[str, Any]] = [
    {"prompt": 'it\'s "a" whale; $(rm) `x`\n', "seed": 7},
    {"prompt": "a whale", "num_frames": 17, "fps": 12.5, "guidance_scale": 3.0, "motion_flow": 0.1, "strength": None},
    {"prompt": [[0, "a whale"], [1.5, "a red apple"]], "motion_flow": [[0, 2], [1, 8.25]], "preset": "fast"},
    {"prompt": "x", "solver": "dpm++", "fp8": True, "compile": False, "guided_sets": 0.0, "width": 64, "height": 96},
    {"prompt": "x", "history_noise": 1e-05, "seed": 2**63 - 1, "negative_prompt": "blue", "num_images_per_prompt": 3},
]


def job_of(request: dict[str, Any], **facts: Any) -> Job:
    return Job(id="video_1", kind="video", model="emoji", prompt="", request=request, **facts)


@pytest.mark.parametrize("request_", REQUESTS)
def test_the_command_reads_as_the_request(request_: dict[str, Any]) -> None:
    words = shlex.split(command_line(job_of(request_)) or "")
    args = parse(words[1:])
    assert isinstance(args, Generate)
    prompts = request_["prompt"] if isinstance(request_["prompt"], list) else [[0, request_["prompt"]]]
    assert [[0, args.prompt[0]], *map(list, args.prompt_at)] == prompts
    expected = {name: value for name, value in request_.items() if name in Options.__dataclass_fields__}
    motion = expected.pop("motion_flow", None)
    assert given_options(args, Options) == {
        **{name: value for name, value in expected.items() if value is not None},
        **({} if motion is None else {"motion_flow": motion[0][1] if isinstance(motion, list) else motion}),
    }
    assert [list(pair) for pair in args.motion_at] == (motion[1:] if isinstance(motion, list) else [])
    assert args.num_images == request_.get("num_images_per_prompt", 1)
    assert args.negative == request_.get("negative_prompt")


def test_the_command_of_an_edit() -> None:
    job = job_of({"prompt": "a whale", "seed": 1}, inputs={"video": "video.mp4", "mask_image": "mask_image.png"})
    args = parse(shlex.split(command_line(job) or "")[1:])
    assert isinstance(args, Edit)
    assert (str(args.file), str(args.mask), args.prompt, args.seed) == ("video.mp4", "mask_image.png", "a whale", 1)


def test_the_command_of_a_clip_that_was_stopped_says_how_long_it_is() -> None:
    request = {"prompt": "a whale", "num_frames": "inf", "seed": 1}
    job = job_of(request, settings={"context_frames": 33}, stopped=True, frames=21)
    assert command_line(job) == "nova generate 'a whale' --num-frames 21 --seed 1 --context-frames 33"


def test_the_command_says_what_was_changed_on_the_way() -> None:
    changes = [
        Change(id="1", frame=13, values={"prompt": "a red apple"}, state="in_effect"),
        Change(id="2", frame=21, values={"motion_flow": 8.0}, state="in_effect"),
        Change(id="3", frame=None, values={"prompt": "a taco"}, state="refused"),
    ]
    settings = {"fps": 8.0, "motion_flow": 5.0}
    job = job_of({"prompt": "a whale", "num_frames": 33}, settings=settings, changes=list(map(asdict, changes)))
    assert command_line(job) == (
        "nova generate 'a whale' --prompt-at 1.625 'a red apple' --num-frames 33 --motion 5 --motion-at 2.625 8"
    )


def test_no_command_makes_an_edit_whose_sentence_changes() -> None:
    request = {"prompt": [[0, "a"], [1, "b"]], "strength": 0.5}
    assert command_line(job_of(request, inputs={"video": "video.mp4"})) is None
