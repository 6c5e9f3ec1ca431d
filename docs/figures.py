"""Draws every picture of the README and the docs from a checkpoint: `python docs/figures.py [--model emoji]`.

Masks, orders, sizes and dependencies are computed by the model's own code; samples are real requests.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from drawing import attention, autoencoder, beyond, curves, network, packages, samples, showcase, training
from drawing.requests import reveal_frame
from drawing.style import save

from nova_video.io.checkpoints import resolve_checkpoint
from nova_video.pipeline.pipeline import NovaPipeline
from nova_video.training.recipe import load_recipe
from nova_worlds.training.recipes import WorldTransformerRecipe

DOCS = Path(__file__).resolve().parent
RECIPE = DOCS.parent / "recipes" / "emoji-image.toml"


@dataclass(frozen=True)
class Figures:
    """Draw the pictures of the README and the docs."""

    model: str = "emoji"
    """As for `nova generate`: the bundled model, a checkpoint folder, or the name of a released checkpoint."""
    output: Path = DOCS / "images"
    """Folder to write."""
    structure_only: bool = False
    """Leave out what needs trained weights: the clips of the README, a frame being filled, a set being denoised,
    guidance, and clips that go beyond one."""
    prompt: str = "a whale moving left on a blue background"
    """Of the frame being filled."""
    image_prompts: tuple[str, ...] = ("a red apple on a white background", "a penguin on an orange background")
    """Of the pictures: the first one's denoising is shown, and all with different guidance."""
    seed: int = 0
    """Of orders, clips and animation."""
    image_seed: int = 5
    """Of the denoising and of guidance: here the set that is shown covers some of the apple."""


def draw_structure(pipe: NovaPipeline, output: Path, seed: int) -> None:
    """What does not depend on the values of the weights."""
    model, defaults = pipe.transformer, pipe.defaults
    request = reveal_frame(pipe, seed)
    text, condition = request.text_tokens, request.condition_tokens
    sets = len(request.sizes)
    num_latents = max(2, (max(defaults.num_frames, 17) - 1) // pipe.vae.temporal_stride + 1)
    mask = attention.temporal_mask(text, condition, num_latents)
    save(network.draw_overview(model, pipe.vae.temporal_stride, request), output / "overview.png")
    save(attention.draw_temporal_mask(mask, text, condition), output / "temporal-mask.png")
    save(
        attention.draw_sets(request.order, request.sizes, request.rows, request.columns, defaults.num_inference_steps),
        output / "sets.png",
    )
    moments = [request.moment(done) for done in (0, sets // 2, max(0, sets - 3))]
    save(
        attention.draw_spatial_attention(moments, condition, request.rows, request.columns),
        output / "spatial-attention.png",
    )
    save(network.draw_denoiser(model), output / "denoiser.png")
    recipe = load_recipe(RECIPE)
    assert isinstance(recipe, WorldTransformerRecipe)
    tokens = request.rows * request.columns
    save(training.draw_training(tokens, recipe.visible, recipe.visible_probability), output / "training.png")
    num_frames = pipe.vae.temporal_stride * (num_latents - 1) + 1
    encoder = autoencoder.encoder_reads(pipe.vae, num_frames)
    decoder = autoencoder.decoder_reads(pipe.vae, num_latents)
    save(autoencoder.draw_autoencoder(encoder, decoder), output / "autoencoder.png")
    save(beyond.draw_contexts(), output / "context.png")
    (output / "packages.svg").write_text(packages.draw_packages(), encoding="utf-8")


def draw_samples(pipe: NovaPipeline, args: Figures) -> None:
    """What the model makes."""
    output, first = args.output, args.image_prompts[0]
    clips, fps = showcase.make_clips(pipe, showcase.PROMPTS, args.seed)
    showcase.draw_sheet(clips, showcase.PROMPTS, fps, output / "emoji.webp")
    filling = samples.record_filling(pipe, args.prompt, args.seed)
    samples.draw_filling(pipe, filling, output / "filling.webp")
    run = samples.record_denoising(pipe, first, args.image_seed, num_sets=5, chosen=3)
    save(samples.draw_denoising(pipe, run, first), output / "denoising.png")
    save(samples.draw_guidance(pipe, args.image_prompts, (1, 2, 4, 8), args.image_seed), output / "guidance.png")
    beyond.draw_samples(pipe, output)


def main(args: Figures) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    pipe = NovaPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    draw_structure(pipe, args.output, args.seed)
    logs = resolve_checkpoint(args.model) / "training"
    if logs.is_dir():  # only a checkpoint that carries its training curve
        save(curves.draw_curves(logs), args.output / "training-curve.png")
    if not args.structure_only:
        draw_samples(pipe, args)
    for path in sorted(args.output.iterdir()):
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(tyro.cli(Figures))
