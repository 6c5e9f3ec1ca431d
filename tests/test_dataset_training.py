"""Training on an encoded dataset: from a checkpoint, on clips and pictures, stopped and gone on with."""

import contextlib
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from conftest import another_process_writes
from nova_video.common.errors import InputError
from nova_video.common.extras import install_command
from nova_video.data.dataset import Bucket, DatasetInfo, EncodedSample, write_shard
from nova_video.data.encode import model_text
from nova_video.data.encoders import autoencoder_info
from nova_video.pipeline.loading import load_transformer
from nova_video.pipeline.pipeline import NovaPipeline
from nova_video.text.find import find_text
from nova_video.training import dataset_checks, stream
from nova_video.training import log as log_module
from nova_video.training.checkpoint import Average, newest_checkpoint
from nova_video.training.dataset_task import DatasetTask
from nova_video.training.log import Log
from nova_video.training.processes import Processes
from nova_video.training.recipe import (
    DatasetRecipe,
    DatasetTransformerRecipe,
    LogRecipe,
    LoraRecipe,
    ModelRecipe,
    OptimizerRecipe,
    load_recipe,
    parse_recipe,
)
from nova_video.training.stepper import BAD_STEPS, Stepper, make_optimizer
from nova_video.training.stream import collate, is_held_out
from nova_video.training.task import fill_seed
from nova_video.training.trainer import train
from nova_video.training.transformer_task import Variant, use_fp8
from nova_worlds.training.recipes import AutoencoderRecipe, WorldTransformerRecipe

CPU = torch.device("cpu")
CLIPS, SMALL, PICTURES = Bucket(9, 64, 96), Bucket(5, 64, 64), Bucket(1, 64, 96)
WORDS = ("whale", "apple")


def write_dataset(folder: Path, checkpoint: Path, counts: dict[Bucket, int], text: bool = True) -> Path:
    vae = autoencoder_info(str(checkpoint))
    info = DatasetInfo(str(checkpoint), vae.fingerprint, vae.latent_channels, vae.spatial_stride, vae.temporal_stride)
    info = replace(info, text_encoder=str(checkpoint), text_dim=32 if text else None)
    info.save(folder)
    torch.manual_seed(0)
    for bucket, count in counts.items():
        rows = []
        for number in range(count):
            features = torch.randn(5, 32).half() if text else None
            moments = torch.randn(info.moments_shape(bucket)).bfloat16()
            caption = f"a {WORDS[number % 2]} moving left. It is number {number}."
            motion = 0.0 if bucket.frames == 1 else 2.5
            place = (f"{bucket.name}-{number}", f"clips/{bucket.name}-{number}.mp4", 0.0, bucket.frames / 8)
            rows.append(
                EncodedSample(*place, caption, 8.0, motion, bucket, moments, features, features[:3] if text else None)
            )
        for shard in range(2):
            write_shard(folder / "data" / bucket.name / f"{shard}.parquet", rows[shard::2], vae.fingerprint)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    return write_dataset(folder, tiny_checkpoint, {CLIPS: 12, SMALL: 8, PICTURES: 10})


@pytest.fixture
def recipe(tmp_path: Path, dataset: Path, tiny_checkpoint: Path) -> DatasetTransformerRecipe:
    return DatasetTransformerRecipe(
        steps=6,
        device="cpu",
        output=str(tmp_path / "run"),
        init=str(tiny_checkpoint),
        scheduler="init",
        dataset=DatasetRecipe(str(dataset), batch=2, image_share=0.3, held_out=0.2, workers=0),
        optimizer=OptimizerRecipe(warmup=2, ema=0.9),
        log=LogRecipe(every=1, validate_every=0, checkpoint_every=2),
    )


def logged(recipe: DatasetTransformerRecipe, name: str) -> list[float]:
    lines = (Path(recipe.output) / "metrics.jsonl").read_text().splitlines()
    return [line[name] for line in map(json.loads, lines) if name in line]


# What is drawn --------------------------------------------------------------------------------------------------------


def test_buckets_get_batches_of_as_many_tokens(recipe: DatasetTransformerRecipe) -> None:
    task = DatasetTask(recipe, CPU)
    variants, shares = task.variants()
    sizes = {variant.size.bucket: task.samples(variant) for variant in variants}
    assert sizes == {CLIPS: 2, SMALL: 4, PICTURES: 6}  # 3 x 24, 2 x 16 and 24 tokens a sample
    assert sum(shares) == pytest.approx(1)
    pictures = [share for variant, share in zip(variants, shares, strict=True) if variant.size.bucket == PICTURES]
    assert sum(pictures) == pytest.approx(0.3)
    task.open_data([0], 1, {})
    batch = task.draw(next(v for v in variants if v.size.bucket == SMALL), 0)
    assert batch.latents.shape == (4, 4, 2, 8, 8)
    assert batch.text.shape == (4, 8, 32)
    assert set(batch.lengths.tolist()) <= {3, 5}
    assert batch.motion.tolist() == [2.5] * 4


def test_first_frames_stand_in_for_pictures(
    recipe: DatasetTransformerRecipe, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = write_dataset(tmp_path / "clips", tiny_checkpoint, {CLIPS: 8})
    task = DatasetTask(replace(recipe, dataset=replace(recipe.dataset, path=str(folder), image_share=0.5)), CPU)
    variants, shares = task.variants()
    task.open_data([0], 1, {})
    picture = next(v for v in variants if v.size.picture)
    batch = task.draw(picture, 0)
    assert batch.latents.shape == (6, 4, 1, 8, 12)
    assert batch.motion.tolist() == [0.0] * 6
    assert sum(s for v, s in zip(variants, shares, strict=True) if v.size.picture) == pytest.approx(0.5)


def test_text_is_encoded_here_where_it_is_not_stored(
    recipe: DatasetTransformerRecipe, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = write_dataset(tmp_path / "bare", tiny_checkpoint, {CLIPS: 8}, text=False)
    task = DatasetTask(replace(recipe, dataset=replace(recipe.dataset, path=str(folder), short_captions=1.0)), CPU)
    task.open_data([0], 1, {})
    batch = task.draw(task.variants()[0][0], 0)
    assert batch.lengths.tolist() == [7, 7]  # [CLS] a whale moving left . [SEP]


def test_another_text_encoder_is_refused(
    recipe: DatasetTransformerRecipe,
    tiny_text_encoder: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Features of the same width fit, and mean something else. The same weights at another place are the same."""
    DatasetTask(recipe, CPU)
    DatasetTask(replace(recipe, text_encoder=str(tiny_text_encoder)), CPU)
    assert "text encoder" not in caplog.text
    other = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    weights = load_file(other / "text_encoder" / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, other / "text_encoder" / "model.safetensors")
    place = recipe.dataset.path
    said = f"text_encoder = {str(other)!r}, and {place} holds features of {str(tiny_checkpoint)!r}: expected the same"
    with pytest.raises(InputError, match=re.escape(said)):
        DatasetTask(replace(recipe, text_encoder=str(other)), CPU)
    said = f"init = {str(other)!r} has learned from the text encoder {str(other)!r}, and {place} holds features of"
    with pytest.raises(InputError, match=re.escape(said)):
        DatasetTask(replace(recipe, init=str(other)), CPU)
    DatasetTask(replace(recipe, init=str(other), fresh=("text_embed",)), CPU)
    bare = write_dataset(tmp_path / "bare", tiny_checkpoint, {CLIPS: 4}, text=False)
    DatasetTask(replace(recipe, text_encoder=str(other), dataset=replace(recipe.dataset, path=str(bare))), CPU)
    assert not caplog.records


def test_what_the_dataset_names_is_looked_for_before_the_first_step(
    recipe: DatasetTransformerRecipe,
    dataset: Path,
    tiny_checkpoint: Path,
    tiny_text_encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also what is needed at the first sheet or for the exported model alone. Flags name another place."""
    place = Path(shutil.copytree(dataset, tmp_path / "moved"))
    recipe = replace(recipe, dataset=replace(recipe.dataset, path=str(place)))
    sheets = replace(recipe, log=replace(recipe.log, sample_every=6))
    info = DatasetInfo.load(place)
    replace(info, autoencoder="tiny", text_encoder="/gone/encoder").save(place)

    def said(recipe: DatasetTransformerRecipe) -> str:
        with pytest.raises(InputError) as error:
            train(recipe)
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
        return str(error.value).removeprefix(f"{place}/")

    message = said(recipe)
    assert message.startswith("dataset.json names the autoencoder: model 'tiny' not found: expected 'emoji', an")
    assert message.endswith("; --autoencoder names another")
    assert said(replace(recipe, autoencoder="lost")).startswith("model 'lost' not found: expected")
    gone = "there is no text encoder folder /gone/encoder"
    expected = f"dataset.json names the text encoder: {gone}; --text-encoder names another"
    recipe, sheets = (replace(each, autoencoder=str(tiny_checkpoint)) for each in (recipe, sheets))
    assert said(recipe) == said(sheets) == expected
    assert said(replace(recipe, text_encoder="/lost")) == "there is no text encoder folder /lost"
    DatasetTask(replace(sheets, text_encoder=str(tiny_text_encoder)), CPU)

    monkeypatch.setattr(dataset_checks, "check_text_encoder", lambda name: 16)
    replace(info, text_encoder="some/encoder").save(place)
    DatasetTask(recipe, CPU)  # which names it in its model and opens it never
    assert f"'some/encoder' makes features 16 wide: expected 32, as {place} holds; --text" in said(sheets)


def test_adapters_need_the_text_encoder_of_their_checkpoint_for_samples_alone(
    recipe: DatasetTransformerRecipe, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bare = Path(shutil.copytree(tiny_checkpoint, tmp_path / "bare"))
    shutil.rmtree(bare / "text_encoder")
    recipe = replace(recipe, init=str(bare), lora=LoraRecipe(rank=2))
    DatasetTask(recipe, CPU)
    expected = f"init = {str(bare)!r}, which samples are made with: {bare}: has no text_encoder/ and names no text"
    with pytest.raises(InputError, match=re.escape(expected)):
        train(replace(recipe, log=replace(recipe.log, sample_every=6)))


def test_every_sample_may_draw_its_own_mask_ratio(recipe: DatasetTransformerRecipe) -> None:
    recipe = replace(recipe, mask_ratio="sample", steps=2)
    assert {variant.visible for variant in DatasetTask(recipe, CPU).variants()[0]} == {None}
    train(recipe)
    assert all(map(math.isfinite, logged(recipe, "loss")))


def test_pictures_get_the_share_they_have_of_the_rows(recipe: DatasetTransformerRecipe) -> None:
    task = DatasetTask(replace(recipe, dataset=replace(recipe.dataset, image_share=None)), CPU)
    variants, shares = task.variants()
    pictures = [share for variant, share in zip(variants, shares, strict=True) if variant.size.bucket == PICTURES]
    assert sum(pictures) == pytest.approx(10 / 30)


def test_held_out_clips_are_read_from_where_they_are(recipe: DatasetTransformerRecipe) -> None:
    task = DatasetTask(recipe, CPU)
    found = [sample.source for sample in task.held_out]
    names = {f"clips/{CLIPS.name}-{number}.mp4" for number in range(12)}
    assert set(found) == {name for name in names if is_held_out(name, 0.2)}
    assert 0 < len(found) < 12
    task.open_data([0], 1, {})
    clips = next(variant for variant in task.variants()[0] if variant.size.bucket == CLIPS)
    shown = torch.cat([task.draw(clips, 0).latents for _ in range(12)])
    held = task._batch(collate(task.held_out), torch.zeros(len(found), dtype=torch.bool))
    near = [(shown - latents).abs().mean((1, 2, 3, 4)).min() for latents in held.latents]
    assert min(near) > 0.1  # none of them is trained on


# Runs -----------------------------------------------------------------------------------------------------------------


def test_a_run_makes_a_checkpoint_that_opens(recipe: DatasetTransformerRecipe, tiny_checkpoint: Path) -> None:
    log = LogRecipe(every=2, validate_every=6, sample_every=6, checkpoint_every=0)
    folder = train(replace(recipe, name="mine", log=log))
    pipe = NovaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.defaults.num_frames, pipe.defaults.fps, pipe.defaults.motion_flow) == (9, 8.0, 2.5)
    clip = pipe("a whale", num_inference_steps=2, num_diffusion_steps=2, output_type="np").frames
    assert clip.shape == (1, 9, 64, 96, 3)
    before, after = (load_transformer(place).state_dict() for place in (tiny_checkpoint, folder))
    assert before.keys() == after.keys()
    assert not torch.equal(before["text_embed.proj.weight"].half(), after["text_embed.proj.weight"].half())
    assert logged(recipe, "held_out_loss")
    assert logged(recipe, "held_out_loss_wrong_caption") != logged(recipe, "held_out_loss")
    line = json.loads((Path(recipe.output) / "metrics.jsonl").read_text().splitlines()[0])
    assert {"grad_norm", "lr", "samples_per_second", "loss_time_0", "loss_time_9"} <= line.keys()
    card = (folder / "README.md").read_text()
    assert "# mine" in card
    assert "pipeline_tag: text-to-video" in card
    assert "| steps | 6 |" in card
    assert (folder / "samples.png").is_file()
    kept = load_recipe(folder / "recipe.toml")
    assert kept.model == ModelRecipe(("vit_d2w64", "vit_d4w64", "mlp_d2w64"), 4, False, 8, 4, (64, 96))


def test_exports_open_by_diffusers_and_tell_what_they_are(
    recipe: DatasetTransformerRecipe, tiny_checkpoint: Path, tiny_text_encoder: Path, tmp_path: Path
) -> None:
    """A whole model, with a text encoder that is linked to or named; and adapters."""
    start = Path(shutil.copytree(tiny_checkpoint, tmp_path / "whales"))
    (start / "README.md").write_text("---\nlicense: mit\ndatasets:\n- someone/clips\ntags:\n- sea\n---\n")
    recipe = replace(recipe, steps=1, init=str(start))
    config = start / "text_encoder" / "config.json"  # as published: a class that transformers lacks
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["OwnEncoderModel"]}))
    linked = train(replace(recipe, output=str(tmp_path / "linked")))
    named = train(replace(recipe, output=str(tmp_path / "named"), text_encoder=str(tiny_text_encoder)))
    for folder in (linked, named):
        index = json.loads((folder / "model_index.json").read_text())
        assert index["_class_name"] == "NovaPipeline"
        for door in (DiffusionPipeline, NovaPipeline):
            pipe = door.from_pretrained(str(folder))
            pipe.set_progress_bar_config(disable=True)
            assert type(pipe) is NovaPipeline
            assert pipe.defaults.num_frames == 9
            pipe("a whale", num_frames=1, num_inference_steps=1, num_diffusion_steps=1, output_type="latent")
    adapters = train(replace(recipe, output=str(tmp_path / "adapters"), lora=LoraRecipe(2)))
    assert not (adapters / "model_index.json").exists()
    for folder, tags in ((linked, {"sea", "nova-video"}), (adapters, {"sea", "lora"})):
        card = ModelCard.load(folder / "README.md")
        data = card.data.to_dict()
        assert (data["base_model"], data["license"], data["datasets"]) == ("whales", "mit", ["someone/clips"])
        assert tags <= {*data["tags"]}
        opened = start if folder == adapters else "FOLDER"
        assert f'pipe = NovaPipeline.from_pretrained("{opened}")' in card.content
    assert 'pipe.load_lora_weights("FOLDER")' in card.content
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.safetensors") if start not in path.parents}
    mask = os.umask(0)
    os.umask(mask)
    assert modes == {0o666 & ~mask}
    with pytest.raises(InputError, match="is an adapter, without .*expected the model it was trained for"):
        NovaPipeline.from_pretrained(adapters)


@pytest.mark.slow
def test_the_card_tells_of_its_own_run(recipe: DatasetTransformerRecipe, dataset: Path) -> None:
    """Also when the command is given once more, and beside sheets of a run that had come further."""
    recipe = replace(recipe, log=LogRecipe(every=2, validate_every=6, sample_every=6, checkpoint_every=6))
    folder = train(recipe)
    card = (folder / "README.md").read_text()
    names = [line.split(" | ")[0] for line in card.split("## Numbers")[1].splitlines() if line.count("|") == 3]
    assert names[2:] == ["| loss", "| loss t2i", "| loss i2i", "| held out loss", "| held out loss wrong caption"]
    said = f"8 of {SMALL.name}, 12 of {CLIPS.name}, 10 of {PICTURES.name}: frames x height x width"
    places = ((SMALL, 8), (CLIPS, 12), (PICTURES, 10))
    out = sum(is_held_out(f"clips/{at.name}-{i}.mp4", 0.2) for at, count in places for i in range(count))
    assert out
    assert f"Learned from 30 samples of `{dataset}` ({said}), but for {out}, which were held out." in card
    alone = DatasetTask(replace(recipe, dataset=replace(recipe.dataset, image_share=0.0)), CPU).learned_from()
    assert PICTURES.name not in alone

    sheets, sample = Path(recipe.output) / "sheets", folder / "samples.png"
    (sheets / "step-00000009.png").write_bytes(b"of another run")
    train(recipe)
    assert (folder / "README.md").read_text() == card
    assert sample.read_bytes() == (sheets / "step-00000006.png").read_bytes()
    (sheets / "step-00000006.png").unlink()
    train(replace(recipe, log=replace(recipe.log, sample_every=0)))
    assert (folder / "README.md").read_text() == card.replace("![Samples](samples.png)\n\n", "") != card
    assert not sample.exists()


def test_a_model_can_be_taken_elsewhere(
    recipe: DatasetTransformerRecipe,
    tiny_checkpoint: Path,
    tiny_text_encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With its text encoder where it was, whether it is linked to or named; without that if the links were followed."""
    start = Path(shutil.copytree(tiny_checkpoint, tmp_path / "start"))
    encoder = Path(shutil.copytree(tiny_text_encoder, tmp_path / "encoder"))
    monkeypatch.chdir(tmp_path)
    linked = train(replace(recipe, steps=1, text_encoder="start", output="linked"))
    named = train(replace(recipe, steps=1, text_encoder="encoder", output="named"))
    (tmp_path / "there").mkdir()
    linked, named = (model.rename(tmp_path / "there" / model.parent.name) for model in (linked, named))
    whole = Path(shutil.copytree(linked, tmp_path / "there" / "whole"))  # as cp -rL
    monkeypatch.chdir(tmp_path / "there")

    def speak(model: Path) -> None:
        pipe = NovaPipeline.from_pretrained(model)
        pipe.set_progress_bar_config(disable=True)
        pipe("a whale", num_frames=1, num_inference_steps=1, num_diffusion_steps=1, output_type="latent")

    speak(linked)
    speak(named)
    shutil.rmtree(start)
    shutil.rmtree(encoder)
    speak(whole)
    gone = f"{linked}/text_encoder is a link to {start}/text_encoder, which is not there: expected that folder"
    for use in (speak, lambda model: find_text(str(model)), lambda model: model_text(str(model))):
        with pytest.raises(InputError, match=re.escape(gone)):
            use(linked)
    gone = f"there is no text encoder folder {encoder}; the checkpoint's nova.json names it: expected another"
    with pytest.raises(InputError, match=re.escape(gone)):
        speak(named)


def test_loss_by_time_and_by_frame_add_up_to_the_loss(recipe: DatasetTransformerRecipe) -> None:
    train(replace(recipe, dataset=replace(recipe.dataset, image_share=0.0)))
    for line in map(json.loads, (Path(recipe.output) / "metrics.jsonl").read_text().splitlines()):
        frames = [value for name, value in line.items() if name.startswith("loss_frame_")]
        assert sum(frames) / len(frames) == pytest.approx(line["loss"], rel=1e-4)


def test_resuming_equals_never_stopping(recipe: DatasetTransformerRecipe, tmp_path: Path) -> None:
    train(recipe)
    stopped = replace(recipe, output=str(tmp_path / "stopped"))
    train(stopped)
    checkpoints = tmp_path / "stopped" / "checkpoints"
    newest_checkpoint(checkpoints).unlink()  # as if it had been killed after step 4
    train(stopped)
    whole, again = (load_file(newest_checkpoint(Path(r.output) / "checkpoints")) for r in (recipe, stopped))
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert logged(recipe, "loss") == logged(stopped, "loss")


def test_one_process_makes_micro_batches_in_turn(recipe: DatasetTransformerRecipe, tmp_path: Path) -> None:
    """A step of two micro batches is the mean of both: its first loss is that of a batch of either."""
    two = replace(recipe, micro_batches=2, output=str(tmp_path / "two"), steps=1)
    train(two)
    losses = []
    for micro in range(2):
        task = DatasetTask(replace(recipe, model=ModelRecipe()), CPU)
        task.open_data([0, 1], 2, {})
        variants, shares = task.variants()
        variant = Random(f"{recipe.seed}-0").choices(variants, shares)[0]
        torch.manual_seed(fill_seed(recipe.seed, 0, micro))
        losses.append(task.loss(variant, task.draw(variant, micro))["loss"].item())
    assert logged(two, "loss")[0] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert losses[0] != losses[1]


def test_frozen_parts_stay_and_fresh_ones_start_anew(recipe: DatasetTransformerRecipe, tiny_checkpoint: Path) -> None:
    frozen = replace(recipe, frozen=("text_embed", "video_encoder"), fresh=("image_decoder",), steps=4)
    frozen = replace(frozen, model=ModelRecipe(arch=("vit_d2w64", "vit_d4w64", "mlp_d1w96")))
    frozen = replace(frozen, optimizer=OptimizerRecipe(lr=1e-2, warmup=0, ema=0.0))
    after = load_transformer(train(frozen)).state_dict()
    before = load_transformer(tiny_checkpoint).state_dict()
    same = {name for name in before if name in after and torch.equal(before[name].half(), after[name].half())}
    assert {name for name in before if name.startswith(("text_embed", "video_encoder"))} <= same
    assert not any(name.startswith("image_encoder.blocks.0.attn") for name in same)
    assert after["image_decoder.blocks.0.proj.fc1.weight"].shape[0] == 96


def test_a_model_of_another_autoencoder(
    recipe: DatasetTransformerRecipe, tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """May learn the dataset's latents, which is said; adapters may not, which are used with its own."""
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.5 * value for name, value in load_file(weights).items()}, weights)
    said = (
        f"init = '{other}' has an autoencoder with weights {autoencoder_info(str(other)).fingerprint}, and .* was enc"
    )
    with pytest.raises(InputError, match=f"{said}.*: expected the same, since adapters are sampled with the former"):
        train(replace(recipe, init=str(other), lora=LoraRecipe(rank=2)))
    folder = train(replace(recipe, init=str(other), steps=1))
    [warning] = [record.getMessage() for record in caplog.records if "an autoencoder" in record.getMessage()]
    assert re.match(f"{said}.*: the model has to learn other latents than it knows", warning)
    assert autoencoder_info(str(folder)).fingerprint == autoencoder_info(str(tiny_checkpoint)).fingerprint


def test_a_wandb_run_is_that_of_its_folder(tmp_path: Path) -> None:
    """However often it is resumed; another folder of the same name, or a new one in its place, has another."""
    folders = [tmp_path / name / "runs" / "finetune" for name in ("a", "b")]
    for folder in folders:
        folder.mkdir(parents=True)
    first, second = map(log_module.run_id, folders)
    assert first != second
    assert log_module.run_id(folders[0]) == first
    shutil.rmtree(folders[0])
    folders[0].mkdir()
    assert log_module.run_id(folders[0]) != first


def test_adapters_are_trained_saved_and_loaded(
    recipe: DatasetTransformerRecipe, tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = replace(recipe, lora=LoraRecipe(rank=2, alpha=4.0), optimizer=OptimizerRecipe(lr=1e-2, warmup=0, ema=0.0))
    folder = train(replace(recipe, log=replace(recipe.log, sample_every=6)))
    assert {path.name for path in folder.iterdir()} >= {"pytorch_lora_weights.safetensors", "README.md", "recipe.toml"}
    assert not (folder / "transformer").exists()
    kept = load_file(newest_checkpoint(Path(recipe.output) / "checkpoints"))
    assert {name for name in kept if "lora" not in name} == set()
    adapters = sum(value.numel() for value in load_file(folder / "pytorch_lora_weights.safetensors").values()) / 1e6
    own = sum(value.numel() for value in load_transformer(tiny_checkpoint).parameters()) / 1e6
    said = f"\nLoRA adapters of {adapters:.4g} M parameters for the NOVA transformer of `{recipe.init}`, whose"
    assert f"{said} {own:.4g} M stayed as they were.\n" in (folder / "README.md").read_text()

    def picture(lora: Path | None) -> torch.Tensor:
        pipe = NovaPipeline.from_pretrained(tiny_checkpoint)
        pipe.set_progress_bar_config(disable=True)
        if lora is not None:
            pipe.load_lora_weights(lora)
        how = {"num_inference_steps": 2, "num_diffusion_steps": 2, "num_frames": 1, "output_type": "latent"}
        return torch.as_tensor(pipe("a whale", generator=torch.Generator().manual_seed(0), **how).images)

    assert not torch.allclose(picture(folder), picture(None), atol=1e-3)
    assert "was trained beside" not in caplog.text
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    NovaPipeline.from_pretrained(other).load_lora_weights(folder)
    said = f"adapter {folder} was trained beside {tiny_checkpoint}, and is used with {other}"
    assert caplog.records[-1].getMessage() == said
    with pytest.raises(InputError, match="lora.rank is 2 and there is no init"):
        train(replace(recipe, init="", scheduler="flow"))
    with pytest.raises(InputError, match=r"lora.alpha is 8.0, and .* was begun with 4.0: expected the same"):
        train(replace(recipe, lora=LoraRecipe(rank=2, alpha=8.0), steps=7))
    for rank in (0, 4):
        with pytest.raises(InputError, match=f"lora.rank is {rank}, and .* was begun with 2: expected the same"):
            train(replace(recipe, lora=LoraRecipe(rank=rank, alpha=4.0 if rank else 0.0), steps=7))
    with pytest.raises(
        InputError, match=r"lora.targets is \('attn.qkv',\), and .* was begun with \(\): expected the same"
    ):
        train(replace(recipe, lora=LoraRecipe(rank=2, alpha=4.0, targets=("attn.qkv",)), steps=7))
    with pytest.raises(InputError, match="lora.rank is 2: expected no frozen"):
        replace(recipe, frozen=("text_embed",))
    with pytest.raises(InputError, match="lora.targets are given and lora.rank is 0"):
        replace(recipe, lora=LoraRecipe(targets=("attn.qkv",)))


def test_what_has_changed_since_a_run_was_begun_is_said(
    recipe: DatasetTransformerRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    train(replace(recipe, steps=2))
    capsys.readouterr()
    train(replace(recipe, steps=3, optimizer=replace(recipe.optimizer, lr=3e-5), frozen=()))
    said = capsys.readouterr().out
    assert "steps is 3 from here on; it was 2" in said
    assert f"optimizer.lr is 3e-05 from here on; it was {recipe.optimizer.lr!r}" in said
    assert said.count("from here on") == 2


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])
@pytest.mark.parametrize("steps", [8, 100])
def test_short_runs_export_what_they_learned(
    steps: int, rank: int, recipe: DatasetTransformerRecipe, tiny_checkpoint: Path
) -> None:
    """At least 85% of the distance, with the warm-up and the decay of recipes/finetune.toml."""
    optimizer = OptimizerRecipe(lr=1e-3, warmup=100, ema=0.99)
    log = LogRecipe(every=100, validate_every=0, checkpoint_every=steps)
    folder = train(replace(recipe, steps=steps, optimizer=optimizer, log=log, lora=LoraRecipe(rank=rank)))
    tensors = load_file(newest_checkpoint(Path(recipe.output) / "checkpoints"))
    raw = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    if rank:  # B, which starts at zero
        exported = load_file(folder / "pytorch_lora_weights.safetensors")
        exported = {name: value for name, value in exported.items() if "lora_B" in name}
        raw = {name: value for name, value in raw.items() if "lora_B" in name}
        start = {name: torch.zeros_like(value) for name, value in raw.items()}
        exported = dict(zip(sorted(raw), (exported[name] for name in sorted(exported)), strict=True))
    else:
        exported, start = (load_transformer(place).state_dict() for place in (folder, tiny_checkpoint))
    lengths = [
        sum((values[name].float() - start[name]).square().sum() for name in raw).sqrt() for values in (exported, raw)
    ]
    assert 0.85 < lengths[0] / lengths[1] < 1.0


def test_raw_weights_can_be_exported(recipe: DatasetTransformerRecipe) -> None:
    """Also of a run that is finished: its checkpoint has them."""
    recipe = replace(recipe, log=replace(recipe.log, checkpoint_every=6))
    folder = train(recipe)
    tensors = load_file(newest_checkpoint(Path(recipe.output) / "checkpoints"))
    for weights, said in (("ema", "averaged weights (EMA 0.9)"), ("raw", "raw weights")):
        train(replace(recipe, export=weights))
        exported = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
        kept = "model" if weights == "raw" else "ema"
        trained = {name: value for name, value in exported.items() if name != "text_embed.weight"}  # a buffer
        assert all(torch.equal(value, tensors[f"{kept}.{name}"].half()) for name, value in trained.items())
        assert f"| exported | {said} |" in (folder / "README.md").read_text()
        assert load_recipe(folder / "recipe.toml").export == weights
    with pytest.raises(InputError, match="export is 'both', expected one of 'ema', 'raw'"):
        parse_recipe('kind = "transformer"\nexport = "both"', "it")


def test_a_run_of_sparse_averages_exports_its_newest_weights(recipe: DatasetTransformerRecipe) -> None:
    """The first update would come after its end."""
    recipe = replace(recipe, optimizer=replace(recipe.optimizer, ema_every=100), log=LogRecipe(checkpoint_every=6))
    folder = train(recipe)
    tensors = load_file(newest_checkpoint(Path(recipe.output) / "checkpoints"))
    exported = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    name = "text_embed.proj.weight"
    torch.testing.assert_close(exported[name], tensors[f"ema.{name}"].lerp(tensors[f"model.{name}"], 0.9).half())


def test_what_a_run_is_too_short_for_is_said(
    recipe: DatasetTransformerRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    train(replace(recipe, steps=1, optimizer=OptimizerRecipe(lr=1e-3, warmup=100, ema=0.99)))
    said = capsys.readouterr().out
    assert "warning: optimizer.warmup is 100, more than the 1 steps of the run: the learning rate never reaches" in said
    assert "warning: optimizer.ema averages over about 100 steps, more than the 1 of the run" in said


# Provenance -----------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_rewritten(
    recipe: DatasetTransformerRecipe, tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a recipe or data that none of its steps learned from."""
    recipe = replace(recipe, log=replace(recipe.log, checkpoint_every=6))
    folder = train(recipe)
    output, place = Path(recipe.output), write_dataset(tmp_path / "other", tiny_checkpoint, {CLIPS: 20})
    other = replace(recipe, dataset=replace(recipe.dataset, path=str(place)))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in output.rglob("*") if path.is_file()}
    for changed, what in (
        (other, "dataset.path, what the dataset holds"),
        (replace(recipe, optimizer=replace(recipe.optimizer, lr=1.0)), "optimizer.lr"),
        (replace(recipe, steps=3), "steps"),
    ):
        capsys.readouterr()
        assert train(changed) == folder
        said = capsys.readouterr().out
        assert (
            f"is finished at step 6, and no step would be taken with what differs ({what}): nothing was changed" in said
        )
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before}
    (folder / "README.md").unlink()
    with pytest.raises(InputError, match=r"with what differs \(dataset.path, what .*\): expected the recipe"):
        train(other)


def test_data_that_changed_in_their_place_are_told_apart(
    recipe: DatasetTransformerRecipe, tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = write_dataset(tmp_path / "mine", tiny_checkpoint, {CLIPS: 12})
    recipe = replace(recipe, dataset=replace(recipe.dataset, path=str(place)))
    folder = train(recipe)
    card = (folder / "README.md").read_text()
    write_dataset(place, tiny_checkpoint, {CLIPS: 14})
    train(recipe)
    assert "no step would be taken with what differs (what the dataset holds): nothing" in capsys.readouterr().out
    assert (folder / "README.md").read_text() == card
    train(replace(recipe, steps=8))
    assert "learned from 14 samples of" in (folder / "README.md").read_text()


def test_each_segment_keeps_its_recipe(recipe: DatasetTransformerRecipe) -> None:
    """What was killed before it took a step to keep leaves none."""
    slow, fast = recipe.optimizer, replace(recipe.optimizer, lr=1e-2)
    train(replace(recipe, steps=2))
    train(replace(recipe, steps=4, optimizer=fast))
    newest_checkpoint(Path(recipe.output) / "checkpoints").unlink()  # as if it had been killed
    folder = train(replace(recipe, steps=6, optimizer=slow))
    train(replace(recipe, steps=6, optimizer=slow))
    kept = [load_recipe(folder / name) for name in ("recipe-0000.toml", "recipe.toml")]
    assert [(each.steps, each.optimizer.lr) for each in kept] == [(2, slow.lr), (6, slow.lr)]
    train(replace(recipe, steps=8, optimizer=fast))
    card = (folder / "README.md").read_text()
    assert "| 0 to 2 | [recipe-0000.toml](recipe-0000.toml) | learned from 30 samples" in card
    assert "| 2 to 6 | [recipe-0001.toml](recipe-0001.toml) | steps = 6 |" in card
    assert "| 6 to 8 | [recipe.toml](recipe.toml) | steps = 8; optimizer.lr = 0.01 |" in card
    assert load_recipe(folder / "recipe.toml").optimizer.lr == 0.01
    (Path(recipe.output) / "segments.jsonl").unlink()  # as of an older version
    train(replace(recipe, steps=9, optimizer=fast))
    assert "| 0 to 8 | [recipe-0000.toml]" in (folder / "README.md").read_text()
    (Path(recipe.output) / "segments.jsonl").write_text("[1]")
    with pytest.raises(InputError, match=r"segments.jsonl is damaged \(a line is no segment\)"):
        train(replace(recipe, steps=10))


def test_what_is_not_begun_leaves_nothing(recipe: DatasetTransformerRecipe, tmp_path: Path) -> None:
    """A dataset without text features and a model that names no text encoder; and none at all."""
    other = write_dataset(tmp_path / "no-text", Path(recipe.init), {PICTURES: 4}, text=False)
    info = DatasetInfo.load(other)
    replace(info, text_encoder=None).save(other)
    for place, expected in (
        (other, "no-text has no text features: expected a text_encoder that makes them"),
        (tmp_path / "none", "none: has no dataset.json"),
    ):
        with pytest.raises(InputError, match=expected):
            train(replace(recipe, init="", scheduler="flow", dataset=replace(recipe.dataset, path=str(place))))
    assert not Path(recipe.output).exists()


def test_two_runs_do_not_write_to_one_place(recipe: DatasetTransformerRecipe) -> None:
    """Whichever process it is; and a run that has ended, however it did, is in no one's way."""
    with another_process_writes(Path(recipe.output)):
        with pytest.raises(InputError, match=f"{recipe.output}: another process is writing there: expected it to end"):
            train(recipe)
        assert [path.name for path in Path(recipe.output).iterdir()] == [".lock"]
    train(replace(recipe, steps=2))


def test_which_weights_a_step_reaches(recipe: DatasetTransformerRecipe) -> None:
    """All but the mixer's, where there are single frames."""
    both = DatasetTask(recipe, CPU)
    of_length = {both.shape(variant)[0]: variant for variant in both.variants()[0]}
    assert of_length.keys() == {1, 2, 3}
    both.open_data([0], 1, {})
    for frames, variant in of_length.items():
        both.model.zero_grad()
        both.loss(variant, both.draw(variant, 0))["loss"].backward()
        left = {name for name, weight in both.model.named_parameters() if weight.grad is None}
        mixer = {name for name, _ in both.model.named_parameters() if ".mixer." in name}
        assert left == (mixer if frames == 1 else set())


def test_few_numbers_of_revealed_tokens(recipe: DatasetTransformerRecipe) -> None:
    task = DatasetTask(replace(recipe, mask_levels=8), CPU)
    numbers, shares = task.counts(1024)
    assert numbers == [0, 128, 256]
    mean = sum(number * share for number, share in zip(numbers, shares, strict=True))
    exact = DatasetTask(recipe, CPU).counts(1024)
    assert mean == pytest.approx(sum(n * s for n, s in zip(*exact, strict=True)), rel=0.1)
    with pytest.raises(InputError, match="mask_levels is of the paper's ratios by batch"):
        replace(recipe, mask_levels=8, mask_ratio="sample")


def test_kernels_of_attention(recipe: DatasetTransformerRecipe) -> None:
    """Any may be taken by transformers, unless a recipe says otherwise."""
    assert recipe.attention_kernels == "auto"
    assert replace(recipe, attention="cudnn").attention_kernels == "cudnn"
    assert WorldTransformerRecipe().attention_kernels == "auto"
    assert AutoencoderRecipe().attention_kernels == "flash"


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_changes_nothing(
    recipe: DatasetTransformerRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is counted; the run goes on."""
    plain = DatasetTask.loss
    calls = []

    def loss(self: DatasetTask, variant: Variant, batch: Any) -> dict[str, torch.Tensor]:
        calls.append(variant)
        found = plain(self, variant, batch)
        return found | {"loss": found["loss"] * (math.nan if len(calls) == 3 else 1.0)}

    monkeypatch.setattr(DatasetTask, "loss", loss)
    train(recipe)
    assert logged(recipe, "skipped_steps") == [1.0]
    lines = [json.loads(line) for line in (Path(recipe.output) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" not in line] == [3]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    state = load_file(newest_checkpoint(Path(recipe.output) / "checkpoints"))
    assert state["optimizer.text_embed.proj.weight.step"] == 5


def test_ten_such_steps_in_a_row_end_the_run_with_the_batch(
    recipe: DatasetTransformerRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = DatasetTask.loss
    monkeypatch.setattr(DatasetTask, "loss", lambda *a: plain(*a) | {"loss": plain(*a)["loss"] * math.nan})
    with pytest.raises(InputError, match=rf"step {BAD_STEPS}: the last {BAD_STEPS} steps had gradients that are not"):
        train(replace(recipe, steps=50))
    saved = list(Path(recipe.output).glob("bad-batch-*.safetensors"))
    assert len(saved) == 1
    assert {"latents", "text", "lengths", "motion", "fps"} == load_file(saved[0]).keys()

    def full(*arguments: Any) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("nova_video.training.stepper.save_file", full)
    said = f"{BAD_STEPS} steps in a row were skipped, and their newest batch .* could not be written: No space left"
    with pytest.raises(InputError, match=said):
        train(replace(recipe, steps=50, output=f"{recipe.output}-2"))


def test_after_ten_of_them_nothing_is_learned_until_it_is_seen(
    recipe: DatasetTransformerRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU is some steps on by then."""
    plain, calls = DatasetTask.loss, []

    def loss(self: DatasetTask, variant: Variant, batch: Any) -> dict[str, torch.Tensor]:
        calls.append(variant)
        found = plain(self, variant, batch)
        return found | {"loss": found["loss"] * (math.nan if len(calls) <= BAD_STEPS else 1.0)}

    monkeypatch.setattr(DatasetTask, "loss", loss)
    task, processes = DatasetTask(recipe, CPU), Processes(recipe)
    task.open_data([0], 1, {})
    optimizer, average = make_optimizer(task.model, recipe.optimizer, CPU), Average(task.model, 0.9)
    stepper = Stepper(task, processes.spread(task), optimizer, average, recipe, processes, [0])
    before = [weight.detach().clone() for weight in task.model.parameters()]
    for number in range(BAD_STEPS + 3):
        stepper.step(number, task.variants()[0][0])
    assert all(torch.equal(*pair) for pair in zip(before, task.model.parameters(), strict=True))
    with pytest.raises(InputError, match=f"the last {BAD_STEPS + 3} steps had gradients that are not finite"):
        stepper.check(BAD_STEPS + 3, Path(recipe.output).parent)


def test_data_that_are_read_otherwise_start_anew(
    recipe: DatasetTransformerRecipe,
    tiny_checkpoint: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other workers keep other places, and a dataset that has grown has other rows at them."""
    folder = write_dataset(tmp_path / "grows", tiny_checkpoint, {CLIPS: 8})
    recipe = replace(recipe, dataset=replace(recipe.dataset, path=str(folder), workers=2, held_out=0.0))
    train(replace(recipe, steps=2))
    train(replace(recipe, steps=3, dataset=replace(recipe.dataset, workers=0)))
    assert "the data start anew: workers is 0, it was 2\n" in caplog.text
    caplog.clear()
    train(replace(recipe, steps=4, dataset=replace(recipe.dataset, workers=0)))
    assert "anew" not in caplog.text
    moved = folder.rename(tmp_path / "moved")
    train(replace(recipe, steps=5, dataset=replace(recipe.dataset, workers=0, path=str(moved))))
    assert "anew" not in caplog.text
    (moved / "data" / CLIPS.name / "1.parquet").rename(moved / "data" / CLIPS.name / "2.parquet")
    train(replace(recipe, steps=6, dataset=replace(recipe.dataset, workers=0, path=str(moved))))
    assert "the data start anew: the dataset has other shards\n" in caplog.text
    caplog.clear()
    monkeypatch.setattr("test_dataset_training.WORDS", ("pear", "snail"))
    other = write_dataset(tmp_path / "other", tiny_checkpoint, {CLIPS: 8})
    (other / "data" / CLIPS.name / "1.parquet").rename(other / "data" / CLIPS.name / "2.parquet")
    train(replace(recipe, steps=7, dataset=replace(recipe.dataset, workers=0, path=str(other))))
    assert "the data start anew" in caplog.text


@pytest.mark.parametrize(
    ("crafted", "message"),
    [
        (None, "is NoneType, of nothing"),
        ({}, "is dict, of nothing"),
        ({"a": 1}, "State doesn't contain key"),
        ({"micro_batches": {"0": {"pass": -1, "rows": None}}}, "has a pass that is -1: expected a whole number"),
        ({"micro_batches": {"0": {"pass": "x", "rows": None}}}, "has a pass that is 'x'"),
        ({"micro_batches": {"0": {"pass": 0, "rows": {}}}}, "has rows that are no place"),
        ({"micro_batches": {"0": 1}}, "has a micro batch without pass and rows"),
    ],
)
def test_crafted_places_in_the_data_are_refused(crafted: Any, message: str, recipe: DatasetTransformerRecipe) -> None:
    task = DatasetTask(recipe, CPU)
    task.open_data([0], 1, {})
    places = {name: place if name == "how" else crafted for name, place in task.places().items()}
    with pytest.raises(InputError, match=f"^the checkpoint's place in the data of .* {re.escape(message)}"):
        task.open_data([0], 1, places)


def test_an_interrupt_while_readers_start_only_asks(
    recipe: DatasetTransformerRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the run behind its first step, with a checkpoint, and does not leave processes half made."""
    opened = DatasetTask.open_data

    def interrupted(self: DatasetTask, *how: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        opened(self, *how)

    monkeypatch.setattr(DatasetTask, "open_data", interrupted)
    with pytest.raises(KeyboardInterrupt, match="^stopped at step 1 "):
        train(replace(recipe, log=replace(recipe.log, checkpoint_every=100)))
    assert (Path(recipe.output) / "model" / "transformer").is_dir()
    assert newest_checkpoint(Path(recipe.output) / "checkpoints").name == "step-00000001.safetensors"


@pytest.mark.parametrize("share", [0.2, 0.01])
def test_what_is_validated_on(share: float, recipe: DatasetTransformerRecipe, caplog: pytest.LogCaptureFixture) -> None:
    """Clips of the first size of which two with different captions are held out; that there are none is said once."""
    recipe = replace(recipe, dataset=replace(recipe.dataset, held_out=share), log=replace(recipe.log, validate_every=2))
    task = DatasetTask(recipe, CPU)
    assert len({(sample.bucket, sample.source) for sample in task.held_out}) == len(task.held_out)
    assert len({sample.bucket for sample in task.held_out}) == (share == 0.2)
    train(recipe)
    assert len(logged(recipe, "held_out_loss")) == (3 if share == 0.2 else 0)
    assert caplog.text.count("nothing to validate on: too few of 30 sources are held out") == (share != 0.2)


def test_what_goes_wrong_in_a_worker_is_one_line(
    recipe: DatasetTransformerRecipe, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = write_dataset(tmp_path / "few", tiny_checkpoint, {CLIPS: 2})
    data = DatasetRecipe(str(folder), batch=2, held_out=0.0, workers=1)
    for workers in (0, 1):
        task = DatasetTask(replace(recipe, dataset=replace(data, workers=workers)), CPU)
        task.open_data([0], 1, {})
        for path in folder.glob("data/*/*.parquet"):
            whole = path.read_bytes()
            path.write_bytes(bytes(len(whole) // 2) + whole[len(whole) // 2 :])
        with pytest.raises(InputError) as found:
            task.draw(task.variants()[0][0], 0)
        assert str(found.value).count("\n") == 0
        assert len(str(found.value)) < 500
        assert str(found.value).startswith(f"{folder}/data/{CLIPS.name}: unreadable shard (")
        write_dataset(folder, tiny_checkpoint, {CLIPS: 2})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_that_cannot_be_read_costs_no_step(
    workers: int, recipe: DatasetTransformerRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was learned before it is saved, and the run goes on from there when it is mended."""
    recipe = replace(recipe, dataset=replace(recipe.dataset, workers=workers, image_share=0.0))
    recipe = replace(recipe, log=replace(recipe.log, checkpoint_every=5))
    train(recipe)
    stopped = replace(recipe, output=str(tmp_path / "stopped"))
    read: list[str] = []

    def to_sample(row: Any) -> Any:
        read.append(row["source"])
        if len(read) > 5:  # in this process
            raise InputError("a row is damaged")
        return as_it_was(row)

    as_it_was = stream.to_sample
    with monkeypatch.context() as patched:
        patched.setattr(stream, "to_sample", to_sample)
        with pytest.raises(InputError, match="^a row is damaged$"):
            train(stopped)
    saved = newest_checkpoint(tmp_path / "stopped" / "checkpoints")
    assert saved is not None
    assert "step-00000001" <= saved.stem < "step-00000005"
    train(stopped)
    states = [newest_checkpoint(Path(each.output) / "checkpoints") for each in (recipe, stopped)]
    whole, again = (load_file(state) for state in states if state is not None)
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_sizes_without_rows_to_learn_from_are_left_out(
    recipe: DatasetTransformerRecipe, tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All of one size are held out, or fewer are there than micro batches: a run would end when that size comes up."""
    folder = write_dataset(tmp_path / "few", tiny_checkpoint, {CLIPS: 12, SMALL: 2})
    data = replace(recipe.dataset, path=str(folder), image_share=None, held_out=0.2)
    assert all(is_held_out(f"clips/{SMALL.name}-{number}.mp4", 0.2) for number in range(2))
    task = DatasetTask(replace(recipe, dataset=data), CPU)
    assert {variant.size.bucket for variant in task.variants()[0]} == {CLIPS}
    assert f"{SMALL.name} is left out: 0 of its rows are not held out, of 1 needed" in caplog.text
    task = DatasetTask(replace(recipe, dataset=replace(data, held_out=0.0)), CPU)
    assert {variant.size.bucket for variant in task.variants()[0]} == {CLIPS, SMALL}
    task.open_data([3], 4, {})
    assert {variant.size.bucket for variant in task.variants()[0]} == {CLIPS}
    assert f"{SMALL.name} is left out: 2 of its rows are not held out, of 4 needed" in caplog.text
    with pytest.raises(InputError, match="no size has 13 rows that are not held out: expected more rows"):
        task.open_data([0], 13, {})


def test_a_run_goes_on_with_pictures_it_had_none_of(
    recipe: DatasetTransformerRecipe, tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In a folder whose name has brackets, which are neither a pattern nor markup."""
    folder = write_dataset(tmp_path / "set [1080p] [/a]", tiny_checkpoint, {CLIPS: 12})
    data = replace(recipe.dataset, path=str(folder), image_share=0.0)
    begun = replace(recipe, steps=2, dataset=data, output=str(tmp_path / "run [/red] y"))
    train(begun)
    caplog.clear()
    train(replace(begun, steps=4, dataset=replace(data, image_share=0.5)))
    assert f"the data of {CLIPS.name} pictures start at their beginning" in caplog.text
    assert len(logged(begun, "loss")) == 4


@contextlib.contextmanager
def longest_file(size: int) -> Iterator[None]:
    """A limit on the size of files stands in for the end of the disk."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_full_disk_leaves_the_last_checkpoint(recipe: DatasetTransformerRecipe) -> None:
    """The second one is cut short."""
    train(replace(recipe, steps=2))
    good = newest_checkpoint(Path(recipe.output) / "checkpoints")
    before = good.read_bytes()
    said = rf"could not be written: .*can go on from .*{good.name}"
    with longest_file(len(before) // 2), pytest.raises(InputError, match=said):
        train(replace(recipe, steps=4))
    assert [path.name for path in good.parent.iterdir()] == [good.name]
    assert good.read_bytes() == before
    train(replace(recipe, steps=4))


@pytest.mark.parametrize("sample_every", [0, 3])
@pytest.mark.slow
def test_a_full_disk_leaves_the_last_model(recipe: DatasetTransformerRecipe, sample_every: int) -> None:
    """At the end of a run, and where its samples are made; then the run goes on."""
    folder = train(replace(recipe, steps=2))
    (folder / "notes.txt").write_text("not of the run")
    before = content(folder)
    largest = max(map(len, before.values()))
    more = replace(recipe, steps=3, log=replace(recipe.log, checkpoint_every=0, sample_every=sample_every))
    said = rf"^model {folder} could not be written: .*can go on from .*step-00000002"
    with longest_file(largest // 2), pytest.raises(InputError, match=said):
        train(more)
    assert content(folder) == before
    assert not list(folder.parent.glob(".*.part"))
    train(more)
    after = content(folder)
    assert after.keys() - {"samples.png", "recipe-0000.toml"} == before.keys()
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert after[weights] != before[weights]
    assert (folder / "text_encoder").is_symlink()


def test_a_full_disk_leaves_the_log(recipe: DatasetTransformerRecipe) -> None:
    """A run that goes on drops what was logged past its checkpoint; the lines before are never lost."""
    train(recipe)
    path = Path(recipe.output) / "metrics.jsonl"
    before = path.read_bytes()
    with longest_file(len(before) // 4), pytest.raises(InputError, match="metrics.jsonl could not be written: "):
        Log(recipe, True).start(4)
    assert path.read_bytes() == before
    assert not list(path.parent.glob(".*.part"))


def test_fp8_names_its_package(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "torchao.float8", None)  # importing it fails
    with pytest.raises(InputError, match=re.escape(f"precision = 'fp8' needs torchao: {install_command('lowmem')}")):
        use_fp8(load_transformer(tiny_checkpoint), torch.device("cuda"))


def test_fp8_takes_any_number_of_tokens(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in 8 bits sum over multiples of 16: gradients of weights sum over tokens, which are padded."""
    from torchao.float8.float8_linear import Float8Linear

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    model = load_transformer(tiny_checkpoint)
    use_fp8(model, torch.device("cuda"))
    layers = [module for module in model.modules() if isinstance(module, Float8Linear)]
    assert layers
    assert all(layer.config.pad_inner_dim for layer in layers)


def test_wrong_recipes_name_the_field(
    recipe: DatasetTransformerRecipe, tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(InputError, match=message):
            train(replace(recipe, **changes))

    refused("dataset.path is empty", dataset=DatasetRecipe())
    refused("has no dataset.json", dataset=DatasetRecipe(str(tmp_path)))
    refused("autoencoder = 'emoji' has weights .* expected the same", autoencoder="emoji")
    refused("model.video_mixer_rank is 8, but init = .* has 4", model=ModelRecipe(video_mixer_rank=8))
    refused("init = 'emoji' is made for 16 channels of the latents, but", init="emoji")
    refused("frozen has 'nothing', which no weight begins with", frozen=("nothing",))
    refused("fresh has 'nothing'", fresh=("nothing",))
    refused("scheduler is 'init' and there is no init", init="")
    refused(f"scheduler is 'flow', and '{recipe.init}' .* expected 'init'", scheduler="flow", lora=LoraRecipe(rank=2))
    refused("trackers has 'stone'", trackers=("stone",))
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(log_module.TRACKER_PACKAGES, name, lambda: False)
        refused(f"trackers has '{name}', which is not installed: pip install {name}$", trackers=(name,))
    monkeypatch.setitem(log_module.TRACKER_PACKAGES, "tensorboard", lambda: False)
    refused(re.escape(f"which is not installed: {install_command('train')}"))
    monkeypatch.undo()
    refused("precision = 'fp8' on cpu", precision="fp8")
    pictures = write_dataset(tmp_path / "other", tiny_checkpoint, {CLIPS: 4})
    alone = {"init": "", "scheduler": "flow", "model": ModelRecipe(video_base_frames=1)}
    refused("this model makes pictures alone", dataset=replace(recipe.dataset, path=str(pictures)), **alone)
    (pictures / "data" / CLIPS.name / "0.parquet").write_bytes(b"PAR1")
    refused("0.parquet: unreadable shard", dataset=replace(recipe.dataset, path=str(pictures)))


def test_micro_batches_are_shared_evenly(recipe: DatasetTransformerRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes(recipe)
    processes.count, processes.index = 4, 1
    assert processes.share(8, None) == ([1, 5], 8)
    assert processes.share(0, None) == ([1], 4)
    assert processes.share(0, 12) == ([1, 5, 9], 12)  # a resumed run keeps its own
    assert processes.share(0, 6) == ([1], 4)  # unless they cannot be shared out
    with pytest.raises(InputError, match="micro_batches is 6: expected a multiple of the 4 processes"):
        processes.share(6, None)
    assert os.environ.get("WORLD_SIZE") is None
