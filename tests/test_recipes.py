"""The paper's recipes: they load, have the settings that are known, make the released models, and train."""

import json
import math
from pathlib import Path

import pytest
import torch

from conftest import CONFORMANCE
from nova_video.bench.configs import SIZES, build
from nova_video.data.dataset import Bucket, DatasetInfo, EncodedSample, write_shard
from nova_video.data.encoders import autoencoder_info
from nova_video.pipeline.loading import load_transformer
from nova_video.training.recipe import DatasetTransformerRecipe, load_recipe, recipe_toml
from nova_video.training.trainer import train

RECIPES = Path(__file__).parents[1] / "recipes"
PAPER = {  # recipe -> the released size it makes, samples a step
    "paper-512": ("t2i-512-0.6b", 1024),
    "paper-1024-0.3b": ("t2i-1024-0.3b", 1024),
    "paper-1024-0.6b": ("t2i-1024-0.6b", 1024),
    "paper-1024-1.4b": ("t2i-1024-1.4b", 1024),
    "paper-video-480": ("t2v-480-0.6b", 384),
}

NAMES = ("kind", "name", "output", "path")
KNOWN = (
    *(
        "steps",
        "autoencoder",
        "text_encoder",
        "scheduler",
        "frozen",
        "video_loss",
        "micro_batches",
        "loss_repeat",
        "prompt_dropout",
    ),
    *("precision", "batch", "short_captions", "lr", "betas", "warmup", "final", "clip", "ema_every"),
)


def paper(name: str, *overrides: str) -> DatasetTransformerRecipe:
    recipe = load_recipe(RECIPES / f"{name}.toml", list(overrides))
    assert isinstance(recipe, DatasetTransformerRecipe)
    return recipe


def test_every_recipe_of_the_paper_is_tested() -> None:
    assert {path.stem for path in RECIPES.glob("paper-*.toml")} == set(PAPER)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_load_and_are_written_whole(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    (tmp_path / "again.toml").write_text(recipe_toml(recipe))
    assert load_recipe(tmp_path / "again.toml") == recipe
    if path.stem in PAPER or path.stem.startswith("emoji"):
        assert (recipe.name, recipe.output) == (path.stem, f"runs/{path.stem}")


@pytest.mark.parametrize("name", PAPER)
def test_settings_are_those_known(name: str) -> None:
    recipe, (_, samples) = paper(name), PAPER[name]
    optimizer = recipe.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay, optimizer.clip) == (1e-4, (0.9, 0.95), 0.02, 0.0)
    assert (optimizer.warmup, optimizer.final, optimizer.ema_every) == (0, 1.0, 100)  # constant, from the first step on
    assert 0.97 <= optimizer.ema <= 0.98
    assert recipe.scheduler == SIZES[PAPER[name][0]].scheduler == ("flow" if "1024" in name else "ddpm")
    assert (recipe.loss_repeat, recipe.prompt_dropout, recipe.visible) == (4, 0.1, ())
    assert (recipe.mask_ratio, recipe.history_noise, recipe.precision) == ("batch", 0.0, "bf16")
    assert recipe.dataset.short_captions == 0.5
    assert recipe.dataset.batch * recipe.micro_batches == samples
    video = "video" in name
    assert recipe.video_loss == ("released" if video else "mean")  # a picture's loss is one and the same
    assert set(recipe.frozen) == {"text_embed.norm"} | (
        {"motion_embed"} if video else {"video_pos_embed", "video_encoder.patch_embed"}
    )


@pytest.mark.parametrize("name", PAPER)
def test_what_is_not_known_is_marked(name: str) -> None:
    """Every other line says that it is ours, or its table does."""
    known = set(NAMES + KNOWN) - ({"steps", "micro_batches", "batch"} if name == "paper-512" else set())
    table = ""
    for line in (RECIPES / f"{name}.toml").read_text().splitlines():
        if line.startswith("["):
            table = line
        elif line and not line.startswith("#") and not table.startswith(("[model]", "[defaults]")):
            key = line.split(" = ")[0]
            assert key in known or "ours" in line or "ours" in table, line


@pytest.mark.parametrize("name", PAPER)
def test_models_are_the_released_ones(name: str) -> None:
    """The network's configuration follows from the recipe: what it names is what the released size has."""
    recipe, size = paper(name), SIZES[PAPER[name][0]]
    released = build(size, torch.device("meta"), torch.float32).transformer
    model = recipe.model
    assert model.arch == tuple(released.config.arch)
    assert model.image_size == size.image_size
    assert (model.video_mixer_rank or None) == released.config.video_mixer_rank
    assert model.video_base_frames == released.config.video_base_size[0]
    assert (model.text_token_len, model.rotary_pos_embed) == (released.config.text_token_len, False)
    assert recipe.defaults.num_frames == size.num_frames
    names = [name for name, _ in released.named_parameters()]
    for part in (*recipe.frozen, *recipe.fresh):
        assert any(parameter.startswith(f"{part}.") for parameter in names), part


def test_what_is_fresh_is_what_the_pictures_model_lacks() -> None:
    """Everything else of the video model has the name and the shape it has in the 512 px model."""
    shapes = {
        name: {
            n: p.shape
            for n, p in build(SIZES[size], torch.device("meta"), torch.float32).transformer.named_parameters()
        }
        for name, (size, _) in PAPER.items()
    }
    fresh = tuple(f"{part}." for part in paper("paper-video-480").fresh)
    kept = {n: shape for n, shape in shapes["paper-video-480"].items() if not n.startswith(fresh)}
    assert kept == {n: shape for n, shape in shapes["paper-512"].items() if not n.startswith(fresh)}
    assert {n.split(".")[0] for n in shapes["paper-video-480"]} - {n.split(".")[0] for n in kept} == {
        "image_decoder",
        "motion_embed",
    }


def test_half_size_before() -> None:
    """The override that the 1024 px recipes name."""
    given = '--init "" --dataset.batch 32 --micro-batches 32 --model.image-size 512 512'.replace('""', "").split()
    given.insert(1, "")
    recipe = paper("paper-1024-0.6b", *given)
    assert (recipe.init, recipe.model.image_size, recipe.dataset.batch * recipe.micro_batches) == ("", (512, 512), 1024)


# A step of each, with a tiny network --------------------------------------------------------------------------------


def write_dataset(folder: Path, checkpoint: Path, text_encoder: Path, bucket: Bucket) -> Path:
    """Eight clips of random moments and features, as the autoencoder of a reference checkpoint would have them."""
    found = autoencoder_info(str(checkpoint))
    info = DatasetInfo(
        str(checkpoint),
        found.fingerprint,
        found.latent_channels,
        found.spatial_stride,
        found.temporal_stride,
        text_encoder=str(text_encoder),
        text_dim=32,
    )
    info.save(folder)
    random = torch.Generator().manual_seed(0)
    samples = [
        EncodedSample(
            id=f"clip-{number}",
            source=f"{number}.mp4",
            start=0.0,
            end=1.0,
            caption="A whale. It is moving left.",
            fps=12.0,
            motion=float(number),
            bucket=bucket,
            moments=torch.randn(info.moments_shape(bucket), generator=random).bfloat16(),
            text=torch.randn(7, 32, generator=random).half(),
            text_short=torch.randn(3, 32, generator=random).half(),
        )
        for number in range(8)
    ]
    write_shard(folder / "data" / bucket.name / "0.parquet", samples, found.fingerprint)
    return folder


def run(name: str, folder: Path, checkpoint: Path, text_encoder: Path, *more: str) -> Path:
    """Two steps of the recipe on such a dataset; the folder of the model."""
    video = "video" in name
    data = write_dataset(folder / "data", checkpoint, text_encoder, Bucket(9 if video else 1, 64, 96))
    given = {
        "model.arch": f"vit_d2w64 vit_d4w64 mlp_d2w{96 if video else 64}",
        "model.image-size": "64 96",
        "model.text-token-len": "8",
        "dataset.path": data,
        "dataset.batch": 2,
        "dataset.workers": 0,
        "dataset.held-out": 0.0,
        "micro-batches": 2,
        "autoencoder": checkpoint,
        "text-encoder": text_encoder,
        "steps": 2,
        "device": "cpu",
        "output": folder / "run",
        "log.every": 1,
        "log.validate-every": 0,
        "log.sample-every": 0,
        "log.checkpoint-every": 0,
    }
    words = [word for option, value in given.items() for word in (f"--{option}", *str(value).split())]
    return train(paper(name, *words, *more))


def logged(folder: Path) -> list[float]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [values["loss"] for values in map(json.loads, lines) if "loss" in values]


@pytest.mark.parametrize("name", [name for name in PAPER if "video" not in name])
def test_models_of_pictures_train(name: str, tmp_path: Path, tiny_text_encoder: Path) -> None:
    model = load_transformer(run(name, tmp_path, CONFORMANCE / "text-to-image", tiny_text_encoder, "--init", ""))
    assert len(logged(tmp_path)) == 2
    assert all(math.isfinite(loss) for loss in logged(tmp_path))
    assert model.config.video_base_size == [1, 2, 3]
    assert model.motion_embed is None


def test_clips_are_learned_from_the_weights_of_pictures(tmp_path: Path, tiny_text_encoder: Path) -> None:
    """With averages that are the newest weights, and large steps: what is frozen stays, and all else moves."""
    newest = ["--optimizer.ema", "0", "--optimizer.ema-every", "1", "--optimizer.lr", "0.01"]
    images, videos = CONFORMANCE / "text-to-image", CONFORMANCE / "text-to-video"
    first = run("paper-512", tmp_path / "first", images, tiny_text_encoder, *newest)
    then = run("paper-512", tmp_path / "then", images, tiny_text_encoder, *newest, "--init", str(first))
    before, after = load_transformer(first).state_dict(), load_transformer(then).state_dict()
    frozen = (*(f"{part}." for part in paper("paper-512").frozen), "text_embed.weight")
    for name, value in before.items():
        assert torch.equal(value, after[name]) == name.startswith(frozen), name

    clips = run("paper-video-480", tmp_path / "clips", videos, tiny_text_encoder, "--init", str(then))
    assert all(math.isfinite(loss) for loss in logged(tmp_path / "clips"))
    last = load_transformer(clips).state_dict()  # the averages: not yet moved
    fresh = tuple(f"{part}." for part in paper("paper-video-480").fresh)
    for name, value in last.items():
        if not name.startswith(fresh):
            assert torch.equal(value, after[name]), name
    assert last["image_decoder.head.weight"].shape == (16, 96)
    assert "motion_embed.flow_proj.0.weight" in last
    assert "video_encoder.mixer.lora.weight" in last
