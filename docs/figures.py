"""Draws every picture of docs/how-it-works.md from a checkpoint: `python docs/figures.py [--model emoji]`.

Masks, orders, sizes and dependencies are computed by the model's own code; samples are real requests.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from drawing import attention, autoencoder, network, samples, training
from drawing.requests import reveal_frame
from drawing.style import save

from nova_video.pipeline import NovaPipeline
from nova_video.training.recipe import TransformerRecipe, load_recipe

DOCS = Path(__file__).resolve().parent
RECIPE = DOCS.parent / "recipes" / "emoji-image.toml"


@dataclass(frozen=True)
class Figures:
    """Draw the pictures of docs/how-it-works.md."""

    model: str = "emoji"
    """As for `nova generate`: the model in the box, a checkpoint folder, or the name of a released checkpoint."""
    output: Path = DOCS / "images"
    """Folder to write."""
    structure_only: bool = False
    """Leave out what needs trained weights: the animation, the denoising of a set, and guidance."""
    prompt: str = "a whale moving left on a blue background"
    """Of the animation."""
    image_prompts: tuple[str, ...] = ("a red apple on a white background", "an owl on a green background")
    """Of the pictures: the first one's denoising is shown, and all with different guidance."""
    seed: int = 0


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
    assert isinstance(recipe, TransformerRecipe)
    tokens = request.rows * request.columns
    save(training.draw_training(tokens, recipe.visible, recipe.visible_probability), output / "training.png")
    num_frames = pipe.vae.temporal_stride * (num_latents - 1) + 1
    encoder = autoencoder.encoder_reads(pipe.vae, num_frames)
    decoder = autoencoder.decoder_reads(pipe.vae, num_latents)
    save(autoencoder.draw_autoencoder(encoder, decoder), output / "autoencoder.png")


def draw_samples(pipe: NovaPipeline, output: Path, prompt: str, image_prompts: tuple[str, ...], seed: int) -> None:
    """What the model makes."""
    filling = samples.record_filling(pipe, prompt, seed)
    samples.draw_filling(pipe, filling, output / "filling.webp")
    run = samples.record_denoising(pipe, image_prompts[0], seed, num_sets=5, chosen=3)
    save(samples.draw_denoising(pipe, run, image_prompts[0]), output / "denoising.png")
    save(samples.draw_guidance(pipe, image_prompts, (1, 2, 4, 8), seed), output / "guidance.png")


def main(args: Figures) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    pipe = NovaPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    draw_structure(pipe, args.output, args.seed)
    if not args.structure_only:
        draw_samples(pipe, args.output, args.prompt, args.image_prompts, args.seed)
    for path in sorted(args.output.iterdir()):
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(tyro.cli(Figures))
