"""Training: recipes, the pool, the noise tables, the loop; a stopped run goes on as if it had never stopped."""

import json
import math
import os
import re
import signal
import stat
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from nova_video import NovaPipeline
from nova_video.autoencoders import AutoencoderKLCausalTiny
from nova_video.cli.arguments import one_line_errors
from nova_video.cli.main import main
from nova_video.common.errors import InputError
from nova_video.common.extensions import load_extension
from nova_video.text.vocabulary import Vocabulary
from nova_video.training import trainer as trainer_module
from nova_video.training.card import Record
from nova_video.training.checkpoint import (
    Average,
    TrainingProgress,
    gather_state,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from nova_video.training.log import DueEvals, Log
from nova_video.training.loss import Losses, NoiseTable, draw
from nova_video.training.processes import model_shards
from nova_video.training.recipe import (
    DatasetTransformerRecipe,
    LogRecipe,
    ModelRecipe,
    OptimizerRecipe,
    load_recipe,
    parse_recipe,
    recipe_toml,
)
from nova_video.training.stepper import learning_rate, make_optimizer, set_rate
from nova_video.training.task import fill_seed
from nova_video.training.trainer import StopSignal, run_evals, train
from nova_video.training.transformer_task import Variant
from nova_worlds import EmojiWorld
from nova_worlds.rendering.shapes import prepare_shapes
from nova_worlds.training.pools import Pool, Rows
from nova_worlds.training.recipes import AutoencoderRecipe, DataRecipe, WorldTransformerRecipe
from nova_worlds.training.world_task import WorldTask, stretch

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "shapes"
    prepare_shapes(folder)
    return folder


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autoencoder")
    torch.manual_seed(0)
    vae = AutoencoderKLCausalTiny(block_out_channels=(16, 16, 16), latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
    vae.save_pretrained(folder / "vae")
    return folder


LOG = LogRecipe(every=2, validate_every=0, checkpoint_every=2)


@pytest.fixture
def transformer_recipe(
    tmp_path: Path, shapes: Path, autoencoder: Path, tiny_text_encoder: Path
) -> WorldTransformerRecipe:
    return WorldTransformerRecipe(
        steps=6,
        output=str(tmp_path / "run"),
        device="cpu",
        autoencoder=str(autoencoder),
        text_encoder=str(tiny_text_encoder),
        model=ModelRecipe(arch=("vit_d2w64", "vit_d2w64", "mlp_d1w64"), text_token_len=16),
        data=DataRecipe(
            world=str(shapes),
            frames=(1, 5),
            probability=(0.5, 0.5),
            batch=(4, 2),
            pool=(8, 4),
            refresh_every=2,
            refresh=0.5,
        ),
        optimizer=OptimizerRecipe(warmup=2, ema=0.9),
        log=LOG,
    )


# Recipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load_and_are_written_back_whole(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    copy = tmp_path / "recipe.toml"
    copy.write_text(recipe_toml(recipe))
    assert load_recipe(copy) == recipe


def test_there_are_the_recipes_the_documentation_names() -> None:
    assert {"autoencoder", "emoji-image", "emoji-video", "emoji-beyond", "tiny"} <= {path.stem for path in RECIPES}


def test_overrides_reach_nested_keys() -> None:
    recipe = load_recipe(RECIPES[0], ["--optimizer.lr", "0.25", "--steps", "7"])
    assert recipe.optimizer.lr == 0.25
    assert recipe.steps == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('kind = "transformer"\nstepz = 3', "unknown key 'stepz' (is it steps?); expected one of kind, "),
        ('kind = "transformer"\n[optimizer]\nlearning = 3', "unknown key 'learning'"),
        ('kind = "transformer"\n[datset]\npath = "x"', "unknown key 'datset' (is it dataset?)"),
        ('kind = "transformer"\n[optimizer]\nbetas = [0.9]', "betas is [0.9], expected a list of 2"),
        ('kind = "transformer"\nvisible = 3', "visible is 3, expected a list"),
        ('kind = "transformer"\nsteps = "many"', "steps is 'many', expected int"),
        ('kind = "gan"', "kind is 'gan', expected one of transformer, world-transformer, autoencoder, or module:Class"),
        ('kind = "transformer"\nscheduler = "euler"', "expected one of 'flow', 'ddpm'"),
        ('kind = "transformer"\n[data]\nframes = [4]', "expected lengths 4k + 1"),
        ('kind = "transformer"\n[data]\nframes = [1, 5]', "one entry for each length"),
        ('kind = "transformer"\nvisible = [1, 2]', "expected as many entries"),
        ('kind = "transformer"\n[data]\nwindow = 5', "data.window = 5: expected a length 4k + 1 of at least 9"),
        ("kind =", "is not TOML"),
        ("kind = " + "[" * 100_000, "is nested too deeply"),
        ("steps = 1" + "0" * 5000, "is not TOML"),
        ('kind = "transformer"\nsteps = 1' + "0" * 400, "steps is 1000"),
        ('kind = "transformer"\nseconds = 1' + "0" * 400, "seconds is 1000"),
        ('kind = "transformer"\nseconds = inf', "seconds is inf: expected a number of at least 0"),
        ('kind = "transformer"\n[defaults]\nfps = inf', "fps is inf"),
        ('kind = "transformer"\noutput = "a\\u0000b"', "expected text without a NUL character"),
        (f'kind = "transformer"\nsteps = "{"x" * 500}"', "xxx..., expected int"),
        ("kind = [1]", "kind is [1], expected one of transformer"),
        ('kind = "transformer"\nseed = -1', "seed is -1: expected a whole number"),
        ('kind = "transformer"\noutput = ""', "output is empty"),
        *(
            (f'kind = "transformer"\n{line}', message)
            for line, message in (
                ("steps = 0", "steps is 0: expected a whole number of at least 1"),
                ("seconds = -1.0", "seconds is -1.0: expected a number of at least 0"),
                ("micro_batches = -1", "micro_batches is -1"),
                ('output = "s3://bucket/run"', "output is s3://bucket/run: expected a local folder"),
                ("loss_repeat = 0", "loss_repeat is 0"),
                ("prompt_dropout = 1.5", "prompt_dropout is 1.5"),
                ("motion_dropout = -0.5", "motion_dropout is -0.5"),
                ("history_noise = -0.1", "history_noise is -0.1"),
                ("visible = [-1]\nvisible_probability = [1.0]", "visible is -1"),
                ("visible = [1]\nvisible_probability = [-1.0]", "visible_probability is -1.0"),
                (
                    "visible = [1]\nvisible_probability = [0.0]",
                    "visible_probability is (0.0,): expected a number above",
                ),
                ("[optimizer]\nlr = -1e-3", "optimizer.lr is -0.001"),
                ("[optimizer]\nlr = nan", "optimizer.lr is nan"),
                ("[optimizer]\nbetas = [0.9, 1.0]", "optimizer.betas is 1.0: expected a number of at least 0 and less"),
                ("[optimizer]\nweight_decay = -1", "optimizer.weight_decay is -1"),
                ("[optimizer]\nwarmup = -1", "optimizer.warmup is -1"),
                ("[optimizer]\nfinal = 2.0", "optimizer.final is 2.0: expected a number of at least 0 and at most 1"),
                ("[optimizer]\nclip = -1.0", "optimizer.clip is -1.0"),
                ("[optimizer]\nema = 1.0", "optimizer.ema is 1.0"),
                ("[optimizer]\nema_every = 0", "optimizer.ema_every is 0"),
                ("[log]\nevery = -1", "log.every is -1"),
                ("[log]\nkeep = 0", "log.keep is 0"),
                ("[lora]\nrank = -1", "lora.rank is -1"),
                ("[model]\ntext_token_len = 0", "model.text_token_len is 0"),
                ("[data]\nbatch = [0]", "data.batch for 17 frames is 0"),
                ("[data]\nprobability = [0.0]", "data.probability is (0.0,): expected a number above 0 among them"),
                ("[data]\nrefresh = 2.0", "data.refresh is 2.0"),
                (
                    "[dataset]\nheld_out = 1.0",
                    "dataset.held_out is 1.0: expected a number of at least 0 and less than 1",
                ),
                ("[dataset]\n[log]\nscore_every = 5", "log.score_every is 5: expected 0, there is no judge"),
            )
        ),
        ('kind = "autoencoder"\nlatent_channels = 0', "latent_channels is 0"),
        ('kind = "autoencoder"\n[log]\nscore_every = 5', "log.score_every is 5: expected 0"),
    ],
)
def test_wrong_recipes_are_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        load_recipe(path)


def test_any_text_in_a_recipe_is_written_back(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\xef\xbb\xbf" + 'kind = "transformer"\nname = "Wal \\"\\\\ \\n \\u007f \\u0001 鯨"'.encode())
    recipe = load_recipe(path)
    assert recipe.name == 'Wal "\\ \n \x7f \x01 鯨'
    assert parse_recipe(recipe_toml(recipe), "again") == recipe


def test_recipes_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "latin.toml"
    path.write_bytes('name = "f\xeate"'.encode("latin-1"))
    with pytest.raises(InputError, match="latin.toml is not a text file in UTF-8, line 1"):
        load_recipe(path)


def test_wrong_overrides_are_refused_by_name() -> None:
    """As in a recipe, whatever tyro puts before it."""
    for override, message in ((["--steps", "0"], "steps is 0:"), (["--optimizer.ema", "1"], "optimizer.ema is 1.0:")):
        with pytest.raises(InputError, match=f"^{message}"), one_line_errors(override):
            load_recipe(RECIPES[0], override)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.toml: No such file"):
        load_recipe(tmp_path / "none.toml")


# Pool --------------------------------------------------------------------------------------------------------------


def make_rows(count: int, fill: int) -> Rows:
    return {"fill": torch.full((count,), fill), "x": torch.arange(count) + 100 * fill}


def test_pool_depends_on_the_step_alone() -> None:
    steady, resumed = Pool(make_rows, 8, 0.25), Pool(make_rows, 8, 0.25)
    for step in range(0, 21, 5):
        steady.fill_for(step, 5)
    resumed.fill_for(20, 5)
    assert torch.equal(steady.rows["x"], resumed.rows["x"])
    assert steady.rows["fill"].unique().tolist() == [4, 5, 6, 7]
    drawn = steady.draw(50)
    assert torch.equal(drawn["x"] // 100, drawn["fill"])


def test_fill_seeds_differ_and_are_stable() -> None:
    assert fill_seed(0, 17, 3) == fill_seed(0, 17, 3)
    assert len({fill_seed(seed, frames, fill) for seed in (0, 1) for frames in (1, 17) for fill in range(9)}) == 36


# Loss --------------------------------------------------------------------------------------------------------------


def test_noise_tables_are_the_schedulers() -> None:
    data, noise = torch.randn(5, 3), torch.randn(5, 3)
    index = torch.tensor([0, 10, 500, 900, 999])
    ddpm = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    noisy, target = NoiseTable.from_scheduler(ddpm, "cpu").noisy_and_target(data, noise, index)
    assert torch.allclose(noisy, ddpm.add_noise(data, noise, index), atol=1e-6)
    assert torch.equal(target, noise)
    for kind, wanted in (("sample", data), ("v_prediction", ddpm.get_velocity(data, noise, index))):
        other = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=kind)
        target = NoiseTable.from_scheduler(other, "cpu").noisy_and_target(data, noise, index)[1]
        assert torch.allclose(target, wanted, atol=1e-6)
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    table = NoiseTable.from_scheduler(flow, "cpu")
    noisy, target = table.noisy_and_target(data, noise, index)
    assert torch.allclose(noisy, flow.scale_noise(data, flow.timesteps[index], noise), atol=1e-6)
    assert torch.equal(target, noise - data)
    sigma = 3 * 0.5 / (1 + 2 * 0.5)  # equation of MODEL: shift * s / (1 + (shift - 1) * s) at s = 1/2
    assert table.timestep[500].item() == pytest.approx(1000 * sigma)


def test_draws_score_exactly_the_hidden_tokens() -> None:
    table = NoiseTable.from_scheduler(FlowMatchEulerDiscreteScheduler(), "cpu")
    draws = draw(table, 3, 16, 8, 5, 2, torch.Generator().manual_seed(0))
    every = torch.cat([draws.visible_ids, draws.hidden_ids], 1).sort(1).values
    assert torch.equal(every, torch.arange(16).expand(3, -1))
    assert draws.index.shape == (6, 11)
    assert draws.noise.shape == (6, 11, 8)
    assert draws.index.min() >= 0
    assert draws.index.max() < 1000


# The loop ----------------------------------------------------------------------------------------------------------


def test_a_stretch_is_the_first_frame_and_what_lies_together() -> None:
    """As a bounded context shows a clip that has gone on: every stretch comes up, the clip's beginning too."""
    latents = torch.arange(17.0).view(1, 1, 17, 1, 1).expand(400, 2, -1, 3, 3)
    shown = stretch(latents, 9)
    assert shown.shape == (400, 2, 9, 3, 3)
    assert (shown == shown[:, :1, :, :1, :1]).all()
    numbers = shown[:, 0, :, 0, 0]
    assert (numbers[:, 0] == 0).all()
    assert (numbers[:, 1:].diff() == 1).all()
    assert set(numbers[:, 1].tolist()) == set(range(1, 10))
    whole = stretch(latents[:, :, :9], 9)
    assert torch.equal(whole, latents[:, :, :9])


@pytest.mark.slow
def test_long_clips_are_learned_in_stretches(transformer_recipe: WorldTransformerRecipe) -> None:
    """Of the frames shown only the second half counts: the first ones' error moves nothing."""
    data = replace(transformer_recipe.data, frames=(17,), probability=(1.0,), batch=(2,), pool=(4,), window=9)
    task = WorldTask(replace(transformer_recipe, data=data), torch.device("cpu"))
    task.prepare(0)
    scored = torch.ones(3, requires_grad=True)
    task.batch_losses = lambda *_: Losses(scored.sum(), scored, torch.zeros(10), torch.zeros(10))  # type: ignore[method-assign]
    batch = task.draw(Variant(17, 2), 0)
    assert batch.latents.shape[2] == 3
    losses = task.loss(Variant(17, 2), batch)
    losses["loss"].backward()
    assert set(losses) == {"loss"}
    assert losses["loss"].item() == pytest.approx(3.0)
    assert scored.grad.tolist() == [0.0, 1.5, 1.5]


def test_learning_rate_warms_up_and_falls() -> None:
    recipe = OptimizerRecipe(lr=1.0, warmup=10, final=0.1)
    assert learning_rate(recipe, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(recipe, 9, 0.0) == pytest.approx(1.0)
    assert learning_rate(recipe, 50, 0.5) == pytest.approx(0.55)
    assert learning_rate(recipe, 100, 1.0) == pytest.approx(0.1)


def test_processes_of_a_machine_share_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them where a machine has one alone, or no launcher has said what it has."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert model_shards(16) == 16
    for here, together in (("8", 8), ("16", 16), ("1", 16), ("5", 16)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
        assert model_shards(16) == together


def test_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    matrices, others = make_optimizer(model, OptimizerRecipe(weight_decay=0.5), torch.device("cpu")).param_groups
    assert [p.dim() for p in matrices["params"]] == [2]
    assert [p.dim() for p in others["params"]] == [1, 1, 1]
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.5, 0.0)


def final_state(output: str) -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(Path(output) / "checkpoints")
    assert newest is not None
    return load_file(newest)


def test_resuming_equals_never_stopping(transformer_recipe: WorldTransformerRecipe, tmp_path: Path) -> None:
    train(transformer_recipe)
    whole = final_state(transformer_recipe.output)
    stopped = replace(transformer_recipe, output=str(tmp_path / "stopped"))
    train(stopped)
    for path in sorted((tmp_path / "stopped" / "checkpoints").glob("*"))[1:]:
        path.unlink()  # as if it had been killed after the first kept checkpoint
    assert newest_checkpoint(tmp_path / "stopped" / "checkpoints").name == "step-00000004.safetensors"
    train(stopped)
    again = final_state(stopped.output)
    assert whole.keys() == again.keys()
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name
    assert lines_of(transformer_recipe) == lines_of(stopped)


def test_the_padding_table_stays_as_it_was_drawn(
    transformer_recipe: WorldTransformerRecipe, caplog: pytest.LogCaptureFixture
) -> None:
    """Checkpoints keep it, since a run that goes on draws another. A run that trained it can go on, too."""
    recipe = replace(transformer_recipe, optimizer=replace(transformer_recipe.optimizer, lr=0.1, weight_decay=1.0))
    train(replace(recipe, steps=2))
    checkpoint = newest_checkpoint(Path(recipe.output) / "checkpoints")
    table = final_state(recipe.output)["model.text_embed.weight"]
    with safe_open(checkpoint, "pt") as file:
        metadata = file.metadata()
    trained = {name: table.clone() for name in ("ema.text_embed.weight", "optimizer.text_embed.weight.exp_avg")}
    save_file(load_file(checkpoint) | trained, checkpoint, metadata)
    train(replace(recipe, steps=4, seed=5))
    assert torch.equal(final_state(recipe.output)["model.text_embed.weight"], table)
    (warning,) = (record.message for record in caplog.records if "text_embed" in record.message)
    assert "text_embed.weight was trained so far, and stays as it is from here on" in warning


def test_the_released_loss_is_what_is_minimised(transformer_recipe: WorldTransformerRecipe) -> None:
    recipe = replace(transformer_recipe, video_loss="released", steps=4, log=replace(LOG, every=1))
    train(recipe)
    clips = [line for line in lines_of(recipe) if "loss_t2i" in line]
    pictures = [line for line in lines_of(recipe) if "loss" in line and "loss_t2i" not in line]
    assert clips
    assert pictures
    for line in clips:
        assert line["loss"] == pytest.approx(line["loss_t2i"] + line["loss_i2i"])


TIMES = ("seconds", "steps_per_second", "samples_per_second")


def lines_of(recipe: WorldTransformerRecipe) -> list[dict[str, float]]:
    """What was logged, but for times."""
    text = (Path(recipe.output) / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in text.splitlines()]


def test_means_are_of_the_same_steps_wherever_a_run_goes_on_from(transformer_recipe: WorldTransformerRecipe) -> None:
    recipe = replace(transformer_recipe, log=replace(LOG, every=4, keep=3))
    train(recipe)
    assert [line["step"] for line in lines_of(recipe)] == [4, 6]
    before = lines_of(recipe)
    for path in sorted((Path(recipe.output) / "checkpoints").glob("*"))[1:]:
        path.unlink()
    train(recipe)
    assert lines_of(recipe) == before


@pytest.mark.slow
def test_a_look_that_fails_costs_no_step(
    transformer_recipe: WorldTransformerRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is there before it, and the run that goes on makes up for it."""
    recipe = replace(transformer_recipe, log=replace(LOG, validate_every=2, sample_every=2))
    train(recipe)
    failing = replace(recipe, output=str(tmp_path / "failing"))
    with monkeypatch.context() as patched:
        patched.setattr(WorldTask, "sheet", lambda *_: 1 / 0)
        for step in (2, 2, 2):  # it makes no step before it has looked
            with pytest.raises(ZeroDivisionError):
                train(failing)
            assert newest_checkpoint(tmp_path / "failing" / "checkpoints").name == f"step-{step:08d}.safetensors"
    train(failing)
    assert lines_of(failing) == lines_of(recipe)
    sheets = [sorted((Path(each.output) / "sheets").iterdir()) for each in (recipe, failing)]
    assert [path.name for path in sheets[0]] == [path.name for path in sheets[1]]
    looked: list[int] = []
    monkeypatch.setattr(WorldTask, "sheet", lambda *_: looked.append(1))
    train(failing)  # all has been looked at
    assert not looked


def test_a_run_that_is_asked_to_stop_looks_later(
    transformer_recipe: WorldTransformerRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    recipe = replace(transformer_recipe, log=replace(LOG, validate_every=2, sample_every=3, checkpoint_every=0))
    train(recipe)
    stopped = replace(recipe, output=str(tmp_path / "stopped"))
    draw = WorldTask.draw
    drawn: list[int] = []

    def stop(*given: Any) -> Any:
        drawn.append(1)
        if len(drawn) == 3:
            signal.raise_signal(signal.SIGTERM)
        return draw(*given)

    with monkeypatch.context() as patched:
        patched.setattr(WorldTask, "draw", stop)
        with pytest.raises(KeyboardInterrupt, match="^stopped at step 3 after .* s, all saved: the same"):
            train(stopped)
    said = capfd.readouterr()
    assert "asked to stop: the run ends after this step" in said.err
    assert "stopped at step 3" in said.out
    assert newest_checkpoint(tmp_path / "stopped" / "checkpoints").name == "step-00000003.safetensors"
    assert not list((tmp_path / "stopped" / "sheets").iterdir())
    train(stopped)
    for each in (recipe, stopped):
        sheets = sorted((Path(each.output) / "sheets").iterdir())
        assert [path.name for path in sheets] == ["step-00000003.png", "step-00000006.png"]
    assert lines_of(stopped) == lines_of(recipe)
    assert [line["step"] for line in lines_of(recipe) if "held_out_loss" in line] == [2, 4, 6]


@pytest.mark.slow
def test_rates_are_those_of_steps(transformer_recipe: WorldTransformerRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WorldTask, "sheet", lambda *_: time.sleep(3) or Image.new("RGB", (8, 8)))
    recipe = replace(transformer_recipe, log=replace(LOG, every=2, sample_every=2))
    train(recipe)
    lines = [json.loads(line) for line in (Path(recipe.output) / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["seconds"] - lines[0]["seconds"] > 3
    assert 2 / lines[1]["steps_per_second"] < 2.5


def test_a_finished_run_without_checkpoints_is_left_alone(transformer_recipe: WorldTransformerRecipe) -> None:
    recipe = replace(transformer_recipe, steps=1, log=replace(LOG, checkpoint_every=0))
    before = (train(recipe) / "recipe.toml").stat().st_mtime_ns
    with pytest.raises(InputError, match=f"^{recipe.output} has a finished model and no checkpoint to go on from"):
        train(recipe)
    assert (Path(recipe.output) / "model" / "recipe.toml").stat().st_mtime_ns == before


def test_others_can_read_what_is_written(transformer_recipe: WorldTransformerRecipe) -> None:
    before = os.umask(0o027)
    try:
        train(replace(transformer_recipe, steps=1))
    finally:
        os.umask(before)
    weights = list(Path(transformer_recipe.output).rglob("*.safetensors"))
    assert len(weights) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in weights} == {0o640}


def test_damaged_lines_are_left_out(
    transformer_recipe: WorldTransformerRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as zeros, which a machine that lost its power may leave."""
    log = Log(transformer_recipe, writes=True)
    log.output.mkdir()
    path = log.output / "metrics.jsonl"
    whole = [json.dumps({"step": step, "seconds": 1.0, "loss": 1.0 / step, "lr": 1.0}) + "\n" for step in (1, 2, 3)]
    path.write_bytes(b"".join([whole[0].encode(), b"\0\0\xff\n", b"[1]\n", whole[1].encode(), whole[2].encode()[:-1]]))
    log.start(2)
    log.finish()
    assert path.read_text() == whole[0] + whole[1]
    assert f"{path}: line 2 is damaged and left out" in capsys.readouterr().out
    assert log.newest == {"loss": 0.5, "lr": 1.0}


def test_a_world_s_schedule_is_that_of_init(transformer_recipe: WorldTransformerRecipe) -> None:
    first = train(replace(transformer_recipe, steps=1))
    task = WorldTask(replace(transformer_recipe, init=str(first), scheduler="init"), torch.device("cpu"))
    assert isinstance(task.scheduler, FlowMatchEulerDiscreteScheduler)
    with pytest.raises(InputError, match="scheduler is 'init' and there is no init"):
        WorldTask(replace(transformer_recipe, scheduler="init"), torch.device("cpu"))


def test_the_loop_writes_what_it_says(transformer_recipe: WorldTransformerRecipe) -> None:
    recipe = replace(transformer_recipe, log=replace(LOG, validate_every=6))
    folder = train(recipe)
    parts = {
        "transformer",
        "vae",
        "scheduler",
        "nova.json",
        "vocabulary.json",
        "recipe.toml",
        "README.md",
        "model_index.json",
    }
    assert {path.name for path in folder.iterdir()} == parts
    assert Vocabulary.load(folder) == EmojiWorld.load(recipe.data.world).vocabulary(
        recipe.data.frames, recipe.data.pairs > 0
    )
    size = ModelRecipe(("vit_d2w64", "vit_d2w64", "mlp_d1w64"), -1, True, 16, 5, (128, 128))
    assert load_recipe(folder / "recipe.toml") == replace(recipe, model=size)  # nothing is left open
    for part in ("transformer", "vae"):
        weights = load_file(folder / part / "diffusion_pytorch_model.safetensors")
        assert {value.dtype for value in weights.values()} == {torch.float16}
    lines = [json.loads(line) for line in (Path(recipe.output) / "metrics.jsonl").read_text().splitlines()]
    held_out = lines[-1]
    assert held_out["step"] == 6
    assert math.isfinite(held_out["held_out_loss"])
    assert "held_out_loss_wrong_object" in held_out
    assert any("loss" in line and "steps_per_second" in line for line in lines)
    assert list((Path(recipe.output) / "tensorboard").glob("events*"))


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("helps", [True, False])
def test_steps_make_room_for_a_look_at_the_model(
    recorded: bool, helps: bool, transformer_recipe: WorldTransformerRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, and what was done before is not done again; where there is none to make, memory is short as ever."""
    done: list[str] = []
    graphs: Any = SimpleNamespace(release=lambda: done.append("release")) if recorded else None

    def validate(model: object) -> dict[str, float]:
        done.append("validate")
        return {"held_out_loss": 1.0}

    def sheet(model: object, folder: Path) -> Image.Image:
        done.append("sheet")
        if not (helps and "release" in done):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(trainer_module, "write_card", lambda *_: None)
    task: Any = SimpleNamespace(
        export=lambda model, folder: folder.mkdir(), validate=validate, sheet=sheet, recipe=transformer_recipe
    )
    log = Log(transformer_recipe, writes=True)
    log.start(0)
    record = Record(TrainingProgress(1, 1.0), [], {})
    look_once = partial(run_evals, task, nn.Identity(), DueEvals(True, True, False), log, record, graphs)
    if recorded and helps:
        assert look_once()
        assert not look_once()
        assert done == ["validate", "sheet", "release", "sheet", "validate", "sheet"]
        assert len((log.output / "metrics.jsonl").read_text().splitlines()) == 2
    else:
        with pytest.raises(torch.OutOfMemoryError):
            look_once()
        assert done == ["validate", "sheet"] + ["release", "sheet"] * recorded


def test_stage_two_starts_from_stage_one(transformer_recipe: WorldTransformerRecipe, tmp_path: Path) -> None:
    first = train(transformer_recipe)
    second = replace(transformer_recipe, init=str(first), output=str(tmp_path / "two"), steps=1)
    trained = load_file(
        train(replace(second, optimizer=OptimizerRecipe(lr=0.0, ema=0.0)))
        / "transformer/diffusion_pytorch_model.safetensors"
    )
    started = load_file(first / "transformer/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(trained[name], started[name]) for name in started)
    other = replace(
        second, model=replace(second.model, arch=("vit_d1w64", "vit_d2w64", "mlp_d1w64")), output=str(tmp_path / "x")
    )
    with pytest.raises(InputError, match=r"model.arch is .*, but init = .* has \('vit_d2w64'"):
        train(other)


@pytest.mark.slow
def test_autoencoder_learns(shapes: Path, tmp_path: Path) -> None:
    recipe = AutoencoderRecipe(
        steps=30,
        output=str(tmp_path / "ae"),
        device="cpu",
        data=DataRecipe(world=str(shapes), frames=(1,), probability=(1.0,), batch=(4,), pool=(16,), refresh_every=0),
        optimizer=OptimizerRecipe(lr=2e-3, warmup=5, ema=0.5),
        log=LogRecipe(every=10, validate_every=30, sample_every=30, checkpoint_every=0),
    )
    folder = train(recipe)
    lines = [json.loads(line) for line in (tmp_path / "ae" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.75 * losses[0]
    vae = AutoencoderKLCausalTiny.from_pretrained(folder / "vae")
    assert len(vae.config.latents_mean) == 16
    assert (tmp_path / "ae" / "sheets" / "step-00000030.png").is_file()


def test_an_unwritable_output_is_named(transformer_recipe: WorldTransformerRecipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        train(replace(transformer_recipe, output=str(tmp_path / "file" / "run")))


def test_the_first_interrupt_only_asks() -> None:
    with StopSignal() as stop:
        assert not stop.asked
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_decay_of_averages_warms_up() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average, expected = Average(model, 0.5), 0.0
    for number in range(12):
        nn.init.constant_(model.weight, 1.0 + number)
        average.update()
        decay = min(0.5, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * (1.0 + number)
        torch.testing.assert_close(average.averages["weight"].item(), expected)
    assert average.weight == 0.5


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Module]:
    """A checkpoint of one step, and the model that it is of."""
    model = nn.Linear(3, 2)
    optimizer, average = make_optimizer(model, OptimizerRecipe(), torch.device("cpu")), Average(model, 0.9)
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    average.update()
    return save_checkpoint(tmp_path, TrainingProgress(1, 1.5), gather_state(model, average, optimizer), keep=2), model


def load(path: Path, model: nn.Module) -> TrainingProgress:
    return load_checkpoint(
        path, model, Average(model, 0.9), make_optimizer(model, OptimizerRecipe(), torch.device("cpu"))
    )


MOMENT, STEP = "optimizer.weight.exp_avg", "optimizer.weight.step"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({MOMENT: torch.zeros(1)}, "its optimizer.weight.exp_avg is (1,): expected (2, 3)"),
        ({MOMENT: torch.zeros(3, 2)}, "its optimizer.weight.exp_avg is (3, 2): expected (2, 3)"),
        ({MOMENT: torch.zeros(2, 3).half()}, "its optimizer.weight.exp_avg is torch.float16: expected torch.float32"),
        ({MOMENT: None}, "optimizer.weight has exp_avg_sq, step alone: expected step, exp_avg, exp_avg_sq"),
        ({STEP: None}, "optimizer.weight has exp_avg, exp_avg_sq alone: expected"),
        ({f"{MOMENT}_sq": -torch.ones(2, 3)}, "has values below 0: expected means of squares"),
        ({STEP: torch.zeros(2, 3)}, "its optimizer.weight.step is torch.float32 (2, 3): expected a float32 number"),
        ({STEP: torch.tensor(1)}, "its optimizer.weight.step is torch.int64 (): expected a float32 number"),
        ({STEP: torch.tensor(float("nan"))}, "its optimizer.weight.step is nan: expected a whole number of steps"),
        ({STEP: torch.tensor(-1.0)}, "its optimizer.weight.step is -1: expected a whole number of steps"),
        ({"optimizer.other.step": torch.tensor(1.0)}, "it also has optimizer.other.step"),
        ({"optimizer.weight.max_exp_avg_sq": torch.zeros(2, 3)}, "it also has optimizer.weight.max_exp_avg_sq"),
        ({"ema.weight": torch.zeros(2, 3, dtype=torch.float64)}, "its ema.weight is torch.float64"),
    ],
)
def test_crafted_optimizers_are_refused(
    changes: dict[str, torch.Tensor | None], message: str, saved: tuple[Path, nn.Module]
) -> None:
    path, model = saved
    tensors = {name: value for name, value in (load_file(path) | changes).items() if value is not None}
    save_file(tensors, path, {"progress": '{"step": 1}'})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=re.escape(message)):
        load(path, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "progress",
    [
        "",
        "[" * 100_000,
        "[1]",
        '{"step": -1}',
        '{"step": 1e400}',
        '{"step": "1"}',
        '{"step": null}',
        '{"step": true}',
        f'{{"step": 1{"0" * 400}}}',
        '{"step": 1, "seconds": NaN}',
        '{"step": 1, "micro_batches": 0}',
        '{"step": 1, "data": []}',
        '{"step": 1, "sums": {"loss": 1}}',
        '{"step": 1, "sums": {"loss": [1, "2"]}}',
        '{"step": 1, "updates": -1}',
        '{"step": 1, "further": 2}',
    ],
    ids=lambda progress: progress[:30],
)
def test_crafted_progress_is_refused(progress: str, saved: tuple[Path, nn.Module]) -> None:
    path, model = saved
    save_file(load_file(path), path, {"progress": progress})
    with pytest.raises(InputError, match="cannot be read: ") as error:
        load(path, model)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700


def test_checkpoints_of_older_versions_go_on(saved: tuple[Path, nn.Module]) -> None:
    """They have no number of averages: the decay is that of a run of so many steps. What is not finite is said."""
    path, model = saved
    save_file(load_file(path), path, {"progress": '{"step": 90, "sums": {"loss": [2, 1]}}'})
    average = Average(model, 0.99)
    progress = load_checkpoint(path, model, average, make_optimizer(model, OptimizerRecipe(), torch.device("cpu")))
    assert progress == TrainingProgress(90, sums={"loss": (2.0, 1.0)})
    assert average.weight == pytest.approx(1 - 91 / 100)


def test_values_that_are_not_finite_are_said(saved: tuple[Path, nn.Module], caplog: pytest.LogCaptureFixture) -> None:
    path, model = saved
    save_file(load_file(path) | {"model.bias": torch.tensor([1.0, math.inf])}, path, {"progress": '{"step": 1}'})
    load(path, model)
    assert "model.bias has values that are not finite" in caplog.text


def test_what_killed_saves_left_is_swept(transformer_recipe: WorldTransformerRecipe) -> None:
    """By the next run in the folder, and nothing else."""
    recipe, output = replace(transformer_recipe, steps=1), Path(transformer_recipe.output)
    left = [
        "checkpoints/.tmpAb1",
        "checkpoints/step-00000001.part",
        ".tmpAb1",
        ".recipe.toml.0a.part",
        "sheets/.x.part",
    ]
    for name in [*left, "notes.part", ".model.part/transformer/.tmpAb2"]:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("half")
    train(recipe)
    assert [name for name in [*left, ".model.part"] if (output / name).exists()] == []
    assert (output / "notes.part").exists()


def test_checkpoints_are_whole_and_few(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer, average = make_optimizer(model, OptimizerRecipe(), torch.device("cpu")), Average(model, 0.9)
    for step in (1, 2, 3):
        model(torch.randn(4, 2)).square().mean().backward()
        set_rate(optimizer, 0.1)
        optimizer.step()
        average.update()
        path = save_checkpoint(tmp_path, TrainingProgress(step, 1.5), gather_state(model, average, optimizer), keep=2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000002.safetensors", "step-00000003.safetensors"]
    other = nn.Linear(2, 2)
    fresh, averages = make_optimizer(other, OptimizerRecipe(), torch.device("cpu")), Average(other, 0.9)
    assert load_checkpoint(path, other, averages, fresh) == TrainingProgress(3, 1.5)
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(averages.averages["weight"], average.averages["weight"])
    assert not torch.equal(averages.averages["weight"], other.weight)
    assert torch.equal(fresh.state[other.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    with pytest.raises(InputError, match="of another model"):
        load_checkpoint(path, nn.Linear(3, 2), Average(nn.Linear(3, 2), 0.9), fresh)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"cannot be read: .*; without it the run goes on from .*step-00000002"):
        load_checkpoint(path, other, averages, fresh)


# Own losses and tasks -------------------------------------------------------------------------------------------------

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_an_own_loss_is_named_in_the_recipe(
    transformer_recipe: WorldTransformerRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example's weights are 0.5 and 1.5 for clips of two latent frames, and the saved recipe runs again."""
    monkeypatch.chdir(EXAMPLES)
    data = replace(transformer_recipe.data, frames=(5,), probability=(1.0,), batch=(2,), pool=(4,))
    plain = replace(transformer_recipe, steps=1, data=data, log=replace(LOG, every=1, checkpoint_every=0))
    own = replace(plain, loss="own_loss:later_frames", output=str(tmp_path / "own"))
    train(plain)
    train(own)
    again = load_recipe(tmp_path / "own" / "recipe.toml", ["--output", str(tmp_path / "again")])
    train(again)
    (before,), (after,) = ([line for line in lines_of(recipe) if "loss" in line] for recipe in (plain, own))
    assert after["loss_frame_0"] == pytest.approx(0.5 * before["loss_frame_0"])
    assert after["loss_frame_1"] == pytest.approx(1.5 * before["loss_frame_1"])
    assert after["loss"] == pytest.approx((after["loss_frame_0"] + after["loss_frame_1"]) / 2)
    assert [line["loss"] for line in lines_of(again) if "loss" in line] == [after["loss"]]


def test_an_own_head_and_order_are_named_in_the_recipe(
    transformer_recipe: WorldTransformerRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are trained with, and what is exported opens by the head's class; another run starts from it."""
    monkeypatch.chdir(EXAMPLES)
    model = replace(transformer_recipe.model, head="own_head:PlainMlp")
    log = replace(LOG, every=1, checkpoint_every=0)
    recipe = replace(transformer_recipe, steps=2, order="own_order:Raster", model=model, log=log)
    folder = train(recipe)
    with pytest.raises(InputError, match=r"its head is own_head:PlainMlp, a class of the user's own"):
        NovaPipeline.from_pretrained(folder)
    head = load_extension("own_head:PlainMlp", "head")
    opened = NovaPipeline.from_pretrained(folder, head=head).transformer.image_decoder
    assert type(opened) is head
    assert all(bool(weight.any()) for weight in opened.parameters())
    train(replace(recipe, init=str(folder), output=str(tmp_path / "second")))
    with pytest.raises(InputError, match=r"its head is own_head:PlainMlp.* head under \[model\] in a recipe"):
        train(replace(recipe, model=transformer_recipe.model, init=str(folder), output=str(tmp_path / "third")))


def test_a_loss_that_returns_something_else_is_refused(
    transformer_recipe: WorldTransformerRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_losses.py").write_text("def none(*args):\n    return None\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="loss = 'own_losses:none' returns NoneType: expected Losses"):
        train(replace(transformer_recipe, loss="own_losses:none"))


def test_an_own_task_is_named_in_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example finds its slope; the saved recipe runs again, with a flag of its own on top."""
    monkeypatch.chdir(EXAMPLES)
    lines = ["steps = 60", f'output = "{tmp_path / "run"}"', 'device = "cpu"', "slope = 2.0"]
    (tmp_path / "line.toml").write_text("\n".join(['kind = "own_task:LineTask"', *lines, "[optimizer]", "lr = 0.2"]))
    assert main(["train", str(tmp_path / "line.toml"), "--optimizer.warmup", "0", "--optimizer.ema", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "run" / "model")
    assert load_file(tmp_path / "run" / "model" / "line.safetensors")["weight"].item() == pytest.approx(2, abs=0.1)
    assert "A line of 1e-06 M parameters" in (tmp_path / "run" / "model" / "README.md").read_text()
    again = ["--output", str(tmp_path / "again"), "--slope", "-1"]
    assert main(["train", str(tmp_path / "run" / "recipe.toml"), *again]) == 0
    assert load_file(tmp_path / "again" / "model" / "line.safetensors")["weight"].item() == pytest.approx(-1, abs=0.1)


def test_recipes_of_version_0_1_0_keep_their_meaning() -> None:
    """There, `transformer` with a table [data] was trained in a world."""
    recipe = parse_recipe('kind = "transformer"\n[data]\nworld = "w"', "a recipe")
    assert isinstance(recipe, WorldTransformerRecipe)
    assert (recipe.kind, recipe.data.world) == ("world-transformer", "w")
    assert isinstance(parse_recipe('kind = "transformer"\n[dataset]\npath = "d"', "a"), DatasetTransformerRecipe)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("own_task:LineRecipe", "expected a Task whose recipe_type"),
        ("own_task:Nothing", "has no Nothing"),
    ],
)
def test_kinds_that_are_none_are_refused(kind: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    with pytest.raises(InputError, match=message):
        parse_recipe(f'kind = "{kind}"', "a recipe")
