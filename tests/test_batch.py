"""Batches of `nova generate --prompts`: files of prompts, an index, going on after a stop, failures of single lines."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conftest import Run
from nova_video.cli.arguments import Generate
from nova_video.cli.batch import INDEX, read_notes
from nova_video.cli.batch_ray import WorkerPlan, plan_workers
from nova_video.cli.prompt_file import PromptLine, read_prompt_file
from nova_video.common.errors import InputError
from nova_video.io import media

FLAGS = ("--sets", 2, "--diffusion-steps", 1, "--frames", 1)
LINES = [
    {"prompt": "a whale", "seed": 3},
    {"prompt": "the apple", "num_images_per_prompt": 2, "guidance": 2.0},
    {"prompt": [[0, "a whale"], [0.1, "the apple"]], "num_frames": 5, "motion_flow": 4},
    {"prompt": "a whale", "image": "given.png", "num_frames": 5},
]


def write_lines(path: Path, lines: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def rows_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / INDEX).read_text().splitlines()]


@pytest.fixture
def many(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 48), (200, 30, 30)).save(tmp_path / "given.png")
    return write_lines(tmp_path / "many.jsonl", LINES)


def test_a_stopped_batch_goes_on_to_the_same_bytes(
    run: Run, many: Path, tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    call = ("generate", "--prompts", many, "-o", "made", "--model", tiny_checkpoint, *FLAGS, "--index", "index.parquet")
    code, printed, _ = run(*call)
    assert code == 0
    made, whole = tmp_path / "made", content(tmp_path / "made")
    rows = rows_of(made)
    notes = read_notes(made)
    assert notes is not None
    assert [row["seed"] for row in rows] == [3, *(notes.seed + index for index in range(1, 5))]
    assert sorted(printed.split()) == [f"made/{row['file']}" for row in rows]
    assert [row["frames"] for row in rows] == [1, 1, 1, 5, 5]
    assert media.read_metadata(made / str(rows[1]["file"]))["settings"]["guidance"] == 2.0
    assert pq.read_table(tmp_path / "index.parquet").column("file").to_pylist() == [row["file"] for row in rows]

    lines = (made / INDEX).read_text().splitlines(keepends=True)
    (made / INDEX).write_text(lines[3] + lines[0] + lines[1][:40])  # the next one was being written
    kept = {str(rows[index]["file"]): (made / str(rows[index]["file"])).stat().st_mtime_ns for index in (0, 3)}
    caplog.set_level("INFO", "nova_video")
    code, printed, _ = run(*call)
    assert code == 0
    assert "2 of 5 results are there already" in caplog.text
    assert len(printed.split()) == 3
    assert content(made) == whole
    assert {name: (made / name).stat().st_mtime_ns for name in kept} == kept

    code, _, said = run(*call[:-2], "--seed", notes.seed + 1)
    assert code == 2
    assert f"seed is {notes.seed + 1}: the batch in made began with {notes.seed}" in said
    code, _, said = run(*call, "--threads", notes.threads + 1)
    assert (code, f"the batch in made began with {notes.threads}" in said) == (2, True)
    write_lines(many, [{"prompt": "the apple", "seed": 3}, *LINES[1:]])
    code, _, said = run(*call)
    assert code == 2
    assert 'line 1: prompt is "the apple", and made/index.jsonl has "a whale" for it' in said
    assert content(made) == whole


def test_a_failure_costs_its_line_alone(
    run: Run, many: Path, tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "given.png").write_bytes(b"no picture")
    write_lines(many, [LINES[3], LINES[0]])
    call = ("generate", "--prompts", many, "-o", "made", "--model", tiny_checkpoint, *FLAGS, "--seed", 1)
    code, printed, said = run(*call)
    assert code == 1
    assert "line 1: cannot read the image given.png" in caplog.text
    assert "1 of 2 results failed: made/index.jsonl tells why" in said
    assert printed.split() == ["made/000002-a-whale.png"]
    first, second = rows_of(tmp_path / "made")
    assert "given.png" in str(first["error"])
    assert (first["file"], second["error"]) == (None, None)
    Image.new("RGB", (64, 48)).save(tmp_path / "given.png")
    assert run(*call)[0] == 0  # what failed is tried again


def test_results_together_are_those_alone(run: Run, many: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    write_lines(many, [{"prompt": name} for name in ("a whale", "the apple", "the whale")])
    call = ("generate", "--prompts", many, "--model", tiny_checkpoint, *FLAGS, "--seed", 1)
    assert run(*call, "-o", "alone")[0] == run(*call, "-o", "together", "--batch", 2)[0] == 0
    for one, other in zip(rows_of(tmp_path / "alone"), rows_of(tmp_path / "together"), strict=True):
        pictures = [media.load_image(tmp_path / name / str(one["file"])) for name in ("alone", "together")]
        assert one == other
        assert max(high for _, high in pictures[0].getextrema()) > 0
        assert max(abs(a - b) for a, b in zip(*(picture.tobytes() for picture in pictures), strict=True)) <= 1


def test_lines_of_parquet_and_text(tmp_path: Path) -> None:
    table = {"prompt": ["a whale", "an owl"], "num_frames": [17.0, None], "motion_flow": [[[0, 1.0], [1, 2.0]], None]}
    pq.write_table(pa.table(table), tmp_path / "many.parquet")
    first, second = read_prompt_file(tmp_path / "many.parquet")
    assert first.settings == {"prompt": "a whale", "num_frames": 17, "motion_flow": [[0, 1.0], [1, 2.0]]}
    assert type(first.settings["num_frames"]) is int
    assert second.settings == {"prompt": "an owl"}
    (tmp_path / "many.txt").write_text("a whale\n\n  an owl \n")
    assert [line.number for line in read_prompt_file(tmp_path / "many.txt")] == [1, 3]
    (tmp_path / "many.jsonl").write_text('{"prompt": "a", "num_inference_steps": 4, "sets": null}\n')
    with pytest.raises(InputError, match="num_inference_steps is there twice|sets is there twice"):
        read_prompt_file(tmp_path / "many.jsonl")
    (tmp_path / "many.jsonl").write_text('{"prompt": "a", "num_inference_steps": 4, "motion": 2}\n')
    assert read_prompt_file(tmp_path / "many.jsonl") == [
        PromptLine(1, {"prompt": "a", "sets": 4, "motion_flow": 2}, {})
    ]


WRONG = {
    "not JSON": ('{"prompt": }', "line 1 is not JSON"),
    "no object": ('["a whale"]', "line 1 is ['a whale']: expected an object"),
    "unknown field": ('{"prompt": "a", "num_frame": 5}', "line 1: unknown field num_frame: expected num_frames"),
    "a field of Python": ('{"prompt": "a", "output_type": "pt"}', "line 1: unknown field output_type"),
    "no prompt": ('{"seed": 5}', "line 1 has no prompt"),
    "two prompts": ('{"prompt": ["a", "b"]}', "line 1: prompt is ['a', 'b']: expected one sentence"),
    "a number out of bounds": ('{"prompt": "a", "sets": 0}', "line 1: sets is 0: expected"),
    "no number": ('{"prompt": "a", "motion": NaN}', "line 1: motion_flow is nan: expected"),
    "a timeline that falls": ('{"prompt": [[1, "a"], [0, "b"]]}', "line 1: prompt starts at 1 s"),
    "a missing file": ('{"prompt": "a", "image": "none.png"}', "line 1: image is none.png: expected a file"),
    "too long for a picture's mask": ('{"prompt": "a", "mask_image": 5}', "line 1: mask_image is 5: expected the name"),
    "without an end": ('{"prompt": "a", "num_frames": Infinity}', "line 1: num_frames is inf: expected a number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_lines_are_named_before_anything_is_made(
    name: str, run: Run, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    line, expected = WRONG[name]
    (tmp_path / "many.jsonl").write_text(line + "\n")
    code, printed, said = run("generate", "--prompts", "many.jsonl", "-o", "made", "--model", tiny_checkpoint)
    assert (code, printed) == (2, "")
    assert expected in said
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--engine", "ray", "a whale"], "got --engine without --prompts"),
        (["--prompts", "many.jsonl"], "a batch has no folder"),
        (["--prompts", "many.jsonl", "-o", "m", "--workers", "2"], "got --workers without --engine ray"),
        (["--prompts", "many.jsonl", "-o", "m", "--index", "i.csv"], "cannot write the index i.csv"),
        (["--prompts", "many.jsonl", "-o", "m", "--live"], "got --live with a batch"),
        (["--prompts", "many.jsonl", "-o", "."], "is not empty and no batch began there"),
        (["--prompts", "many.csv", "-o", "m", "--engine", "local"], "cannot read prompts from many.csv"),
    ],
)
def test_flags_that_do_not_fit(flags: list[str], expected: str, run: Run, many: Path) -> None:
    code, printed, said = run("generate", *flags)
    assert (code, printed) == (2, "")
    assert expected in said


def test_workers_share_what_ray_has() -> None:
    def plan(cores: int, gpus: int, **flags: object) -> WorkerPlan:
        return plan_workers(Generate(**flags), cores, gpus)  # type: ignore[arg-type]

    assert plan(2, 0) == WorkerPlan("cpu", 2, 1)
    assert plan(64, 0) == WorkerPlan("cpu", 8, 8)
    assert plan(64, 0, workers=4) == WorkerPlan("cpu", 4, 16)
    assert plan(64, 0, threads=16) == WorkerPlan("cpu", 4, 16)
    assert plan(64, 4) == WorkerPlan("cuda", 4, 1)
    assert plan(64, 4, device="cpu", workers=2, threads=2) == WorkerPlan("cpu", 2, 2)
    for flags in ({"workers": 5}, {"device": "cuda:1"}, {"device": "cpu", "workers": 40, "threads": 2}):
        with pytest.raises(InputError, match="expected"):
            plan(64, 4, **flags)
