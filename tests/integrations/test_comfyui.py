"""The nodes for ComfyUI, against a stand-in of its contract: schemas, graphs, previews, Cancel, files, faults."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfy_contract import NODES, CancelError, Comfy, VideoFromFile, graph_of

from nova_video import GenerateRequest, GenerateResult, InputError, NovaPipeline
from nova_video.common.option_fields import option_fields
from nova_video.io.media import LiveWriter, read_frames, read_metadata, write_media
from nova_video.io.pixels import to_bytes

PROMPT = "a whale moving left on a blue background"
FEW = {"sets": 2, "diffusion_steps": 2, "seed": 7}


@pytest.fixture(scope="module")
def running(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    """ComfyUI with the tiny checkpoint below its own models."""
    folder = tmp_path_factory.mktemp("comfy")
    shutil.copytree(tiny_checkpoint, folder / "models" / "nova" / "tiny")
    with Comfy(folder).loaded() as loaded:
        yield loaded


@pytest.fixture
def comfy(running: Comfy) -> Comfy:
    """ComfyUI where nothing has run but the loading of models."""
    running.progress.clear()
    running.runs.clear()
    running.cancel_at, running.checks = None, 0
    shutil.rmtree(running.folder / "temp", ignore_errors=True)
    running.cache = {key: made for key, made in running.cache.items() if "NovaLoadModel" in key[:20]}
    return running


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint: Path) -> NovaPipeline:
    return NovaPipeline.from_pretrained(tiny_checkpoint)


def graph(node: str, **inputs: Any) -> dict[str, Any]:
    """A loaded model, and one node "made" that uses it."""
    made = {"class_type": node, "inputs": {"model": ["loaded", 0], "prompt": PROMPT, **FEW, **inputs}}
    return {"loaded": {"class_type": "NovaLoadModel", "inputs": {"checkpoint": "tiny"}}, "made": made}


def given(comfy: Comfy, kind: str, value: Any) -> list[Any]:
    """A link to a value, as another node of ComfyUI would give it."""
    io = comfy._modules()["comfy_api.latest"].io
    types = {"IMAGE": io.Image, "MASK": io.Mask, "VIDEO": io.Video}
    schema = io.Schema(node_id=f"Given{kind}", display_name=kind, outputs=[types[kind].Output()])
    members = {
        "define_schema": classmethod(lambda cls: schema),
        "execute": classmethod(lambda cls: io.NodeOutput(value)),
    }
    comfy.nodes[schema.node_id] = type(io.ComfyNode)(schema.node_id, (io.ComfyNode,), members)
    return [kind, 0]


def with_sources(comfy: Comfy, made: dict[str, Any]) -> dict[str, Any]:
    """The graph with the nodes that `given` made."""
    kinds = {name.removeprefix("Given"): name for name in comfy.nodes if name.startswith("Given")}
    return made | {kind: {"class_type": name, "inputs": {}} for kind, name in kinds.items()}


def as_written(made: GenerateResult, path: Path) -> Any:
    """The frames of a clip after an mp4, which loses some colour."""
    with LiveWriter(path, made.fps or 1, {}) as writer:
        for frame in made.frames[0]:
            writer.write(to_bytes(frame))
    return read_frames(path)[0]


def test_every_setting_has_a_widget_or_a_reason(comfy: Comfy) -> None:
    inputs = {each.id for node in comfy.nodes.values() for each in node.define_schema().inputs}
    assert option_fields(GenerateRequest).keys() - inputs == {"order", "guidance_rule", "output_type"}


def test_widgets_left_alone_leave_every_setting_to_the_model(comfy: Comfy, pipe: NovaPipeline) -> None:
    schema = comfy.nodes["NovaTextToVideo"].define_schema()
    values = {each.id: each.default for each in schema.inputs if each.widget and each.id not in ("prompt", *FEW)}
    _, record = comfy.run(graph("NovaTextToVideo", **values), "made")
    bare = pipe.start(GenerateRequest(PROMPT, **FEW)).records[0]
    assert json.loads(record)["settings"] == bare["settings"]


def test_pictures_are_those_of_the_pipeline(comfy: Comfy, pipe: NovaPipeline) -> None:
    images, record = comfy.run(graph("NovaTextToImage", num_images_per_prompt=2), "made")
    expected = pipe(PROMPT, num_frames=1, num_images_per_prompt=2, output_type="np", **FEW).images
    assert np.array_equal(images.numpy(), np.stack(expected))
    assert json.loads(record)["seed"] == FEW["seed"]


def test_a_clip_comes_as_a_plain_file_with_its_record(comfy: Comfy, pipe: NovaPipeline, tmp_path: Path) -> None:
    video, record = comfy.run(graph("NovaTextToVideo", num_frames=9), "made")
    assert video.get_frame_count() == 9
    assert read_metadata(video.file) == json.loads(record)
    made = pipe(PROMPT, num_frames=9, output_type="np", **FEW)
    assert np.array_equal(read_frames(video.file)[0], as_written(made, tmp_path / "live.mp4"))
    assert [path.name for path in (comfy.folder / "temp").iterdir()] == [Path(video.file).name]


def test_progress_counts_every_set_and_shows_the_canvas(comfy: Comfy) -> None:
    comfy.run(graph("NovaTextToVideo", num_frames=5), "made")
    values = [value for value, _, _ in comfy.progress]
    assert values == [1, 2, 3, 4, 4]
    assert {total for _, total, _ in comfy.progress} == {4}
    assert comfy.progress[0][2].size == (96, 64)


def test_cancel_stops_within_a_set_and_leaves_no_file(comfy: Comfy) -> None:
    comfy.cancel_at = 3
    with pytest.raises(CancelError):
        comfy.run(graph("NovaTextToVideo", num_frames=33), "made")
    assert len(comfy.progress) == 2
    assert not list((comfy.folder / "temp").iterdir())
    comfy.cancel_at = None
    assert comfy.run(graph("NovaTextToVideo", num_frames=5), "made")[0].get_frame_count() == 5


def test_a_model_is_opened_once_until_its_files_change(comfy: Comfy) -> None:
    comfy.cache.clear()
    comfy.run(graph("NovaTextToImage"), "made")
    comfy.run(graph("NovaTextToImage", seed=8), "made")
    assert comfy.runs == ["NovaLoadModel", "NovaTextToImage", "NovaTextToImage"]
    (comfy.folder / "models" / "nova" / "tiny" / "notes.txt").write_text("trained further")
    comfy.run(graph("NovaTextToImage", seed=8), "made")
    assert comfy.runs[3:] == ["NovaLoadModel", "NovaTextToImage"]


def test_a_clip_begins_with_the_picture(comfy: Comfy, pipe: NovaPipeline, tmp_path: Path) -> None:
    picture = torch.full((1, 64, 96, 3), 0.5)
    picture[:, :32] = 0.2
    image = given(comfy, "IMAGE", picture)
    video, _ = comfy.run(with_sources(comfy, graph("NovaImageToVideo", image=image, num_frames=5)), "made")
    made = pipe(PROMPT, image=to_bytes(picture[0].numpy()), num_frames=5, output_type="np", **FEW)
    assert np.array_equal(read_frames(video.file)[0], as_written(made, tmp_path / "live.mp4"))


@pytest.mark.parametrize("window", [(0.0, 0.0), (0.0, 0.5)])
def test_a_clip_is_carried_on(comfy: Comfy, tmp_path: Path, window: tuple[float, float]) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (9, 64, 96, 3), np.uint8)
    write_media(frames, tmp_path / "given.mp4", 8, {})
    video = given(comfy, "VIDEO", VideoFromFile(str(tmp_path / "given.mp4"), *window))
    made = with_sources(comfy, graph("NovaContinueVideo", video=video, new_frames=4, fps=8))
    assert comfy.run(made, "made")[0].get_frame_count() == (9 if not any(window) else 4) + 4


def test_only_what_is_under_the_mask_changes(comfy: Comfy) -> None:
    picture, mask = torch.rand(1, 64, 96, 3), torch.zeros(1, 64, 96)
    picture = (picture * 255).round() / 255
    mask[:, :, 32:] = 1
    sources = {"image": given(comfy, "IMAGE", picture), "mask": given(comfy, "MASK", mask)}
    images, _ = comfy.run(with_sources(comfy, graph("NovaEditImage", **sources)), "made")
    assert torch.equal(images[:, :, :32], picture[:, :, :32])
    assert not torch.equal(images[:, :, 32:], picture[:, :, 32:])


def test_a_clip_is_edited_by_strength_and_by_nothing_is_refused(comfy: Comfy, tmp_path: Path) -> None:
    write_media(np.zeros((5, 64, 96, 3), np.uint8), tmp_path / "given.mp4", 8, {})
    video = given(comfy, "VIDEO", VideoFromFile(str(tmp_path / "given.mp4")))
    edit = with_sources(comfy, graph("NovaEditVideo", video=video, fps=8, strength=0.5))
    assert comfy.run(edit, "made")[0].get_frame_count() == 5
    edit["made"]["inputs"].pop("strength")
    with pytest.raises(InputError, match="got neither mask nor strength: expected one of them, or both"):
        comfy.run(edit, "made")


def test_changes_hold_from_their_moments_on(comfy: Comfy) -> None:
    later = {"class_type": "NovaChangeAt", "inputs": {"at": 1.0, "prompt": "a red apple", "motion_flow": 3.0}}
    first = {"class_type": "NovaChangeAt", "inputs": {"at": 0.5, "guidance_scale": 2.0, "earlier": ["later", 0]}}
    made = graph("NovaTextToVideo", changes=["first", 0], num_frames=17, fps=8, guidance_scale=3.0)
    _, record = comfy.run(made | {"later": later, "first": first}, "made")
    told = json.loads(record)
    assert told["prompt"] == [[0, PROMPT], [1, "a red apple"]]
    assert told["settings"]["guidance"] == [[0, 3], [0.5, 2]]
    assert told["settings"]["motion"][1] == [1, 3]


@pytest.mark.parametrize(
    ("inputs", "problem"),
    [
        ({"width": 0}, "width is 0: expected a whole number of at least 1 and at most 16,384"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan: expected a number of at least 0 and at most 1000"),
        ({"preset": "slow"}, "preset is 'slow': expected one of exact, balanced, fast"),
        ({"num_frames": 9, "seconds": 2.0}, "got num_frames 9 and seconds 2.0: expected one of them"),
    ],
)
def test_wrong_values_are_refused_before_anything_runs(comfy: Comfy, inputs: dict[str, Any], problem: str) -> None:
    found = comfy.problems(graph("NovaTextToVideo", **inputs))
    assert found.keys() == {"made"}
    assert problem in found["made"]


def test_several_pictures_are_no_first_frame(comfy: Comfy) -> None:
    image = given(comfy, "IMAGE", torch.rand(2, 64, 96, 3))
    with pytest.raises(InputError, match="image holds 2 pictures: expected 1"):
        comfy.run(with_sources(comfy, graph("NovaImageToVideo", image=image)), "made")


@pytest.mark.parametrize("path", sorted((NODES / "example_workflows").glob("*.json")), ids=lambda path: path.stem)
def test_example_workflows_fit_the_nodes(comfy: Comfy, path: Path) -> None:
    graph = graph_of(json.loads(path.read_text(encoding="utf-8")), comfy)
    assert graph
    assert not comfy.problems(graph)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "node"), [("text_to_video", "2"), ("continue_a_clip", "3")])
def test_example_workflows_run_with_the_bundled_model(comfy: Comfy, name: str, node: str) -> None:
    workflow = json.loads((NODES / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
    clip, record = comfy.run(graph_of(workflow, comfy), node)
    assert clip.get_frame_count() == 17
    assert "warnings" not in json.loads(record)
