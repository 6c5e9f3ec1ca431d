"""`nova generate --like`: a file's own record makes it again, in every setting, and says what has changed since."""

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from conftest import Run
from nova_video.cli.arguments import Edit, Generate
from nova_video.cli.remake import NOT_RECORDED, recorded_field
from nova_video.io import media

QUICK = ["--sets", "2", "--diffusion-steps", "1"]
EVERYTHING = [  # no default among them
    *("--negative", "the background", "--size", "96x64", "--fps", "6", "--sets", "3", "--diffusion-steps", "2"),
    *("--guidance", "3", "--guidance-at", "0.5", "2", "--motion", "4", "--motion-at", "0.5", "6", "--seed", "7"),
    *("--prompt-at", "0.5", "the apple", "--num-frames", "9", "--continue", "given.png", "--context-frames", "13"),
    *("--sink-frames", "5", "--reanchor-frames", "8", "--history-noise", "0.1", "--hold-statistics", "0.5"),
    *("--solver", "dpm++", "--last-steps", "0.5", "--guided-sets", "0.7", "--guidance-every", "2", "--no-compile"),
    *("--device", "cpu", "--dtype", "float32"),
]


def write_noise(path: str, count: int = 1, metadata: object = None) -> None:
    frames = np.random.default_rng(count).integers(0, 256, (count, 64, 96, 3), np.uint8)
    media.write_media(frames, path, 12, metadata if isinstance(metadata, dict) else {})


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.name.startswith("nova_video")]
    caplog.clear()
    return found


def test_every_setting_comes_back(run: Run, tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same record, and the same bytes, from another folder too."""
    write_noise("given.png", 3)
    assert run("generate", "a whale", "-o", "first.png", "--model", tiny_checkpoint, *EVERYTHING)[0] == 0
    messages(caplog)
    assert run("generate", "--like", "first.png", "-o", "again.png") == (0, "again.png\n", "")
    assert Path("again.png").read_bytes() == Path("first.png").read_bytes()
    assert messages(caplog) == ["the given clip, 96x64 at 12 fps, is taken as 96x64 at 6 fps"]
    assert run("generate", "--like", "first.png", "--format", "frames", "-o", "frames")[0] == 0
    assert run("generate", "--like", "frames", "-o", "more")[0] == 0
    assert media.read_metadata("more")["seed"] == 7
    messages(caplog)
    Path("place").mkdir()
    for name in ("first.png", "given.png"):
        Path(name).rename(Path("place") / name)
    assert run("generate", "--like", "place/first.png", "-o", "again.png")[0] == 0
    assert np.array_equal(media.read_frames("again.png")[0], media.read_frames("place/first.png")[0])


def test_no_setting_is_forgotten(run: Run, tiny_checkpoint: Path) -> None:
    """Every field of the commands is in the record, or is of a run and not of a result."""
    write_noise("given.png", 3)
    run("generate", "a whale", "-o", "first.png", "--model", tiny_checkpoint, *EVERYTHING)
    run("edit", "given.png", "an apple", "--strength", 0.5, "-o", "edited.png", "--model", tiny_checkpoint, *QUICK)
    recorded: set[str] = {"lora", "lora_scale", "low_memory", "tiled", "int8_text"}  # where they are given
    for name in ("first.png", "edited.png"):
        record = media.read_metadata(name)
        recorded |= {recorded_field(key) for key in (*record, *record["settings"])}
    commands = {field.name for command in (Generate, Edit) for field in fields(command)}
    assert commands - recorded == set(NOT_RECORDED)


def test_edited_pictures_come_back(run: Run, tiny_checkpoint: Path) -> None:
    write_noise("in.png")
    write_noise("mask.png", 1)
    flags = [
        "--mask",
        "mask.png",
        "--strength",
        0.7,
        "--seed",
        3,
        "-o",
        "first.webp",
        "--model",
        tiny_checkpoint,
        *QUICK,
    ]
    assert run("edit", "in.png", "the apple", *flags)[0] == 0
    assert run("generate", "--like", "first.webp") == (0, "the-apple.webp\n", "")
    assert media.read_metadata("the-apple.webp") == media.read_metadata("first.webp")
    assert np.array_equal(media.read_frames("the-apple.webp")[0], media.read_frames("first.webp")[0])
    assert "expected flags of nova edit" in run("generate", "--like", "first.webp", "--image", "in.png")[2]


def test_changes(run: Run, tiny_checkpoint: Path) -> None:
    """What is typed replaces what is recorded, with all that belongs to it."""
    common = ["--model", tiny_checkpoint, "--num-frames", 5, "--prompt-at", 0.2, "the apple", "--seed", 3, *QUICK]
    run("generate", "a whale", "-o", "first.gif", *common)
    code, out, _ = run("generate", "--like", "first.gif", "the apple", "--seed", 4, "--preset", "fast", "-n", 2)
    assert (code, out.split()) == (0, ["1-the-apple.gif", "2-the-apple.gif"])
    record = media.read_metadata("2-the-apple.gif")
    assert (record["prompt"], record["seed"], record["settings"]["num_frames"]) == ("the apple", 5, 5)
    assert (record["settings"]["solver"], record["settings"]["sets"]) == ("dpm++", round(64 * 0.42))


def test_what_has_changed_is_said(run: Run, tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_noise("given.png")
    run(
        "generate",
        "a whale",
        "--image",
        "given.png",
        "--num-frames",
        2,
        "-o",
        "x.png",
        "--model",
        tiny_checkpoint,
        *QUICK,
    )
    write_noise("given.png", 2)
    record = media.read_metadata("x.png") | {"weights": "another"}
    record["settings"] |= {"device": "cuda:0", "sharpness": 3, "no_compile": True}  # no_compile: of version 0.1
    write_noise("x.png", 2, record)
    messages(caplog)
    assert run("generate", "--like", "x.png", "-o", "y.png")[0] == 0
    assert messages(caplog) == [
        "x.png was made with settings that this command has not, and that are left out: sharpness",
        "given.png has changed since x.png was made with it",
        "given.png is an animation of 2 frames: the first one is taken",
        f"the weights of {tiny_checkpoint} have changed since x.png was made: the result will differ",
        "x.png was made on cuda in float32, this is cpu in float32: random numbers or rounding differ",
    ]
    Path("given.png").unlink()
    code, _, err = run("generate", "--like", "x.png")
    assert (code, err.splitlines()[-1]) == (
        2,
        "nova: x.png was made with given.png, which is not there: expected that file, or another one",
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "carries no settings to make it again"),
        ({"prompt": "a", "settings": {"width": "x"}}, "x.png: width is 'x': expected a whole number"),
        ({"prompt": [], "settings": {}}, "x.png: prompt is []: expected text in quotes"),
        ({"prompt": "a", "settings": {"guidance": [[0, "x"]]}}, "x.png: guidance is 'x': expected a number"),
        ({"prompt": "a", "settings": {"num_frames": None}}, "was made without an end: expected --num-frames or"),
        ({"prompt": "a", "model": "./none", "settings": {"output": "evil.png"}}, "'./none' not found"),
    ],
)
def test_records_that_are_of_no_use(run: Run, record: dict[str, object], message: str) -> None:
    """A record may come from anyone: it chooses no file to write."""
    write_noise("x.png", 1, json.loads(json.dumps(record)))
    code, _, err = run("generate", "--like", "x.png")
    assert (code, message in err.splitlines()[-1]) == (2, True)
    assert not Path("evil.png").exists()


def test_a_record_names_no_code_to_import(run: Run) -> None:
    write_noise("x.png", 1, {"prompt": "a", "settings": {"order": "evil:Order"}})
    code, _, err = run("generate", "--like", "x.png")
    assert (code, err) == (2, "nova: x.png was made with the order 'evil:Order': expected --order with it\n")
