"""The paper's recipes: they load, have the settings that are known, and make the released models."""

from pathlib import Path

import pytest
import torch

from nova_video.benchmarks.configs import SIZES, build
from nova_video.training.recipe import DatasetTransformerRecipe, load_recipe, recipe_toml

RECIPES = Path(__file__).parents[1] / "recipes"
PAPER = {  # recipe -> the released size it makes, samples a step
    "paper-512": ("t2i-512-0.6b", 1024),
    "paper-1024-0.3b": ("t2i-1024-0.3b", 1024),
    "paper-1024-0.6b": ("t2i-1024-0.6b", 1024),
    "paper-1024-1.4b": ("t2i-1024-1.4b", 1024),
    "paper-video-480": ("t2v-480-0.6b", 384),
}


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
    assert (recipe.scheduler, recipe.loss_repeat, recipe.prompt_dropout, recipe.visible) == ("ddpm", 4, 0.1, ())
    assert (recipe.mask_ratio, recipe.history_noise, recipe.precision) == ("batch", 0.0, "bf16")
    assert recipe.dataset.short_captions == 0.5
    assert recipe.dataset.batch * recipe.micro_batches == samples
    assert ("video_pos_embed" in recipe.frozen) == ("video" not in name)


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
