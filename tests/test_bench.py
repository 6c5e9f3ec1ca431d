"""Measuring: floors against other ways to count, rows on disk, the command, and tables that say what the rows say."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from plots import PLOTS, is_current, write_plots
from tables import EMPTY, RELEASED, filled, released_seconds, sweeps, tables
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import CONFORMANCE
from nova_video.bench.configs import SIZES, TEXT_DIM, build, resize_model
from nova_video.bench.floor import RATES, Floor, count_work, device_rates, floor_of, temporal_steps
from nova_video.bench.rows import PARTS, Row, as_lines, cells, read_rows, record_row, write_rows
from nova_video.bench.sample import Runs, SampleSettings, measure, request_of
from nova_video.cli import main as cli
from nova_video.cli.arguments import BenchSample, parse
from nova_video.common.errors import InputError
from nova_video.pipeline.pipeline import NovaPipeline
from nova_video.pipeline.request import GenerateRequest

H200 = RATES["H200"]
CLIPS = str(CONFORMANCE / "text-to-video")


def floor_of_size(name: str, batch: int = 1) -> Floor:
    pipe = build(SIZES[name], torch.device("meta"), torch.float16)
    request = GenerateRequest(prompt_embeds=[torch.zeros(20, TEXT_DIM)] * batch)
    return floor_of(count_work(pipe.transformer, request.resolve(pipe.defaults, pipe.capabilities)), H200)


@pytest.mark.parametrize(
    ("name", "seconds"),
    [("t2i-512-0.6b", 0.15), ("t2i-1024-0.6b", 0.86), ("t2i-1024-1.4b", 1.8), ("t2v-480-0.6b", 2.0)],
)
def test_floors_are_those_known(name: str, seconds: float) -> None:
    """To within 6%: how the known ones, of two digits, were counted is not recorded."""
    floor = floor_of_size(name)
    assert floor.by_flops == pytest.approx(seconds, rel=0.06)
    assert floor.seconds == floor.by_flops > floor.by_bytes > 0


def test_floor_of_a_batch() -> None:
    one, eight = floor_of_size("t2i-1024-0.6b"), floor_of_size("t2i-1024-0.6b", batch=8)
    assert eight.by_flops == pytest.approx(8 * one.by_flops)
    assert eight.by_bytes < 1.1 * one.by_bytes  # the weights are read once for all


def test_released_video_size() -> None:
    """Built from shapes alone, with as many values as the released files hold."""
    pipe = build(SIZES["t2v-480-0.6b"], torch.device("meta"), torch.float16)
    assert sum(value.numel() for value in pipe.transformer.state_dict().values()) == pytest.approx(645.5e6, abs=0.05e6)
    assert sum(weight.numel() for weight in pipe.vae.parameters()) == 239_189_991


def test_another_size_keeps_the_model() -> None:
    pipe = build(resize_model(SIZES["t2i-512-0.6b"], 256, 320), torch.device("meta"), torch.float16)
    assert pipe.capabilities.image_size == (256, 320)
    with pytest.raises(InputError, match="multiples of 32"):
        resize_model(SIZES["t2i-512-0.6b"], 250, 320)


@pytest.mark.parametrize("name", ["text-to-image", "text-to-video", "rotary-flow"])
def test_operations_are_those_torch_counts(name: str) -> None:
    """All of a call, but for the time embeddings, which the sampler may compute once or for every token."""
    pipe = NovaPipeline.from_pretrained(CONFORMANCE / name)
    pipe.set_progress_bar_config(disable=True)
    config, frames = pipe.transformer.config, 9 if pipe.capabilities.video else 1
    features = [torch.zeros(3, config.text_token_dim)] * 2
    request = GenerateRequest(
        prompt_embeds=features,
        num_frames=frames,
        num_inference_steps=3,
        num_diffusion_steps=2,
        output_type="latent",
        compile=False,
    )
    work = count_work(pipe.transformer, request.resolve(pipe.defaults, pipe.capabilities))
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        pipe.generate(request, torch.Generator().manual_seed(0))
    assert counter.get_total_flops() == pytest.approx(sum(work.flops.values()), rel=0.05)


def test_bounded_context_is_encoded_anew() -> None:
    pipe = build(SIZES["t2v-480-0.6b"], torch.device("meta"), torch.float16)
    embeds = [torch.zeros(20, TEXT_DIM)]
    plan = GenerateRequest(prompt_embeds=embeds, num_frames=25, context_frames=13).resolve(
        pipe.defaults, pipe.capabilities
    )
    whole = GenerateRequest(prompt_embeds=embeds, num_frames=25).resolve(pipe.defaults, pipe.capabilities)
    assert [keys for _, keys in temporal_steps(whole, 10, 5)] == [15, 25, 35, 45, 55, 65, 75]
    assert [queries for queries, _ in temporal_steps(whole, 10, 5)] == [15, 10, 10, 10, 10, 10, 10]
    assert [keys for _, keys in temporal_steps(plan, 10, 5)] == [15, 25, 35, 45, 45, 45, 45]
    assert [queries for queries, _ in temporal_steps(plan, 10, 5)] == [15, 10, 10, 10, 45, 45, 45]


def test_rates_are_of_known_devices() -> None:
    assert device_rates("NVIDIA H200", torch.float16) is device_rates("NVIDIA H200", torch.bfloat16) is H200
    assert device_rates("NVIDIA H200", torch.float32) is None
    assert device_rates("cpu (x86_64)", torch.float16) is None


# Rows -----------------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
QUICK = ["--sets", "3", "--diffusion-steps", "2", "--repeats", "2"]


def row(config: str = "t2v-480-0.6b", seconds: float | None = 5.0, **values: object) -> Row:
    """Like one of an H200."""
    given = {"preset": "exact", "batch": 1, "compile": True, "dtype": "float16", "device": "NVIDIA H200"}
    shape = {"frames": 33, "latent_frames": 9, "size": "768x480", "tokens": 1440, "floor_seconds": 2.0}
    more = {"versions": {"torch": "2.11.0"}, "command": f"nova bench sample --config {config}", "seconds": seconds}
    return Row(config=config, **(given | shape | more | values))


def curve() -> list[Row]:
    """A clip of three lengths, and a picture of two sizes."""
    clips = [row(seconds=s, frames=f, latent_frames=n, changed={"frames": f}) for f, n, s in ((9, 3, 1.5), (65, 17, 9))]
    small = {"size": "256x256", "tokens": 256, "frames": 1, "latent_frames": 1, "floor_seconds": 0.04}
    own = {"size": "512x512", "tokens": 1024, "frames": 1, "latent_frames": 1, "floor_seconds": 0.15}
    pictures = [
        row("t2i-512-0.6b", 0.4, **own),
        row("t2i-512-0.6b", 0.2, changed={"size": "256x256"}, **small),
    ]
    return [row(), *clips, *pictures]


def test_a_row_replaces_its_kind(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.json"
    assert read_rows(path) == []
    other = row(batch=8)
    for measured in (row(seconds=5.0), other, row(changed={"frames": 9}), row(seconds=4.0, command="again")):
        record_row(path, measured)
    assert [r.seconds for r in read_rows(path)] == [4.0, 5.0, 5.0]
    assert read_rows(path)[1] == other
    assert read_rows(path)[0].command == "again"


@pytest.mark.parametrize("text", ["{", "[1]", '[{"config": "a"}]', '[{"speed": 1}]'])
def test_a_file_of_something_else_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(InputError, match=r"rows\.json: expected a list of measured rows"):
        read_rows(tmp_path / "rows.json")


def test_a_row_is_one_line_under_its_header() -> None:
    header, line = as_lines(row(seconds=4.125, parts=dict.fromkeys(PARTS, 0.5), changed={"frames": 9}))
    assert len(header) == len(line)
    assert header.split()[:4] == ["config", "preset", "batch", "seconds"]
    assert "t2v-480-0.6b frames=9" in line
    assert "4.12" in line
    assert cells(row(compile=False))["preset"] == "exact, plain"
    (failed,) = as_lines(row(error="out of memory"))
    assert failed.endswith("failed: out of memory")


# The command ----------------------------------------------------------------------------------------------------------


def test_command_measures_and_goes_on(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two checkpoints, of which the second has no autoencoder: a row of each, and an exit code that tells."""
    monkeypatch.chdir(tmp_path)
    blind = tmp_path / "blind"
    for part in ("transformer", "scheduler"):
        (blind / part).parent.mkdir(exist_ok=True)
        (blind / part).symlink_to(tiny_checkpoint / part)
    configs = [str(blind), str(tiny_checkpoint)]
    code = cli.main(["bench", "sample", "--config", *configs, "--frames", "9", "--batch", "2", *QUICK])
    printed = capsys.readouterr()
    assert code == 2
    assert "1 of 2 failed" in printed.err
    values = json.loads((tmp_path / "benchmarks" / "results" / "sample.json").read_text())
    failed, done = read_rows(tmp_path / "benchmarks" / "results" / "sample.json")
    assert failed.seconds is None
    assert "no vae/" in failed.error
    expected = {"frames": 9, "latent_frames": 3, "batch": 2, "sets": 3, "diffusion_steps": 2, "size": "96x64"}
    assert expected.items() <= values[1].items()
    assert done.seconds_range[0] <= done.seconds <= done.seconds_range[1]
    assert 0 < done.vae_seconds < done.total_seconds < done.first_call_seconds * 10
    assert 0 < done.first_preview_seconds <= done.first_frame_seconds
    assert done.frames_per_second == pytest.approx(18 / done.total_seconds, rel=1e-2)
    assert (done.floor_seconds, done.floor_ratio, done.peak_memory_gb) == (None, None, None)
    assert done.finite
    assert set(done.parts) == set(PARTS)
    assert done.tflop > 0
    assert "t2v" not in printed.out
    assert f"{tiny_checkpoint} frames=9" in printed.out
    again = parse(done.command.split()[1:])
    assert isinstance(again, BenchSample)
    assert (again.config, again.batch, again.frames, again.sets, again.repeats) == ((configs[1],), 2, 9, 3, 2)


def test_what_is_timed_is_the_call(tiny_checkpoint: Path) -> None:
    """Sampled to latents and then decoded: the pixels that the pipeline gives."""
    pipe = NovaPipeline.from_pretrained(tiny_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    asked = SampleSettings(frames=5, sets=2, diffusion_steps=1, compile=False)
    runs = Runs(pipe, request_of(pipe, asked, "tiny"), torch.device("cpu"))
    assert runs.request.compile is False
    generation = runs.sampled()
    pixels = generation.run().frames
    expected = pipe.generate(
        dataclasses.replace(runs.request, output_type="pt"), torch.Generator().manual_seed(0)
    ).frames
    assert torch.equal(pixels, expected)


def test_presets_are_timed_against_the_exact_work(tiny_checkpoint: Path) -> None:
    pipe = NovaPipeline.from_pretrained(tiny_checkpoint)
    exact = request_of(pipe, SampleSettings(frames=1), "tiny").resolve(pipe.defaults, pipe.capabilities)
    row = measure(str(tiny_checkpoint), SampleSettings(preset="fast", frames=1, repeats=1), "nova bench sample")
    assert (row.error, row.preset) == (None, "fast")
    assert row.tflop == pytest.approx(sum(count_work(pipe.transformer, exact).flops.values()) / 1e12, rel=1e-3)
    assert row.sets * row.diffusion_steps < exact.num_inference_steps * exact.num_diffusion_steps


def test_profile_is_a_trace(tmp_path: Path, tiny_checkpoint: Path) -> None:
    pipe = NovaPipeline.from_pretrained(tiny_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    runs = Runs(
        pipe, request_of(pipe, SampleSettings(frames=9, sets=2, diffusion_steps=1), "tiny"), torch.device("cpu")
    )
    runs.profile(tmp_path / "trace.json")
    assert "aten::addmm" in {
        event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere"], "config is 'nowhere': expected one of t2i-512-0.6b"),
        (["--config", "emoji", "--batch", "0"], "batch is 0"),
        (["--config", "emoji", "--repeats", "0"], "repeats is 0"),
        (
            ["--config", "emoji", "--preset", "hasty"],
            "invalid choice 'hasty' for argument '--preset'",
        ),
        (["--config", "emoji", "--size", "big"], "size is 'big'"),
        (["--config", "t2i-512-0.6b", "--size", "100x128"], "size is 100x128: expected width and height in multiples"),
        (["--config", "t2i-512-0.6b", CLIPS, "--size", "64x64"], "size is 64x64: expected 96x64, the only one"),
        (["--config", "t2i-512-0.6b", "--frames", "9"], "num_frames is 9"),
        (["--config", "t2i-512-0.6b", "--sets", "0"], "sets is 0"),
        (["--config", "emoji", "emoji", "--profile", "trace.json"], "--profile with 2 configurations"),
        (["--config", "emoji", "--device", "cuda:99"], "cuda:99"),
        (["--config", "emoji", "--output", "rows.json"], "rows.json: expected a list"),
    ],
)
def test_wrong_input_is_found_before_the_work(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.json").write_text("no rows")
    monkeypatch.setattr("nova_video.bench.sample.measure", None)
    assert cli.main(["bench", "sample", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("benchmarks").exists()


# Tables and plots -----------------------------------------------------------------------------------------------------


def test_tables_say_what_the_rows_say() -> None:
    one = row(seconds=4.0, repeats=3, floor_ratio=2.0, vae_seconds=0.5, total_seconds=4.5)
    made = tables([one, row("other", error="why")])
    cells = [cell.strip() for cell in made["speed"].splitlines()[-1].strip("|").split("|")]
    assert cells[:3] == ["t2v-480-0.6b", "exact", "1"]
    assert cells[3:] == ["40.9", "**4**", "- to -", "3", "10.2", "2", "2", "0.5", "4.5"]
    assert "other" not in made["speed"]
    assert "Failed: why" in made["commands"]
    assert tables([])["speed"] == EMPTY


def test_released_times_are_for_the_same_work() -> None:
    assert released_seconds(row("t2i-1024-0.6b", batch=8)) == RELEASED["t2i-1024-0.6b", 8]
    assert released_seconds(row("t2i-1024-0.6b", batch=4)) is None
    assert released_seconds(row(changed={"frames": 9})) is None
    assert released_seconds(row(device="NVIDIA A100-SXM4-80GB")) is None


def test_sweeps_differ_in_one_thing() -> None:
    found = sweeps([*curve(), row(changed={"frames": 9, "sets": 8})], "frames")
    assert {name: [r.frames for r in rows] for name, rows in found.items()} == {"t2v-480-0.6b, exact": [9, 33, 65]}
    sizes = sweeps(curve(), "size")
    assert {name: [r.tokens for r in rows] for name, rows in sizes.items()} == {"t2i-512-0.6b, exact": [256, 1024]}
    made = tables(curve())
    assert "| t2v-480-0.6b, exact | 65 | 17 | 9 | 0.529 |" in made["frames"]
    assert "| t2i-512-0.6b, exact | 256x256 | 256 | 0.2 | 0.04 | - |" in made["tokens"]


def test_plots_know_their_rows(tmp_path: Path) -> None:
    for path in write_plots(curve(), tmp_path):
        assert is_current(path, curve())
        assert not is_current(path, curve()[:-1])
        assert Image.open(path).width > 500
    assert {path.stem for path in tmp_path.iterdir()} == set(PLOTS)
    assert not is_current(tmp_path / "none.png", [])


def test_a_page_has_a_place_for_every_table() -> None:
    page = "a\n<!-- begin speed -->\nold\n<!-- end speed -->\nb\n"
    assert filled(page, {"speed": "new"}) == "a\n<!-- begin speed -->\nnew\n<!-- end speed -->\nb\n"
    with pytest.raises(InputError, match="no single place for the table parts"):
        filled(page, {"parts": "new"})


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """benchmarks/tables.py"""
    spec = importlib.util.spec_from_file_location("tables_command", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_recorded_tables_are_those_of_the_rows(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(script.Tables(check=True)) == 0, capsys.readouterr().err


def test_stale_tables_are_found(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, rows = tmp_path / "README.md", tmp_path / "rows.json"
    page.write_text((ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    write_rows(rows, curve())
    asked = script.Tables(check=True, rows=rows, page=page, plots=tmp_path / "plots")
    assert script.main(asked) == 1
    stale = capsys.readouterr().err
    assert "README.md is not that of the rows" in stale
    assert "floor.png" in stale
    assert script.main(dataclasses.replace(asked, check=False)) == 0
    assert script.main(asked) == 0


def test_recorded_rows_can_be_made_again() -> None:
    """Each row's command is one that `nova` understands, of that row."""
    for measured in read_rows(ROOT / "benchmarks" / "results" / "sample.json"):
        args = parse(measured.command.split()[1:])
        assert isinstance(args, BenchSample)
        assert (args.config, args.preset, args.batch) == ((measured.config,), measured.preset, measured.batch)
        assert measured.device
        assert measured.versions


def test_commands_that_record_are_understood() -> None:
    """record.sh, with an echo in place of `nova`."""
    environment = os.environ | {"NOVA": "echo"}
    command = ["sh", str(ROOT / "benchmarks" / "record.sh"), "rows.json"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    asked = [parse(line.split()) for line in run.stdout.splitlines()]
    assert {config for args in asked for config in args.config} == set(SIZES)
    assert {args.output for args in asked} == {Path("rows.json")}
    assert {args.batch for args in asked} == {1, 8}
