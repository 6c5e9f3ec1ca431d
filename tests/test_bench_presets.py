"""What shortcuts cost: the same sentences and numbers for all, judged as everywhere, kept and compared in pairs."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tables import EMPTY, presets_table

from conftest import save_tiny_bert, save_tiny_tokenizer
from nova_video.autoencoders import AutoencoderKLCausalTiny
from nova_video.cli import main as cli
from nova_video.cli.arguments import BenchPresets, parse
from nova_video.common.errors import InputError
from nova_video.common.fast_parts import find_fast
from nova_video.model import NOVATransformer3DModel
from nova_video.pipeline.pipeline import NovaPipeline
from nova_video.pipeline.settings import CheckpointSettings, Defaults
from nova_video.sampling.presets import PRESETS
from nova_worlds.evaluation.emoji import EmojiSettings
from nova_worlds.judging.rates import PairedRates
from nova_worlds.presets import preset_study as presets
from nova_worlds.presets.preset_outcome import digest, load_tensors, save_tensors
from nova_worlds.presets.preset_rows import (
    PresetRow,
    Score,
    as_aligned,
    merge_rows,
    read_preset_rows,
    write_preset_rows,
)
from nova_worlds.presets.preset_study import OTHER_SEED, VARIANTS, Maker, VariantSettings, frames_of, measure_presets
from nova_worlds.rendering.shapes import prepare_shapes
from nova_worlds.rendering.world import EmojiWorld

SETTINGS = EmojiSettings(num_clips=3, num_pairs=2, num_frames=5, batch_size=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of random weights that makes clips of the world's size, and a world of shapes."""
    place = tmp_path_factory.mktemp("presets")
    torch.manual_seed(0)
    transformer = NOVATransformer3DModel(
        image_dim=4,
        image_size=(128, 128),
        image_stride=8,
        image_base_size=(8, 8),
        video_base_size=(2, 4, 4),
        video_mixer_rank=-1,
        text_token_dim=32,
        text_token_len=16,
        rotary_pos_embed=True,
        arch=("vit_d1w64", "vit_d2w64", "mlp_d1w64"),
    )
    for weight in transformer.parameters():  # layers that start at zero would make all ways alike
        torch.nn.init.normal_(weight, std=0.1)
    vae = AutoencoderKLCausalTiny(
        latent_channels=4, block_out_channels=(16, 16, 16), decoder_layers=(1, 1, 1), norm_num_groups=4
    )
    settings = CheckpointSettings(
        defaults=Defaults(num_frames=5, num_inference_steps=4, num_diffusion_steps=4, guidance_scale=2)
    )
    NovaPipeline(transformer, FlowMatchEulerDiscreteScheduler(), vae, settings=settings).save_pretrained(place / "tiny")
    save_tiny_tokenizer(place / "tiny" / "tokenizer")
    save_tiny_bert(place / "tiny" / "text_encoder")
    prepare_shapes(place / "shapes", score_clips=1)
    return place / "tiny", place / "shapes"


@pytest.fixture(autouse=True)
def no_judging_of_the_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short clips and few of them: real renders are judged in other tests."""
    monkeypatch.setattr("nova_worlds.evaluation.emoji.JUDGE_CLIPS", 5)
    monkeypatch.setattr(presets, "JUDGE_CLIPS", 2)
    monkeypatch.setattr(presets, "check_judge", lambda rates, judged: None)


def asked(folders: tuple[Path, Path], keep: Path, *variants: str, **changes: Any) -> VariantSettings:
    settings = replace(SETTINGS, **changes)
    return VariantSettings(str(folders[0]), folders[1], keep, settings, variants or ("balanced",), device="cpu")


def measured(what: VariantSettings) -> tuple[dict[str, PresetRow], list[str]]:
    """Rows by variant, and those that were taken from the folder."""
    found = list(measure_presets(what, "nova bench presets"))
    return {row.preset: row for row, _ in found}, [row.preset for row, kept in found if kept]


def test_every_variant_is_one_part_or_a_preset() -> None:
    assert VARIANTS["balanced"] is PRESETS["balanced"]
    assert VARIANTS["fast"] is PRESETS["fast"]
    assert next(iter(VARIANTS)) == "exact"
    assert VARIANTS["exact"] == VARIANTS[OTHER_SEED]
    with pytest.raises(InputError, match="variants: got hasty: expected some of exact, "):
        VariantSettings("emoji", Path(), Path(), SETTINGS, ("fast", "hasty"))


def test_same_sentences_for_all(folders: tuple[Path, Path], tmp_path: Path) -> None:
    rows, kept = measured(asked(folders, tmp_path, "dpm-0.5", "sets-0.5", "guided-sets-0.5", OTHER_SEED))
    assert list(rows) == ["exact", "dpm-0.5", "sets-0.5", "guided-sets-0.5", OTHER_SEED]
    assert kept == []
    exact, other = rows["exact"], rows[OTHER_SEED]
    assert (exact.distance, exact.speedup) == (0, 1)
    assert {score.points for score in exact.scores.values()} == {0}
    assert 0 < rows["dpm-0.5"].distance < other.distance
    assert 0 < rows["guided-sets-0.5"].distance < other.distance
    assert 1 < other.distance < 2  # of unrelated latents: about the root of 2
    assert {name: score.of for name, score in other.scores.items()} == {
        **dict.fromkeys(["background", "motion", "object", "object_top5", "all"], 3),
        **dict.fromkeys(["relation", "both_objects"], 2),
    }
    assert [(row.sets, row.diffusion_steps) for row in rows.values()] == [(4, 4), (4, 2), (2, 4), (4, 4), (4, 4)]
    assert rows["sets-0.5"].shortcuts == {"sets": 0.5}
    assert exact.seconds_per_clip == pytest.approx(exact.seconds / 2, rel=1e-3)
    assert exact.total_seconds == pytest.approx(exact.seconds + exact.vae_seconds, rel=1e-3)
    assert all(score.interval_95[0] <= score.percent <= score.interval_95[1] for score in exact.scores.values())


def test_what_is_judged_is_the_call(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """A batch's clips are those that the pipeline makes of its sentences, as the preset has it."""
    what = asked(folders, tmp_path)
    maker = Maker(what, folders[0], EmojiWorld.load(folders[1]))
    for spec in maker.specs:
        batch = spec.select(slice(2))
        made = maker._batch("fast", batch, 7)
        called = maker.pipe(
            maker.world.captions(batch),
            num_frames=spec.num_frames,
            preset="fast",
            generator=torch.Generator().manual_seed(7),
            output_type="pt",
        )
        apart = (made.frames.int() - frames_of(called).int()).abs()
        assert apart.max() <= 1  # sentences are rounded as those that they are encoded with
        assert apart.float().mean() < 1e-3
        assert made.frames.shape == (2, spec.num_frames, 128, 128, 3)
        assert made.latents.shape[:3] == (2, 4, 2 if spec.num_frames > 1 else 1)


def test_a_run_goes_on(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One variant fails: the next run makes it alone."""
    made: list[str] = []
    broken = {"sets-0.5"}
    whole = Maker.make

    def fails(self: Maker, name: str, key: str) -> Any:
        made.append(name)
        if name in broken:
            raise RuntimeError("out of\nsomething")
        return whole(self, name, key)

    monkeypatch.setattr(Maker, "make", fails)
    what = asked(folders, tmp_path, "sets-0.5", "balanced")
    first, kept = measured(what)
    assert (made, kept) == (["exact", "sets-0.5", "balanced"], [])
    assert first["sets-0.5"].error == "RuntimeError: out of something"
    assert first["sets-0.5"].scores == {}
    broken.clear()
    made.clear()
    second, kept = measured(what)
    assert (made, kept) == (["sets-0.5"], ["exact", "balanced"])
    assert second["balanced"] == first["balanced"]
    assert second["sets-0.5"].error is None
    assert second["sets-0.5"].distance > 0
    assert list(second["balanced"].scores) == list(second["sets-0.5"].scores)

    made.clear()
    (tmp_path / "sets-0.5.safetensors").write_bytes(b"broken")
    (tmp_path / presets.LATENTS).unlink()  # what the broken one is to be compared with
    again, kept = measured(what)
    assert (made, kept) == (["exact", "sets-0.5"], ["balanced"])
    assert again["sets-0.5"].scores == second["sets-0.5"].scores
    assert again["sets-0.5"].distance == second["sets-0.5"].distance
    made.clear()

    _, kept = measured(asked(folders, tmp_path, "balanced", seed=1))
    assert (made, kept) == (["exact", "balanced"], [])


def test_what_cannot_be_done_here_is_said(folders: tuple[Path, Path], tmp_path: Path) -> None:
    rows, _ = measured(asked(folders, tmp_path, "fp8"))
    reason = "fp8 is for a GPU: got a model on cpu" if find_fast("fp8") else "fp8 needs nova_video.fast"
    assert str(rows["fp8"].error).startswith(f"InputError: {reason}")


def test_without_the_exact_one_there_is_nothing(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Maker, name: str, key: str) -> Any:
        raise InputError("no")

    monkeypatch.setattr(Maker, "make", fails)
    with pytest.raises(InputError, match="no"):
        measured(asked(folders, tmp_path))


def test_the_key_names_model_and_world(folders: tuple[Path, Path], tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}, "one")
    assert load_tensors(tmp_path / "a.safetensors", "another") is None
    assert load_tensors(tmp_path / "a.safetensors", "one") is not None
    assert digest(folders[1], ("",)) != digest(folders[0], ("",))
    assert digest(folders[0], ("vae",)) != digest(folders[0], ("vae", "nova.json"))


# The command, rows and tables -----------------------------------------------------------------------------------------


def test_command(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--keep", str(tmp_path / "kept"), "--output", str(tmp_path / "new" / "rows.json")]
    numbers = ["--num-clips", "2", "--num-pictures", "0", "--num-frames", "1", "--sets", "2", "--diffusion-steps", "2"]
    given = ["--model", str(folders[0]), "--data", str(folders[1]), "--variants", "fast", "dpm-0.5", *numbers]
    assert cli.main(["bench", "presets", *given, *where]) == 0
    printed = capsys.readouterr().out
    rows = read_preset_rows(tmp_path / "new" / "rows.json")
    assert [row.preset for row in rows] == ["exact", "fast", "dpm-0.5"]
    assert [line.split(":")[0] for line in printed.splitlines()[:3]] == [row.preset for row in rows]
    assert "2 clips of 1 frames in batches of 2, and 0 pictures" in printed
    assert set(rows[0].scores) == {"background", "object", "object_top5", "all"}
    again = parse(rows[0].command.split()[1:])
    assert isinstance(again, BenchPresets)
    assert (again.variants, again.num_clips, again.batch_size) == (("fast", "dpm-0.5"), 2, None)
    values = json.loads((tmp_path / "new" / "rows.json").read_text())[1]
    needed = {"config", "preset", "batch", "seconds", "vae_seconds", "total_seconds", "device", "versions", "command"}
    assert needed <= {name for name, value in values.items() if value is not None}
    assert cli.main(["bench", "presets", "--variants", "hasty"]) == 2
    assert "variants: got hasty" in capsys.readouterr().err


def test_pairs_are_compared_in_pairs() -> None:
    before = torch.tensor([1, 1, 1, 0, 0, 0], dtype=torch.bool)
    now = torch.tensor([1, 1, 0, 1, 1, 0], dtype=torch.bool)
    change = PairedRates.of(now, before)
    assert (change.gained, change.lost, change.total) == (2, 1, 6)
    assert change.value == pytest.approx(1 / 6)
    low, high = PairedRates(gained=60, lost=90, total=4000).interval()
    mean, deviation = -30 / 4000, math.sqrt((150 - 900 / 4000) / 4000)  # of the differences
    assert (low + high) / 2 == pytest.approx(mean, rel=1e-3)
    assert (high - low) / 2 == pytest.approx(1.96 * deviation / math.sqrt(4000), rel=5e-3)
    low, high = PairedRates(0, 0, 4000).interval()
    assert -0.001 < low < 0 < high < 0.001
    assert math.isnan(PairedRates(0, 0, 0).value)


def test_interval_holds_as_often_as_it_says() -> None:
    """Of 2,000 draws with 1% lost and 0.5% gained, near 95% hold the true difference."""
    share = torch.rand(2000, 4000, generator=torch.Generator().manual_seed(0))
    lost, gained = (share < 0.01).sum(1).tolist(), (share > 0.995).sum(1).tolist()
    intervals = [PairedRates(g, b, 4000).interval() for g, b in zip(gained, lost, strict=True)]
    assert 0.93 < sum(low <= -0.005 <= high for low, high in intervals) / 2000 < 0.97


def row(preset: str, points: float = 0.0, **values: Any) -> PresetRow:
    scores = {"object": Score(85.0, (83.9, 86.1), 4000, points, (points - 0.5, points + 0.5))}
    given = {
        "batch": 400,
        "compile": True,
        "dtype": "float16",
        "device": "NVIDIA H200",
        "versions": {"torch": "2.11.0"},
    }
    asked = {"command": "nova bench presets", "num_clips": 4000, "num_pictures": 2000, "num_frames": 17, "seed": 0}
    times = {"seconds": 1.0, "seconds_per_clip": 0.0025, "speedup": 2.0, "distance": 0.125}
    return PresetRow("emoji", preset, **(given | asked | times | {"scores": scores} | values))


def test_tables(tmp_path: Path) -> None:
    rows = [row("exact", speedup=1.0, distance=0.0), row("fast", -0.42), row("sets-0.5", error="why", scores={})]
    write_preset_rows(tmp_path / "new" / "rows.json", rows)
    assert read_preset_rows(tmp_path / "new" / "rows.json") == rows
    made = presets_table(rows)
    assert "| exact | 2.5 | 1 | 0 | 85.0% |" in made
    assert "| fast | 2.5 | 2 | 0.125 | \N{MINUS SIGN}0.4 ± 0.5 |" in made
    assert "sets-0.5: failed: why" in made
    assert "4000 clips of 17 frames in batches of 400" in made
    header, *lines = as_aligned(rows)
    assert len({len(line) for line in (header, *lines[:2])}) == 1
    assert lines[2] == "sets-0.5: failed: why"
    assert presets_table([]) == EMPTY
    assert read_preset_rows(tmp_path / "none.json") == []
    (tmp_path / "rows.json").write_text('[{"speed": 1}]')
    with pytest.raises(InputError, match=r"rows\.json: expected a list of measured presets"):
        read_preset_rows(tmp_path / "rows.json")


def test_rows_of_another_run_join_if_it_was_made_alike() -> None:
    before = [row("exact", sets=16), row("fast", -0.4), row("dpm-0.5", -0.1)]
    again = [row("exact", sets=16, command="nova bench presets --variants fast"), row("fast", -0.6)]
    joined = merge_rows(before, again)
    assert joined == [again[0], again[1], before[2]]
    assert presets_table(joined).endswith("\n\n`nova bench presets --variants fast`, `nova bench presets`")
    for otherwise in ([row("exact", sets=8), *again[1:]], [row("exact", sets=16, seed=1), *again[1:]]):
        assert merge_rows(before, otherwise) == otherwise
    assert merge_rows([], again) == again


def test_recorded_rows_can_be_made_again() -> None:
    """The recorded command is one that `nova` understands, and makes every variant."""
    for found in read_preset_rows(Path(__file__).parents[1] / "benchmarks" / "results" / "presets.json"):
        args = parse(found.command.split()[1:])
        assert isinstance(args, BenchPresets)
        assert found.preset in ("exact", *(args.variants or VARIANTS))
        assert args.num_clips == found.num_clips >= 4000
