"""The command: files with records for right input, one line and exit code 2 for wrong, nothing left when stopped."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import nova_video
from conftest import Run
from nova_video.cli import main as cli
from nova_video.cli.arguments import parse
from nova_video.cli.file_jobs import name_of
from nova_video.common.errors import InputError
from nova_video.common.extras import install_command
from nova_video.io import media
from nova_video.io.files import lock_file
from nova_video.pipeline.offload import LowMemory
from nova_video.pipeline.request import GenerateRequest
from nova_video.sampling.presets import PRESETS

QUICK = ["--sets", "2", "--diffusion-steps", "1"]


def files() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def test_generate_writes_a_clip_and_its_record(run: Run, tiny_checkpoint: Path) -> None:
    settings = ["--num-frames", 5, "--fps", 6, "--guidance", 3, "--motion", 4, "--negative", "the background"]
    code, out, err = run(
        "generate", "a whale", "-o", "whale.mp4", "--model", tiny_checkpoint, "--seed", 3, *settings, *QUICK
    )
    assert (code, out, err) == (0, "whale.mp4\n", "")
    frames, fps = media.read_frames("whale.mp4")
    assert (frames.shape, fps) == ((5, 64, 96, 3), 6)
    record = media.read_metadata("whale.mp4")
    expected = {"prompt": "a whale", "negative": "the background", "seed": 3, "model": str(tiny_checkpoint)}
    assert expected.items() <= record.items()
    expected = {"num_frames": 5, "fps": 6, "guidance": 3, "motion": 4, "sets": 2, "diffusion_steps": 1, "image": None}
    assert expected.items() <= record["settings"].items()
    assert (record["settings"]["width"], record["settings"]["height"]) == (96, 64)


def test_generate_reaches_the_pipeline(run: Run, tiny_checkpoint: Path) -> None:
    """The file shows exactly what the pipeline makes for the same settings."""
    from nova_video import NovaPipeline

    run("generate", "a whale", "-o", "whale.png", "--model", tiny_checkpoint, "--seed", 3, "--guidance", 2, *QUICK)
    pipe = NovaPipeline.from_pretrained(tiny_checkpoint)
    made = pipe(
        "a whale",
        num_inference_steps=2,
        num_diffusion_steps=1,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    assert np.array_equal(media.read_frames("whale.png")[0][0], np.asarray(made))


def test_speed_is_asked_for(run: Run, tiny_checkpoint: Path) -> None:
    """A preset is shares of the model's own sets and steps, its parts can be named, and the plain loop is the same."""
    common = ("generate", "a whale", "--model", tiny_checkpoint, "--seed", 3, "--num-frames", 5)
    run(*common, "-o", "fast.mp4", "--preset", "fast", "--last-steps", 1)
    settings = media.read_metadata("fast.mp4")["settings"]
    preset = PRESETS["fast"]
    assert (settings["sets"], settings["diffusion_steps"]) == (round(64 * preset.sets), round(25 * preset.steps))
    assert (settings["preset"], settings["solver"], settings["last_steps"]) == ("fast", "dpm++", 1)
    for name, flags in [("plain", ["--no-compile"]), ("quick", [])]:
        run(*common, "-o", f"{name}.png", *QUICK, "--num-frames", 1, *flags)
    plain, quick = (media.read_frames(f"{name}.png")[0].astype(int) for name in ("plain", "quick"))
    assert np.abs(plain - quick).max() <= 1  # to rounding


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a computer without a GPU")
def test_low_memory_needs_a_gpu(run: Run, tiny_checkpoint: Path) -> None:
    code, out, err = run("generate", "a whale", "--model", tiny_checkpoint, "--low-memory")
    assert (code, out) == (2, "")
    assert err.startswith("nova: low_memory is for a GPU: got cpu")
    assert files() == []


def test_low_memory_is_said_in_flags(run: Run, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[LowMemory] = []

    def load(*_: object, low_memory: LowMemory, **__: object) -> None:
        asked.append(low_memory)
        raise InputError("enough")

    monkeypatch.setattr("nova_video.pipeline.pipeline.NovaPipeline.from_pretrained", load)
    common = ("generate", "a whale", "--model", tiny_checkpoint, "--device", "cpu", "--low-memory")
    for flags in ([], ["--tiled"], ["--int8-text", "--tiled"]):
        assert run(*common, *flags)[2] == "nova: enough\n"
    cpu = torch.device("cpu")
    assert asked == [LowMemory(cpu), LowMemory(cpu, tiled=True), LowMemory(cpu, "int8", tiled=True)]


def test_seed_decides(run: Run, tiny_checkpoint: Path) -> None:
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        run("generate", "a whale", "-o", f"{name}.png", "--model", tiny_checkpoint, "--seed", seed, *QUICK)
    first, again, other = (media.read_frames(f"{name}.png")[0] for name in "abc")
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_drawn_seed_is_told_and_repeats(run: Run, tiny_checkpoint: Path) -> None:
    run("generate", "a whale", "-o", "a.png", "--model", tiny_checkpoint, *QUICK)
    seed = media.read_metadata("a.png")["seed"]
    run("generate", "a whale", "-o", "b.png", "--model", tiny_checkpoint, "--seed", seed, *QUICK)
    assert np.array_equal(media.read_frames("a.png")[0], media.read_frames("b.png")[0])


def test_several_sentences(run: Run, tiny_checkpoint: Path) -> None:
    Path("list.txt").write_text("the red apple\n\n  the white whale \n", encoding="utf-8")
    code, out, _ = run(
        "generate", "a whale", "--prompts", "list.txt", "-o", "x.png", "--model", tiny_checkpoint, "--seed", 7, *QUICK
    )
    assert (code, out.split()) == (0, ["x-1.png", "x-2.png", "x-3.png"])
    records = [media.read_metadata(name) for name in out.split()]
    assert [record["prompt"] for record in records] == ["a whale", "the red apple", "the white whale"]
    assert [record["seed"] for record in records] == [7, 8, 9]
    run("generate", "the red apple", "-o", "alone.png", "--model", tiny_checkpoint, "--seed", 8, *QUICK)
    assert np.array_equal(media.read_frames("x-2.png")[0], media.read_frames("alone.png")[0])


def test_several_pictures_of_a_sentence_and_a_sheet(run: Run, tiny_checkpoint: Path) -> None:
    """Made together, each is the one of its own seed as alone, to rounding; the sheet shows them."""
    common = ["--model", tiny_checkpoint, *QUICK]
    flags = ["-n", 2, "--batch", 3, "--sheet", "sheet.png", "--format", "png", "-o", "out", "--seed", 7]
    code, out, err = run("generate", "a whale", "the red apple", *flags, *common)
    names = ["out/1-a-whale.png", "out/2-a-whale.png", "out/3-the-red-apple.png", "out/4-the-red-apple.png"]
    assert (code, out.split(), err) == (0, [*names, "sheet.png"], "")
    records = [media.read_metadata(name) for name in names]
    assert [(record["prompt"], record["seed"]) for record in records] == [
        ("a whale", 7),
        ("a whale", 8),
        ("the red apple", 9),
        ("the red apple", 10),
    ]
    run("generate", "the red apple", "-o", "alone.png", "--seed", 9, *common)
    together, alone = (media.read_frames(name)[0].astype(int) for name in (names[2], "alone.png"))
    assert np.abs(together - alone).max() <= 2
    assert np.abs(together - media.read_frames(names[3])[0]).max() > 50
    with Image.open("sheet.png") as sheet:
        assert sheet.width > 1000
        assert len(np.unique(np.asarray(sheet.convert("L")))) > 100
    line = run("generate", "a whale", "--sheet", "sheet.jpg", "--json", *common)[1].splitlines()[-1]
    assert json.loads(line) == {"sheet": "sheet.jpg"}


def test_a_batch_that_finds_no_memory(
    run: Run, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where nobody chose its size, the results are made one at a time."""
    from nova_video.cli import generate_command as cli_generate

    made: list[int] = []

    def make(*arguments: object) -> None:
        made.append(len(arguments[4]))  # type: ignore[arg-type]
        if made[-1] > 1:
            raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(cli_generate, "_make", make)
    monkeypatch.setattr(cli_generate, "_own_batch", lambda *_: 4)
    assert run("generate", "a whale", "-n", 5, "--model", tiny_checkpoint)[0] == 0
    assert made == [4, 1, 1, 1, 1, 1]
    assert "no memory for 4 at once: they are made one at a time" in caplog.text
    code, _, err = run("generate", "a whale", "-n", 5, "--batch", 2, "--model", tiny_checkpoint)
    assert (code, "out of memory: expected a smaller --batch, fewer frames" in err) == (2, True)


def test_formats(run: Run, tiny_checkpoint: Path) -> None:
    """Of files in a folder that is made, in the current one, and of a folder of frames."""
    common = ["--model", tiny_checkpoint, "--num-frames", 2, "--seed", 3, *QUICK]
    for flags, name in [
        (["--format", "webm"], "a-whale.webm"),
        (["--format", "mov", "-o", "new"], "new/a-whale.mov"),
        (["--format", "frames"], "a-whale"),
        (["--format", "frames", "-o", "seq"], "seq"),
    ]:
        assert run("generate", "a whale", *flags, *common) == (0, f"{name}\n", "")
        assert json.loads(run("info", name, "--json")[1])["seed"] == 3
    assert sorted(path.name for path in Path("seq").iterdir()) == ["frame-0001.png", "frame-0002.png"]
    for arguments, message in [
        (["--format", "frames", "-o", "seq"], "cannot write frames to seq: expected a new or an empty folder"),
        (["--format", "jpg"], "got 2 frames for a jpg: expected 1, or another format"),
    ]:
        code, _, err = run("generate", "a whale", *arguments, *common)
        assert (code, err) == (2, f"nova: {message}\n")


def test_names_come_from_the_sentence(run: Run, tiny_checkpoint: Path) -> None:
    common = ["--model", tiny_checkpoint, *QUICK]
    assert run("generate", "A whale, moving left!", *common)[1] == "a-whale-moving-left.png\n"
    assert run("generate", "A whale, moving left!", *common)[1] == "a-whale-moving-left-2.png\n"
    assert run("generate", "A whale", "--num-frames", 2, *common)[1] == "a-whale.mp4\n"
    Path("out").mkdir()
    assert run("generate", "a whale", "on red", "-o", "out", *common)[1].split() == [
        "out/1-a-whale.png",
        "out/2-on-red.png",
    ]


def test_image_is_the_first_frame(run: Run, tiny_checkpoint: Path) -> None:
    Image.new("RGB", (300, 200), (200, 30, 30)).save("red.jpg")
    common = ["--model", tiny_checkpoint, "--num-frames", 5, "--seed", 0, *QUICK]
    code, _, err = run("generate", "a whale", "--image", "red.jpg", "-o", "from.png", *common)
    assert (code, err) == (0, "")
    run("generate", "a whale", "-o", "without.png", *common)
    assert not np.array_equal(media.read_frames("from.png")[0], media.read_frames("without.png")[0])
    assert media.read_metadata("from.png")["settings"]["image"] == "red.jpg"


def test_json(run: Run, tiny_checkpoint: Path) -> None:
    _, out, _ = run("generate", "a whale", "the apple", "-o", "x.webp", "--json", "--model", tiny_checkpoint, *QUICK)
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["file"] for line in lines] == ["x-1.webp", "x-2.webp"]
    for line in lines:
        assert line.items() >= media.read_metadata(line["file"]).items()
        assert json.loads(run("info", line["file"], "--json")[1]) == media.read_metadata(line["file"])


def test_info(run: Run) -> None:
    record = {"prompt": "a whale", "seed": 3, "settings": {"guidance": 4.0, "image": None}}
    media.write_media(np.zeros((2, 8, 8, 3), np.uint8), "whale.mp4", 8, record)
    assert run("info", "whale.mp4") == (0, "prompt    a whale\nseed      3\nguidance  4.0\n", "")


def test_info_obeys_no_escape_sequence(run: Run) -> None:
    """A record that comes from anyone is shown, whatever is in it, and what a terminal would obey is escaped."""
    record = {
        "prompt": "a \x1b[2J whale\r\u202e\n鲸",
        "k\x07": [1, "x"],
        "settings": {"motion": [[0, 1], [0.5, "\x9b"]]},
    }
    media.write_media(np.zeros((1, 8, 8, 3), np.uint8), "whale.png", 8, record)
    code, out, err = run("info", "whale.png")
    expected = ["prompt  a \\x1b[2J whale\\r\\u202e\\n鲸", "k\\x07   [1, 'x']"]
    expected += ["motion  from 0 s: 1", "        from 0.5 s: \\x9b"]
    assert (code, out.splitlines(), err) == (0, expected, "")
    assert json.loads(run("info", "whale.png", "--json")[1]) == record


def test_output_that_is_not_utf_8(tmp_path: Path) -> None:
    """Letters that the terminal's encoding lacks are escaped, in help, results, errors and JSON."""
    media.write_media(np.zeros((1, 8, 8, 3), np.uint8), tmp_path / "鲸.png", 8, {"prompt": "鲸"})
    program = "import sys; from nova_video.cli.main import main; sys.exit(main(sys.argv[1:]))"
    for encoding, arguments, expected in [
        ("ascii", ["info", "鲸.png"], (0, b"prompt  \\u9cb8\n", b"")),
        ("ascii", ["info", "鲸.png", "--json"], (0, b'{"prompt": "\\u9cb8"}\n', b"")),
        ("cp1252", ["info", "鲸.mp4"], (2, b"", b"nova: there is no file \\u9cb8.mp4\n")),
        ("cp932", ["--help"], (0, None, b"")),
    ]:
        command = [sys.executable, "-c", program, *arguments]
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment, check=False)
        assert (done.returncode, expected[1] and done.stdout.replace(b"\r", b""), done.stderr) == expected


@pytest.mark.parametrize(
    ("sentence", "name"),
    [
        ("A whale, moving left!", "a-whale-moving-left"),
        ("NUL", "nul-clip"),
        ("com1.", "com1-clip"),
        ("...", "nova"),
        ("一只鲸鱼" * 9, "一只鲸鱼" * 5),
        ("../../etc/passwd", "etc-passwd"),
    ],
)
def test_names_that_every_system_accepts(sentence: str, name: str) -> None:
    assert name_of(sentence) == name


def test_sentence_that_is_no_text(run: Run) -> None:
    assert run("generate", "caf\udce9", "--model", "none") == (
        2,
        "",
        "nova: the sentence is 'caf\\udce9': expected text in UTF-8 or in the terminal's encoding\n",
    )
    code, _, err = run("generate", "caf\udcc3\udca9", "--model", "none")  # UTF-8 where the terminal's encoding is ASCII
    assert (code, "not found" in err) == (2, True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    media.write_media(np.zeros((1, 8, 8, 3), np.uint8), tmp_path / "x.png", 8, {"prompt": "a whale"})
    command = [sys.executable, "-m", "nova_video", "info", "x.png"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, cwd=tmp_path, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "nova: the output cannot be written: No space left on device\n")


def test_a_sentence_without_quotes(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run("generate", "a", "whale", "moving", "--model", "./none")
    assert "got 3 sentences of one word each: a sentence is to be in quotes" in caplog.text


def test_a_reader_that_has_enough_is_no_fault(run: Run) -> None:
    media.write_media(np.zeros((2, 8, 8, 3), np.uint8), "whale.mp4", 8, {"prompt": "a whale"})
    command = subprocess.Popen(
        [sys.executable, "-m", "nova_video", "info", "whale.mp4"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert command.stdout is not None
    command.stdout.close()
    assert (command.wait(60), command.stderr.read()) == (0, b"")


# Beyond one sentence and one clip


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """Ctrl-C is pressed at this set, or another signal comes."""
    from rich.progress import Progress

    sets = []

    def press(*_: object, **__: object) -> None:
        sets.append(1)
        if len(sets) == step:
            signal.raise_signal(number)

    monkeypatch.setattr(Progress, "update", press)


def write_noise(
    path: str, count: int = 1, size: tuple[int, int] = (64, 96), fps: float = 12, prompt: object = None
) -> np.ndarray:
    frames = np.random.default_rng(0).integers(0, 256, (count, *size, 3), np.uint8)
    media.write_media(frames, path, fps, {"prompt": prompt})
    return frames


def test_continue(run: Run, tiny_checkpoint: Path) -> None:
    """The result begins with the clip, bit for bit; without a sentence, it takes the clip's last one."""
    common = ["--model", tiny_checkpoint, "--seed", 1, *QUICK]
    given = write_noise("given.png", 7, prompt=[[0, "a whale"], [0.2, "the apple"]])
    code, out, err = run("generate", "--continue", "given.png", "--seconds", 1, "-o", "on.png", *common)
    assert (code, out, err) == (0, "on.png\n", "")
    frames, fps = media.read_frames("on.png")
    assert (len(frames), round(fps)) == (12, 12)
    assert np.array_equal(frames[:7], given)
    record = media.read_metadata("on.png")
    expected = {"continue": "given.png", "given_frames": 7, "num_frames": 12}
    assert record["prompt"] == "the apple"
    assert expected.items() <= record["settings"].items()
    code, *_ = run("generate", "a whale", "--continue", "given.png", "--num-frames", 12, "-o", "other.png", *common)
    assert code == 0
    assert not np.array_equal(media.read_frames("other.png")[0][7:], frames[7:])


def test_continue_another_size_and_rate(run: Run, tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_noise("given.png", 4, (30, 40), fps=10)
    common = ["--model", tiny_checkpoint, "--fps", 5, "--num-frames", 5, *QUICK]
    assert run("generate", "a whale", "--continue", "given.png", "-o", "on.mp4", *common)[0] == 0
    assert media.read_frames("on.mp4")[0].shape == (5, 64, 96, 3)
    assert media.read_metadata("on.mp4")["settings"]["given_frames"] == 2
    assert [r.getMessage() for r in caplog.records if r.name.startswith("nova_video")] == [
        "the given clip, 40x30 at 10 fps, is taken as 96x64 at 5 fps"
    ]


def test_timelines(run: Run, tiny_checkpoint: Path) -> None:
    """They reach the pipeline, the record has them, and `nova info` prints them."""
    from nova_video import NovaPipeline

    changes = ["--prompt-at", 0.4, "the apple", "--motion-at", 0.4, 2, "--guidance", 3, "--guidance-at", 0.2, 4]
    common = ["--num-frames", 9, "--model", tiny_checkpoint, "--seed", 3, *QUICK]
    code, _, err = run("generate", "a whale", *changes, "-o", "x.png", *common)
    assert (code, err) == (0, "")
    prompt = [(0, "a whale"), (0.4, "the apple")]
    motion, guidance = [(0, 5), (0.4, 2)], [(0, 3), (0.2, 4)]
    pipe = NovaPipeline.from_pretrained(tiny_checkpoint)
    made = pipe(
        prompt,
        num_frames=9,
        motion_flow=motion,
        guidance_scale=guidance,
        num_inference_steps=2,
        num_diffusion_steps=1,
        generator=torch.Generator().manual_seed(3),
    ).frames[0]
    assert np.array_equal(media.read_frames("x.png")[0], np.stack([np.asarray(frame) for frame in made]))
    record = media.read_metadata("x.png")
    assert record["prompt"] == [list(pair) for pair in prompt]
    assert record["settings"]["motion"] == [list(pair) for pair in motion]
    assert record["settings"]["guidance"] == [list(pair) for pair in guidance]
    lines = run("info", "x.png")[1].splitlines()
    assert [line.split("from")[-1] for line in lines[:2]] == [" 0 s: a whale", " 0.4 s: the apple"]
    assert "motion           from 0 s: 5.0" in lines


def test_live(run: Run, tiny_checkpoint: Path) -> None:
    common = ["--num-frames", 9, "--model", tiny_checkpoint, "--seed", 3, *QUICK]
    assert run("generate", "a whale", "--live", *common) == (0, "a-whale.mp4\n", "")
    run("generate", "a whale", "-o", "whole.png", *common)
    live, fps = media.read_frames("a-whale.mp4")
    whole = media.read_frames("whole.png")[0]
    assert (live.shape, fps) == (whole.shape, 12)
    assert np.abs(live.astype(int) - whole).mean() < 12  # the same noise, but for what the video format loses
    assert media.read_metadata("a-whale.mp4") == media.read_metadata("whole.png")


def test_live_begins_with_the_clip_to_go_on_from(run: Run, tiny_checkpoint: Path) -> None:
    write_noise("given.png", 6, prompt="a whale")
    common = ["--continue", "given.png", "--num-frames", 13, "--model", tiny_checkpoint, "--seed", 3, *QUICK]
    assert run("generate", "--live", "-o", "x.mp4", *common) == (0, "x.mp4\n", "")
    run("generate", "-o", "whole.mp4", *common)
    live, whole = media.read_frames("x.mp4")[0], media.read_frames("whole.mp4")[0]
    assert live.shape == whole.shape
    assert np.abs(live.astype(int) - whole).mean() < 6  # each is encoded in its own way
    assert media.read_metadata("x.mp4") == media.read_metadata("whole.mp4")


def test_live_without_end(run: Run, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the file properly: it holds what was ready."""
    interrupt_at(monkeypatch, 2 * 12)
    code, out, err = run(
        "generate", "a whale", "--live", "--seconds", "inf", "-o", "x.mp4", "--model", tiny_checkpoint, *QUICK
    )
    assert (code, out, err) == (130, "x.mp4\n", "nova: interrupted\n")
    frames, _ = media.read_frames("x.mp4")
    assert len(frames) == 33  # the autoencoder hands out 17 frames, then 16 at a time
    assert media.read_metadata("x.mp4")["settings"]["num_frames"] is None
    assert files() == ["x.mp4"]


def test_state_and_resume(run: Run, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped and gone on with, the file is the very same as without a stop."""
    common = ["--num-frames", 13, "--prompt-at", 0.5, "the apple", "--model", tiny_checkpoint, "--seed", 3, *QUICK]
    run("generate", "a whale", "-o", "whole.png", *common)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        done = run("generate", "a whale", "-o", "x.png", "--state", "x.safetensors", *common)
    assert done == (130, "", "nova: interrupted, to go on: nova generate --resume x.safetensors -o x.png\n")
    assert files() == ["whole.png", "x.safetensors"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert run("generate", "--resume", "x.safetensors")[0] == 130
    assert run("generate", "--resume", "x.safetensors") == (0, "x.png\n", "")
    assert Path("x.png").read_bytes() == Path("whole.png").read_bytes()
    assert files() == ["whole.png", "x.png"]


def test_sigterm_is_as_control_c(run: Run, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ["--num-frames", 13, "--model", tiny_checkpoint, *QUICK]
    for step, state, message in [
        (1, [], "terminated"),
        (6, ["--state", "my state"], "terminated, to go on: nova generate --resume 'my state' -o a-whale.mp4"),
    ]:
        with monkeypatch.context() as patch:
            interrupt_at(patch, step, signal.SIGTERM)
            assert run("generate", "a whale", *state, *common) == (143, "", f"nova: {message}\n")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert files() == ["my state"]


def test_live_and_resume(run: Run, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A live file is gone on with where it ended."""
    common = ["--num-frames", 37, "--model", tiny_checkpoint, "--seed", 3, *QUICK]
    run("generate", "a whale", "--live", "-o", "whole.mp4", *common)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 16)
        assert run("generate", "a whale", "--live", "-o", "x.mp4", "--state", "x.safetensors", *common)[0] == 130
    assert len(media.read_frames("x.mp4")[0]) == 17
    code, _, err = run("generate", "--resume", "x.safetensors", "-o", "y.mp4")
    assert code == 2
    assert "there is no file y.mp4: expected --output with the live clip" in err
    media.write_media(np.zeros((2, 64, 96, 3), np.uint8), "y.mp4", 12, {"prompt": "precious"})
    before = Path("y.mp4").read_bytes()
    code, _, err = run("generate", "--resume", "x.safetensors", "-o", "y.mp4")
    assert code == 2
    assert "y.mp4 was not made by the run of this state" in err
    assert Path("y.mp4").read_bytes() == before
    Path("y.mp4").unlink()
    assert run("generate", "--resume", "x.safetensors") == (0, "x.mp4\n", "")
    (live, fps), (whole, _) = media.read_frames("x.mp4"), media.read_frames("whole.mp4")
    assert (live.shape, fps) == (whole.shape, 12)
    assert np.array_equal(live[:17], whole[:17])
    assert np.abs(live.astype(int) - whole).mean() < 12
    assert files() == ["whole.mp4", "x.mp4"]


def test_files_that_another_run_writes(run: Run, tiny_checkpoint: Path) -> None:
    """They are refused before the model is loaded."""
    common = ["generate", "a whale", "--model", tiny_checkpoint / "none"]
    for name, flags in [("x.mp4", ["--live", "-o", "x.mp4"]), ("s", ["--state", "s"])]:
        with lock_file(Path(name)):
            code, _, err = run(*common, *flags)
            assert (code, err.count("\n")) == (2, 1)
            assert f"{name} is being written by another process" in err
    assert files() == []


def test_failed_writes_name_the_file(run: Run, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(media, "_write_video", full)
    code, _, err = run("generate", "a whale", "--num-frames", 5, "--model", tiny_checkpoint, *QUICK)
    assert (code, err) == (2, "nova: a-whale.mp4: No space left on device\n")
    assert files() == []


def test_resume_what_cannot_be(run: Run, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nova_video import NovaPipeline

    interrupt_at(monkeypatch, 3)
    common = ["--num-frames", 9, "--model", tiny_checkpoint, *QUICK]
    run("generate", "a whale", "--state", "x.safetensors", *common)
    pipe = NovaPipeline.from_pretrained(tiny_checkpoint)
    pipe.start(GenerateRequest("a whale")).save("python.safetensors")
    Path("words.txt").write_text("a whale")
    for arguments, message in [
        (["none.safetensors"], "there is no file none.safetensors"),
        (["words.txt"], "words.txt is not a saved generation"),
        (["python.safetensors"], "python.safetensors was not kept by nova generate --state"),
        (["x.safetensors", "--motion", "3"], "got --motion with --resume"),
        (["x.safetensors", "a whale"], "got a sentence with --resume"),
        (["x.safetensors", "--live"], "got --live with --resume"),
        (["x.safetensors", "--model", "emoji"], "x.safetensors was saved with another model"),
        (["x.safetensors", "--dtype", "bfloat16"], "x.safetensors was saved with a model in float32"),
    ]:
        code, out, err = run("generate", "--resume", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err
    code, _, err = run("generate", "a whale", "--state", "x.safetensors", *common)
    assert code == 2
    assert "x.safetensors is there already" in err
    Path("x.mp4").write_text("precious")
    code, _, err = run("generate", "--resume", "x.safetensors")
    assert (code, err) == (2, "nova: x.mp4 is there already: expected --output with the file to write\n")
    Path("x.mp4").unlink()
    assert files() == ["python.safetensors", "words.txt", "x.safetensors"]


def test_edit_a_picture(run: Run, tiny_checkpoint: Path) -> None:
    """New under the mask, the very same pixels elsewhere; a picture stays a picture."""
    given = write_noise("in.png")[0]
    mask = np.zeros((64, 96), np.uint8)
    mask[16:48, 32:80] = 255
    Image.fromarray(mask).save("mask.png")
    common = ["--model", tiny_checkpoint, "--seed", 3, *QUICK]
    assert run("edit", "in.png", "the apple", "--mask", "mask.png", *common) == (0, "the-apple.png\n", "")
    made = media.read_frames("the-apple.png")[0][0]
    assert np.array_equal(made[mask == 0], given[mask == 0])
    assert (made[mask > 0] != given[mask > 0]).mean() > 0.9
    record = media.read_metadata("the-apple.png")
    assert (record["prompt"], record["settings"]["edited"], record["settings"]["mask"]) == (
        "the apple",
        "in.png",
        "mask.png",
    )
    run("edit", "in.png", "the apple", "--strength", 0, "-o", "same.png", *common)
    assert np.array_equal(media.read_frames("same.png")[0][0], given)
    assert media.read_metadata("same.png")["settings"]["strength"] == 0


def test_edit_a_clip(run: Run, tiny_checkpoint: Path) -> None:
    """With a mask a frame, frames that are wholly black stay."""
    given = write_noise("in.png", 6)
    masks = np.zeros_like(given)
    masks[1:] = 255
    media.write_media(masks, "masks.mp4", 12, {})
    common = ["--model", tiny_checkpoint, "--seed", 3, *QUICK]
    assert run("edit", "in.png", "the apple", "--mask", "masks.mp4", *common) == (0, "the-apple.mp4\n", "")
    assert media.read_frames("the-apple.mp4")[0].shape == given.shape
    run("edit", "in.png", "the apple", "--mask", "masks.mp4", "-o", "out.png", *common)
    made = media.read_frames("out.png")[0]
    assert np.array_equal(made[0], given[0])
    assert (made[1:] != given[1:]).mean() > 0.9


def test_outpaint(run: Run, tiny_checkpoint: Path) -> None:
    """What was there is in the middle of the new canvas: here, 32x64 in 64x96."""
    given = write_noise("in.png", 1, (32, 64))[0]
    code, _, err = run(
        "edit", "in.png", "the apple", "--outpaint", 16, "-o", "x.png", "--model", tiny_checkpoint, *QUICK
    )
    assert (code, err) == (0, "")
    made = media.read_frames("x.png")[0][0]
    assert made.shape == (64, 96, 3)
    assert np.array_equal(made[16:-16, 16:-16], given)


def test_edit_takes_pictures_as_they_are_seen(run: Run, tiny_checkpoint: Path) -> None:
    """Turned upright by their EXIF, and on white where transparent."""
    upright = np.zeros((64, 96, 4), np.uint8)
    upright[:, :48] = (200, 30, 30, 255)
    exif = Image.Exif()
    exif[0x0112] = 8  # turn left to see it
    Image.fromarray(np.rot90(upright, -1)).save("in.png", exif=exif)
    run("edit", "in.png", "the apple", "--strength", 0, "-o", "x.png", "--model", tiny_checkpoint, *QUICK)
    made = media.read_frames("x.png")[0][0]
    assert (made[:, :48] == (200, 30, 30)).all()
    assert (made[:, 48:] == 255).all()


def test_long_sentence_is_cut_with_one_warning(
    run: Run, tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code, *_ = run("generate", "a whale " * 9, "-o", "x.png", "--model", tiny_checkpoint, *QUICK)
    assert code == 0
    assert [record.message.split(",")[0] for record in caplog.records if record.name.startswith("nova_video")] == [
        "a prompt is longer than the 8 tokens the model reads"
    ]


class GrayModel:
    """Stands in for a pipeline that paints every frame gray."""

    vae = None

    def __call__(self, prompt: list[str], *, num_frames: int, **_: object) -> SimpleNamespace:
        made = np.full((len(prompt), num_frames, 128, 128, 3), 0.5, np.float32)
        return SimpleNamespace(images=made[:, 0], frames=made)


def test_data_and_evaluate(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("data", "shapes", "-o", "world") == (0, "world: 10 objects\n", "")
    monkeypatch.setattr("nova_video.cli.evaluate.load_pipeline", lambda *_: GrayModel())
    monkeypatch.setattr("nova_worlds.evaluation.emoji.JUDGE_CLIPS", 12)
    code, out, err = run(
        "evaluate", "emoji", "--data", "world", "-o", "scores", "--num-clips", 12, "--num-pairs", 4, "--guidance", 2
    )
    assert (code, err) == (0, "")
    assert "motion" in out
    assert out.endswith("scores\n")
    assert sorted(path.name for path in Path("scores").iterdir()) == ["scores.json", "sheet.png"]
    report = json.loads(Path("scores/scores.json").read_text())
    command = "nova evaluate emoji --guidance 2.0 --data world --num-clips 12 --num-pairs 4"
    assert report["command"] == command
    assert (report["settings"]["num_clips"], report["settings"]["guidance_scale"]) == (12, 2)
    assert report["scores"]["generated"]["object"]["percent"] < 50


def test_defaults_of_evaluate_are_the_library_s() -> None:
    from nova_worlds.evaluation.emoji import EmojiSettings

    typed = parse(["evaluate", "emoji"])
    for name in ("num_clips", "num_pairs", "num_frames", "split", "seed", "batch_size"):
        assert getattr(typed, name) == getattr(EmojiSettings(), name)


WRONG: dict[str, tuple[list[str], str]] = {
    "unknown command": (["paint", "a whale"], "unknown command paint: expected one of generate, edit, "),
    "half a command": (["gen", "a whale"], "unknown command gen: expected generate\n"),
    "misspelt command": (["generat", "a whale"], "unknown command generat: expected generate\n"),
    "misspelt sub-command": (["bench", "sampel"], "unknown command sampel: expected sample\n"),
    "sentence without a command": (["a whale"], "no command is given before 'a whale': expected one, as in: nova"),
    "unknown option": (["generate", "a whale", "--xyzzy"], "--xyzzy: expected what nova generate --help lists"),
    "misspelt option": (["generate", "a whale", "--sede=3"], "unknown option --sede: expected --seed or "),
    "half an option": (["generate", "a whale", "--num_fr", "3"], "unknown option --num-fr: expected --num-frames\n"),
    "option with two meanings": (["generate", "a whale", "--steps", "3"], "expected --sets (sets of tokens that a fra"),
    "another tool's option": (["generate", "a whale", "--resolution", "128x128"], "expected --size\n"),
    "nearly two meanings": (["generate", "a whale", "--stepz", "3"], "--stepz: expected --sets (sets of tokens"),
    "seed of many digits": (["generate", "a whale", "--seed", "1" * 5000], "...: expected --seed N"),
    "sentence as an option": (["generate", "--prompt", "a whale"], "--prompt: expected the sentence in quotes"),
    "misspelt option of a group": (["bench", "sample", "--config", "x", "--repeat", "1"], "expected --repeats\n"),
    "one argument too many": (["info", "plain.png", "an owl"], "'an owl' is one too many: expected what nova info"),
    "not a number by an alias": (["generate", "a whale", "--cfg", "x"], "--cfg is 'x': expected --cfg SCALE (got"),
    "two formats": (["generate", "a whale", "-o", "x.png", "--format", "mp4"], "got --format mp4 and --output x.png"),
    "format in no folder": (["generate", "a whale", "-o", "none/x", "--format", "mp4"], "there is no folder none"),
    "no number of pictures": (["generate", "a whale", "-n", "0"], "num_images is 0: expected"),
    "batch of one": (["generate", "a whale", "--batch", "3"], "batch is 3 with one result: expected several"),
    "clips of a timeline": (["generate", "a whale", "-n", "2", "--live"], "got --live with 2 results: expected one"),
    "sheet that is no picture": (["generate", "a whale", "--sheet", "x.mp4"], "cannot write the sheet x.mp4: expected"),
    "live frames": (["generate", "a whale", "--live", "--format", "webm"], "cannot write webm while it is made"),
    "like what has no record": (["generate", "--like", "plain.png"], "plain.png carries no record"),
    "size twice": (["generate", "a whale", "--size", "8x8", "-W", "8"], "got --size with --width or --height"),
    "not a number": (["generate", "a whale", "--num-frames", "five"], "--num-frames"),
    "unknown choice": (["generate", "a whale", "--dtype", "float8"], "'float8'"),
    "unknown preset": (["generate", "a whale", "--preset", "turbo"], "Expected one of ('exact', 'balanced', 'fast')."),
    "unknown solver": (["edit", "plain.png", "an owl", "--solver", "none"], "Expected one of ('own', 'dpm++')."),
    "unknown precision": (
        ["generate", "a whale", "--dtype", "None"],
        "Expected one of ('auto', 'float32', 'float16', 'bfloat16').",
    ),
    "unknown preset to evaluate": (["evaluate", "emoji", "--preset", "turbo"], "('exact', 'balanced', 'fast')."),
    "tiles alone": (["generate", "a whale", "--tiled"], "got --tiled alone: expected --low-memory with it"),
    "8 bits alone": (["edit", "plain.png", "an owl", "--strength", "1", "--int8-text"], "got --int8-text alone"),
    "missing argument": (["info"], "FILE"),
    "no sentence": (["generate"], "no sentence given"),
    "empty sentence": (["generate", " "], "prompt is ' ': expected a sentence"),
    "no prompts file": (["generate", "--prompts", "none.txt"], "none.txt: No such file"),
    "empty prompts file": (["generate", "--prompts", "empty.txt"], "empty.txt is empty, expected one sentence a line"),
    "binary prompts file": (["generate", "--prompts", "binary.txt"], "binary.txt is not a text file"),
    "no frames": (
        ["generate", "a whale", "--num-frames", "0"],
        "num_frames is 0: expected a whole number of at least 1",
    ),
    "no sets": (["generate", "a whale", "--sets", "0"], "sets is 0"),
    "no steps": (["generate", "a whale", "--diffusion-steps", "0"], "diffusion_steps is 0"),
    "no preset": (["generate", "a whale", "--guided-sets", "2"], "guided_sets is 2.0: expected a number of at least 0"),
    "negative guidance": (["generate", "a whale", "--guidance", "-1"], "guidance_scale is -1.0"),
    "negative seed": (["generate", "a whale", "--seed", "-1"], "seed is -1"),
    "no rate": (["generate", "a whale", "--fps", "0"], "fps is 0.0"),
    "wrong size": (["generate", "a whale", "--size", "large"], "size is 'large', expected WIDTHxHEIGHT"),
    "unknown extension": (["generate", "a whale", "-o", "x.avi"], "'.avi', expected .mp4, .mov, .webm, "),
    "no extension": (["generate", "a whale", "-o", "x"], "expected .mp4, .mov, .webm, .webp, "),
    "no output folder": (["generate", "a whale", "-o", "none/x.mp4"], "there is no folder none"),
    "no seconds": (["generate", "a whale", "--seconds", "0"], "seconds is 0.0: expected a number of more than 0"),
    "negative seconds": (["generate", "a whale", "--seconds", "-2"], "seconds is -2.0"),
    "frames and seconds": (["generate", "a whale", "--seconds", "2", "--num-frames", "9"], "expected one of them"),
    "without end, not live": (["generate", "a whale", "--seconds", "inf"], "--seconds inf has no end: expected --live"),
    "live and not mp4": (["generate", "a whale", "--live", "-o", "x.webp"], "its extension must be .mp4"),
    "live and several": (["generate", "a whale", "an owl", "--live"], "got --live with 2 sentences: expected one"),
    "timeline and several": (
        ["generate", "a whale", "an owl", "--motion-at", "1", "2"],
        "got --motion-at with 2 sentences: expected one",
    ),
    "state and several": (
        ["generate", "a whale", "--prompts", "two.txt", "--state", "s"],
        "got --state with 3 sentences",
    ),
    "state in no folder": (["generate", "a whale", "--state", "none/s.safetensors"], "there is no folder none"),
    "state over a file": (["generate", "a whale", "--state", "plain.png"], "plain.png is there already"),
    "timeline out of order": (
        ["generate", "a whale", "--prompt-at", "2", "an owl", "--prompt-at", "1", "a cat"],
        "prompt changes at 1 s after 2 s: expected times that rise",
    ),
    "timeline before the start": (["generate", "a whale", "--motion-at", "-1", "2"], "motion_flow changes at -1 s"),
    "timeline beyond the end": (
        ["generate", "a whale", "--seconds", "2", "--prompt-at", "2", "an owl"],
        "prompt changes at 2 s: expected times before the clip's end, 2 s",
    ),
    "half a moment": (["generate", "a whale", "--prompt-at", "2"], "--prompt-at"),
    "no clip": (["generate", "a whale", "--continue", "none.mp4"], "there is no file none.mp4"),
    "not a clip": (["generate", "a whale", "--continue", "empty.txt"], "cannot read the file empty.txt"),
    "clip that is long enough": (
        ["generate", "a whale", "--continue", "plain.png", "--num-frames", "1"],
        "num_frames is 1 with 1 frames given: expected more than 1, in all",
    ),
    "clip without a sentence": (["generate", "--continue", "plain.png"], "no sentence given, and plain.png carries no"),
    "clip and image": (
        ["generate", "a whale", "--continue", "plain.png", "--image", "plain.png"],
        "got both of --image and --continue",
    ),
    "no drift option": (["generate", "a whale", "--hold-statistics", "2"], "hold_statistics is 2.0: expected"),
    "narrow context": (["generate", "a whale", "--context-frames", "1"], "context_frames is 1 with"),
    "no script": (["generate", "--script", "none.toml"], "none.toml: No such file"),
    "unknown script key": (
        ["generate", "--script", "good.toml"],
        "good.toml: unknown key kind: expected one of output",
    ),
    "nothing to edit": (["edit", "none.png", "an owl", "--strength", "0.5"], "there is no file none.png"),
    "no sentence for an edit": (["edit", "plain.png"], "PROMPT"),
    "edit of everything": (["edit", "plain.png", "an owl"], "nothing of plain.png would be kept: expected --mask"),
    "no mask": (["edit", "plain.png", "an owl", "--mask", "none.png"], "there is no file none.png"),
    "mask of another size": (
        ["edit", "plain.png", "an owl", "--mask", "small.png"],
        "mask_image is 2x3: expected 4x4, the size of the picture it belongs to",
    ),
    "too strong": (["edit", "plain.png", "an owl", "--strength", "1.5"], "strength is 1.5: expected"),
    "no border": (["edit", "plain.png", "an owl", "--outpaint", "0"], "outpaint is 0: expected"),
    "no place for an edit": (
        ["edit", "plain.png", "an owl", "--strength", "1", "-o", "none/x.png"],
        "there is no folder none",
    ),
    "no image": (["generate", "a whale", "--image", "none.png"], "there is no file none.png"),
    "unreadable image": (["generate", "a whale", "--image", "empty.txt"], "cannot read the file empty.txt"),
    "no such model": (["generate", "a whale", "--model", "./none"], "'./none' not found"),
    "model is a file": (["generate", "a whale", "--model", "empty.txt"], "model empty.txt: is a file"),
    "unknown device": (["generate", "a whale", "--device", "abacus"], "device is 'abacus'"),
    "no file to tell of": (["info", "none.mp4"], "there is no file none.mp4"),
    "nothing to tell": (["info", "plain.png"], "plain.png carries no record"),
    "no recipe": (["train", "none.toml"], "none.toml"),
    "unknown recipe key": (["train", "bad.toml"], "stepz"),
    "unknown recipe option": (["train", "good.toml", "--stepz", "3"], "unknown option --stepz: expected --steps\n"),
    "unknown setting of a table": (["train", "good.toml", "--optimizer.lrr", "3"], "expected --optimizer.lr or "),
    "setting without its table": (
        ["train", "good.toml", "--lr", "3"],
        "unknown option --lr: expected --optimizer.lr\n",
    ),
    "value too many": (["train", "good.toml", "--steps", "3", "4"], "argument '4' is one too many: expected a setting"),
    "no art": (["data", "emoji", "--art", "none", "--names", "none.json", "-o", "world"], "none"),
    "no world to evaluate on": (["evaluate", "emoji", "--data", "none"], "none"),
    "no clips to evaluate": (["evaluate", "emoji", "--num-clips", "0"], "num_clips is 0"),
    "no world folder": (["data", "shapes", "-o", "empty.txt"], "empty.txt"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(run: Run, case: str) -> None:
    Path("empty.txt").write_text("\n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x80")
    Path("bad.toml").write_text('kind = "transformer"\nstepz = 3\n')
    Path("good.toml").write_text('kind = "transformer"\nsteps = 3\n')
    Path("two.txt").write_text("an owl\na cat\n")
    Image.new("RGB", (4, 4)).save("plain.png")
    Image.new("RGB", (2, 3)).save("small.png")
    before = files()
    arguments, message = WRONG[case]
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("nova: ")
    assert err.count("\n") == 1
    assert message.lower() in err.lower()
    assert files() == before


def test_words_of_other_tools_are_aliases() -> None:
    for others, own in [
        (["--num_inference_steps", "3", "--num-diffusion-steps", "2"], ["--sets", "3", "--diffusion-steps", "2"]),
        (["--cfg", "3", "--negative-prompt", "red"], ["--guidance", "3", "--negative", "red"]),
        (["--guidance-scale", "3", "--motion-flow", "4"], ["--guidance", "3", "--motion", "4"]),
        (["--frames", "5", "--output-dir", "x"], ["--num-frames", "5", "-o", "x"]),
        (["-W", "64", "-H", "32"], ["--width", "64", "--height", "32"]),
    ]:
        assert parse(["generate", "a whale", *others]) == parse(["generate", "a whale", *own])
    typed, own = (parse(["evaluate", "emoji", flag, "3"]) for flag in ("--cfg-scale", "--guidance"))
    assert typed == own


def test_help_where_no_command_is_given(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["data"]):
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        assert stop.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: {' '.join(['nova', *arguments])} [-h]")


def test_version(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("--version")
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"nova-video {nova_video.__version__} (torch {version('torch')}, diff")


def test_help_of_a_recipe(run: Run) -> None:
    """Every setting with its value, its default and what it means."""
    Path("good.toml").write_text('kind = "transformer"\nsteps = 3\n[optimizer]\nlr = 0.1\n')
    code, out, err = run("train", "good.toml", "--help")
    assert (code, err) == (0, "")
    assert "\n--steps 3  (default: 40000)\n    Optimizer steps of the run.\n" in out
    assert "\n--optimizer.lr 0.1  (default: 0.0006)\n    Learning rate after the warm-up.\n" in out
    Path("other.toml").write_text('kind = "transformer"\n[dataset]\npath = "x"\n')
    Path("vae.toml").write_text('kind = "autoencoder"\n')
    for recipe in ("other.toml", "vae.toml"):
        out += run("train", recipe, "-h")[1]
    lines = out.splitlines()
    settings = [at for at, line in enumerate(lines) if line.startswith("--")]
    assert len(settings) > 100
    assert [lines[at] for at in settings if not lines[at + 1 : at + 2][0].startswith("    ")] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_asked_for_and_absent(run: Run) -> None:
    code, _, err = run("generate", "a whale", "--device", "cuda")
    assert (code, err.count("\n")) == (2, 1)
    assert "device 'cuda' asked for" in err


def refuse(**_: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_folder_that_cannot_be_written_to(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # as root every folder is writable
    for output in (["-o", "x.mp4"], []):
        code, _, err = run("generate", "a whale", *output)
        assert (code, err.count("\n")) == (2, 1)
        assert "is not writable" in err


def test_limits_of_the_checkpoint(run: Run, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are known before any weights are read."""

    def load(*_: object, **__: object) -> None:
        pytest.fail("the model is loaded")

    monkeypatch.setattr("nova_video.pipeline.pipeline.NovaPipeline.from_pretrained", load)
    common = ["generate", "a whale", "-o", "x.mp4", "--model", tiny_checkpoint]
    for extra, message in [
        (["--size", "100x64"], "multiples of 32"),
        (["--size", "128x64"], "expected 96x64"),
        (["--image", tiny_checkpoint / "x.png"], "no file"),
    ]:
        code, _, err = run(*common, *extra)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
    assert files() == []


def test_another_size_than_the_model_s_is_said(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    flags = ["-W", 96, "--num-frames", 1, "-o", "x.png", *QUICK]
    assert run("generate", "a whale on a blue background", *flags)[0] == 0
    said = [record.getMessage() for record in caplog.records if record.name.startswith("nova_video.cli")]
    assert said == ["size is 96x128: the model was trained at 128x128, others may look worse"]
    with Image.open("x.png") as image:
        assert image.size == (96, 128)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is an Apple GPU")
def test_mps(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run("generate", "a whale", "--device", "mps")
    assert (code, "torch finds no Apple GPU on this machine; expected cpu\n" in err) == (2, True)

    def lacking(_: object) -> None:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")

    monkeypatch.setitem(cli.COMMANDS, cli.Train, lacking)
    code, _, err = run("train", "x.toml")
    assert (code, err.startswith("nova: mps cannot compute this: expected --device cpu (Cannot convert")) == (2, True)


def test_corrupt_checkpoint(run: Run, tiny_checkpoint: Path) -> None:
    folder = Path("broken")
    for part in ("transformer", "vae", "scheduler", "text_encoder", "tokenizer"):
        (folder / part).mkdir(parents=True)
        for file in (tiny_checkpoint / part).iterdir():
            (folder / part / file.name).write_bytes(file.read_bytes())
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, err = run("generate", "a whale", "-o", "x.mp4", "--model", folder)
    assert (code, err.count("\n")) == (2, 1)
    assert "diffusion_pytorch_model.safetensors" in err


def test_missing_package_names_its_extra(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(_: object) -> None:
        raise ModuleNotFoundError("No module named 'tensorboard'", name="tensorboard")

    monkeypatch.setitem(cli.COMMANDS, cli.Train, lacking)
    assert run("train", "x.toml")[::2] == (
        2,
        f"nova: this needs the package tensorboard: {install_command('train')}\n",
    )


def test_faults_of_our_own_are_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(_: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setitem(cli.COMMANDS, cli.Train, faulty)
    with pytest.raises(RuntimeError, match="a fault"):
        run("train", "x.toml")


def test_libraries_that_say_it_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they log is not said a second time."""
    heard: list[str] = []
    library, plain = logging.getLogger("a_library"), logging.getLogger("another")
    monkeypatch.setattr(library, "handlers", [logging.StreamHandler(io.StringIO())])
    monkeypatch.setattr(plain, "handlers", [logging.NullHandler()])
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: heard.append(record.getMessage()))
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    monkeypatch.setitem(cli.COMMANDS, cli.Train, lambda args: None)
    assert cli.main(["train", "recipe.toml"]) == 0
    for logger, text in ((library, "said"), (library.getChild("part"), "said too"), (plain, "to be said")):
        logger.warning(text)
    assert heard == ["to be said"]


def test_a_process_that_others_left(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, as what happened is said by another; in a run of one process it would be a fault."""

    def left(args: object) -> None:
        raise RuntimeError("[pair.cc:538] Connection closed by peer [127.0.0.1]:55555")

    monkeypatch.setitem(cli.COMMANDS, cli.Train, left)
    with pytest.raises(RuntimeError, match="closed by peer"):
        cli.main(["train", "recipe.toml"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train", "recipe.toml"]) == 1
    assert capsys.readouterr().err == "nova: another process of this run has ended; what it said tells why\n"


def test_interrupted_while_writing(run: Run, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        Path(str(_[1])).write_bytes(b"half a clip")
        raise KeyboardInterrupt

    monkeypatch.setattr(media, "_write_video", interrupted)
    assert run("generate", "a whale", "-o", "x.mp4", "--model", tiny_checkpoint, *QUICK) == (
        130,
        "",
        "nova: interrupted\n",
    )
    assert files() == []


def test_progress_counts_every_set(run: Run, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.progress import Progress

    totals, done = [], []
    monkeypatch.setattr(Progress, "add_task", lambda self, text, total, completed: totals.append(total) or 0)
    monkeypatch.setattr(Progress, "update", lambda self, task, advance, description: done.append(description))
    common = ["-o", "x.mp4", "--model", tiny_checkpoint, "--num-frames", 5, "--sets", 3, "--diffusion-steps", 1]
    run("generate", "a whale", "the apple", *common)
    assert totals == [12]
    assert (len(done), done[0], done[-1]) == (12, "1/2: frame 1/2, set 1/3", "2/2: frame 2/2, set 3/3")
    Image.new("RGB", (96, 64)).save("first.png")
    run("generate", "a whale", "--image", "first.png", *common)
    assert totals == [12, 3]
    assert (len(done), done[-1]) == (15, "frame 2/2, set 3/3")


def test_help_and_import_are_quick_and_light(tmp_path: Path) -> None:
    """`import nova_video` and `nova --help` load no torch, start no connection and set no variable."""
    program = (
        "import os, sys, time; before = dict(os.environ); start = time.perf_counter()\n"
        "import nova_video, nova_video.cli.main\n"
        "try: nova_video.cli.main.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = ('torch', 'diffusers', 'transformers', 'av', 'requests', 'httpx')\n"
        "print([name for name in heavy if name in sys.modules])\n"
        "assert before == dict(os.environ); print(time.perf_counter() - start)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True)
    *_, modules, seconds = done.stdout.splitlines()
    assert "generate" in done.stdout
    assert modules == "[]"
    assert float(seconds) < 5  # about 0.3 on an idle machine
    assert list(tmp_path.iterdir()) == []


def test_control_c_while_sampling(run: Run, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.progress import Progress

    sets = []

    def press(*_: object, **__: object) -> None:
        sets.append(1)
        if len(sets) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Progress, "update", press)
    done = run("generate", "a whale", "-o", "x.mp4", "--model", tiny_checkpoint, "--sets", 8, "--diffusion-steps", 1)
    assert done == (130, "", "nova: interrupted\n")
    assert len(sets) == 3
    assert files() == []
