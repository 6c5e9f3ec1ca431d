"""Scripts of `nova generate`: keys are flags, scenes are timelines, flags typed win, and wrong ones are named."""

import contextlib
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest

from nova_video.cli import main as cli
from nova_video.cli.arguments import Generate
from nova_video.cli.script import KEYS, NOT_IN_SCRIPTS, read_script, with_script
from nova_video.common.errors import InputError
from nova_video.io import media

STORY = """
seconds = 2.5
seed = 3
motion = 4
size = "96x64"
output = "story.mp4"
continue = "start.png"
live = true
dtype = "float32"

[[scene]]
at = 0
prompt = "a whale"

[[scene]]
at = 1
prompt = "the apple"
motion = 8
guidance = 3.5

[[scene]]
at = 1.5
prompt = "the apple moving left"
"""


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.toml"
    path.write_text(STORY)
    return path


def test_keys_are_flags_and_scenes_timelines(story: Path) -> None:
    assert read_script(story) == Generate(
        seconds=2.5,
        seed=3,
        motion_flow=4.0,
        size="96x64",
        output=Path("story.mp4"),
        video=Path("start.png"),
        live=True,
        dtype="float32",
        prompt=("a whale",),
        prompt_at=((1.0, "the apple"), (1.5, "the apple moving left")),
        motion_at=((1.0, 8.0),),
        guidance_at=((1.0, 3.5),),
    )


def test_every_flag_can_be_written(tmp_path: Path) -> None:
    assert {*KEYS.values(), *NOT_IN_SCRIPTS} == {field.name for field in fields(Generate)}
    path = tmp_path / "story.toml"
    for key, name in KEYS.items():
        for value in ("3", "'float16'", "'gif'", "'fast'", "'dpm++'", "true", "false"):
            path.write_text(f"{key} = {value}")
            with contextlib.suppress(InputError):
                if getattr(read_script(path), name) != getattr(Generate(), name):
                    break
        else:
            pytest.fail(f"{key} takes no value")


def test_without_end(tmp_path: Path) -> None:
    path = tmp_path / "story.toml"
    path.write_text("seconds = inf")
    assert read_script(path).seconds == math.inf


def test_flags_win(story: Path) -> None:
    typed = Generate(script=story, seed=5, motion_flow=6.0, prompt=("an owl",), guidance_at=((0.5, 2.0),))
    written = read_script(story)
    expected = replace(written, script=story, seed=5, motion_flow=6.0, prompt=("an owl",), guidance_at=((0.5, 2.0),))
    assert with_script(typed) == expected
    assert expected.prompt_at == written.prompt_at


def test_a_sentence_outside_the_scenes_is_the_first(tmp_path: Path) -> None:
    path = tmp_path / "story.toml"
    path.write_text("prompt = 'a whale'\n[[scene]]\nat = 2\nprompt = 'an owl'\nmotion = 3")
    settings = with_script(Generate(script=path))
    assert (settings.prompt, settings.prompt_at, settings.motion_at) == (
        ("a whale",),
        ((2.0, "an owl"),),
        ((2.0, 3.0),),
    )


SCENE = "[[scene]]\nat = 0\nprompt = 'a whale'\n"
WRONG = {
    "not TOML": ("prompt = a whale", "is not TOML: Invalid value (at line 1"),
    "not text": (b"\xff\x80", "is not a text file in UTF-8"),
    "unknown key": ("prompts = 'x.txt'\n" + SCENE, "unknown key prompts: expected one of output, format, size, "),
    "key with a dash": ("num-frames = 5\n" + SCENE, "unknown key num-frames: expected one of "),
    "unknown table": ("[settings]\nseed = 3", "unknown key settings"),
    "unknown key of a scene": (
        SCENE + "seed = 3",
        "scene 1: unknown key seed: expected one of at, prompt, guidance, motion",
    ),
    "one scene": ("[scene]\nat = 0\nprompt = 'a whale'", "expected tables, each headed by [[scene]]"),
    "no prompt": ("seconds = 3", "prompt is missing at second 0: expected prompt, or a [[scene]] at 0"),
    "scene without prompt": (SCENE + "[[scene]]\nat = 2\nmotion = 3", "scene 2 has no prompt"),
    "scene without time": (SCENE + "[[scene]]\nprompt = 'an owl'", "scene 2 has no at"),
    "late start": ("[[scene]]\nat = 1\nprompt = 'a whale'", "prompt is missing at second 0, the first scene is at 1"),
    "two beginnings": ("motion = 3\n" + SCENE + "motion = 4", "motion is there twice for second 0"),
    "out of order": (SCENE + SCENE, "a scene is at 0 after one at 0: expected scenes in order"),
    "number as text": ("seconds = '3'\n" + SCENE, "seconds is '3': expected a number"),
    "part of a frame": ("num_frames = 4.5\n" + SCENE, "num_frames is 4.5: expected a whole number"),
    "yes as a number": ("seed = true\n" + SCENE, "seed is True: expected a whole number"),
    "number as yes": ("live = 1\n" + SCENE, "live is 1: expected true or false"),
    "text as a number": ("prompt = 3", "prompt is 3: expected text in quotes"),
    "file as a number": ("image = 3\n" + SCENE, "image is 3: expected the name of a file in quotes"),
    "unknown choice": ("dtype = 'float8'\n" + SCENE, "dtype is 'float8': expected one of auto, float32"),
    "number of many digits": (f"fps = {'9' * 400}\n" + SCENE, "fps is 9999999999"),
    "time of many digits": (SCENE + f"[[scene]]\nat = {'9' * 400}\nprompt = 'b'", "scene 2: at is 9999999999"),
    "time as text": ("[[scene]]\nat = 'now'\nprompt = 'a whale'", "scene 1: at is 'now': expected a number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_scripts(tmp_path: Path, case: str) -> None:
    content, message = WRONG[case]
    path = tmp_path / "story.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        with_script(Generate(script=path))
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_a_script_is_for_one_clip(story: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "a whale", "an owl", "--script", str(story)]) == 2
    assert "expected one, it is for one clip" in capsys.readouterr().err


def test_a_clip_from_a_script(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with the same flags; its paths start from the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("stories").mkdir()
    scene = "[[scene]]\nat = 0.5\nprompt = 'the apple'\nmotion = 2\n"
    quick = f"model = '{tiny_checkpoint}'\nnum_frames = 9\nsets = 2\ndiffusion_steps = 1\nseed = 3\noutput = 'a.png'\n"
    Path("stories/story.toml").write_text(quick + SCENE + scene)
    assert cli.main(["generate", "--script", "stories/story.toml"]) == 0
    assert cli.main(["generate", "--script", "stories/story.toml", "--seed", "4", "-o", "b.png"]) == 0
    words = ["generate", "a whale", "--prompt-at", "0.5", "the apple", "--motion-at", "0.5", "2", "-o", "c.png"]
    flags = [
        "--model",
        str(tiny_checkpoint),
        "--num-frames",
        "9",
        "--sets",
        "2",
        "--diffusion-steps",
        "1",
        "--seed",
        "3",
    ]
    assert cli.main([*words, *flags]) == 0
    assert capsys.readouterr().out.split() == ["a.png", "b.png", "c.png"]
    assert Path("a.png").read_bytes() == Path("c.png").read_bytes()
    assert media.read_metadata("b.png")["seed"] == 4
    assert media.read_metadata("a.png")["prompt"] == [[0, "a whale"], [0.5, "the apple"]]
