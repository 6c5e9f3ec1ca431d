"""That the paper's recipes train at their full size: `python benchmarks/recipes.py [recipes/paper-512.toml ...]`.

Each takes a few steps, as `nova train` does it, with everything as the recipe says but what it learns from and begins
with: an encoded dataset of random numbers, random weights, and one micro batch a step. Prints a row for each as soon as
it is there, also for one that fails, and writes those so far as JSON.
"""

import gc
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import tyro
from diffusers import AutoencoderKL
from result_file import result_of, write_result

from nova_video.autoencoders import AutoencoderKLOpenSora
from nova_video.bench.sample import GIB, digits
from nova_video.common.devices import choose_device
from nova_video.data.dataset import Bucket, DatasetInfo, EncodedSample, write_shard
from nova_video.data.encoders import autoencoder_info
from nova_video.training.recipe import DatasetTransformerRecipe, load_recipe
from nova_video.training.trainer import train

ROOT = Path(__file__).resolve().parents[1]
TEXT_DIM, CLIPS = 2560, 32  # Phi-2's; of the dataset


@dataclass(frozen=True)
class Recipes:
    """A few steps of each recipe."""

    recipes: tyro.conf.Positional[tuple[Path, ...]] = tuple(sorted((ROOT / "recipes").glob("paper-*.toml")))
    steps: int = 5
    size: Literal["released", "toy"] = "released"
    """As in the recipe, or a toy for a CPU."""
    device: str = "auto"
    output: Path = ROOT / "benchmarks" / "measured" / "recipes.json"
    """JSON file to write."""


def main(args: Recipes) -> int:
    device = choose_device(args.device)
    rows: list[dict[str, Any]] = []
    result = result_of("recipes", device, rows=rows)
    for path in args.recipes:
        rows.append(attempt(path, args, device))
        print(json.dumps(rows[-1]), flush=True)
        write_result(args.output, result)
    return int(any("error" in row for row in rows))


def attempt(path: Path, args: Recipes, device: torch.device) -> dict[str, Any]:
    """Losses, seconds and memory of a recipe's first steps; or what went wrong."""
    row: dict[str, Any] = {"recipe": path.name, "size": args.size}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with TemporaryDirectory() as folder:
            recipe = prepared(path, args, Path(folder))
            train(recipe)
            lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
            logged = [values for values in map(json.loads, lines) if "loss" in values]
        row |= {"batch": recipe.dataset.batch, "precision": recipe.precision, "checkpointing": recipe.checkpointing}
        row |= {"losses": [digits(values["loss"]) for values in logged]}
        row |= {"last_step_seconds": digits(1 / logged[-1]["steps_per_second"]), "mfu": logged[-1].get("mfu")}
        row |= {"skipped_steps": sum(values.get("skipped_steps", 0) for values in logged)}
    except Exception as error:  # of whatever kind: the next recipe is still to be tried
        row |= {"error": " ".join(f"{type(error).__name__}: {error}".split())}
    if device.type == "cuda":
        row |= {"peak_gib": digits(torch.cuda.max_memory_allocated(device) / GIB)}
        gc.collect()
        torch.cuda.empty_cache()
    torch._dynamo.reset()
    return row


def prepared(path: Path, args: Recipes, folder: Path) -> DatasetTransformerRecipe:
    """The recipe, with a dataset of random numbers for it in `folder`."""
    plain, toy = load_recipe(path), args.size == "toy"
    assert isinstance(plain, DatasetTransformerRecipe)
    assert plain.model.image_size is not None
    size = (64, 96) if toy else plain.model.image_size
    data = random_dataset(folder, Bucket(plain.defaults.num_frames, *size), toy)
    given = {
        "dataset.path": data,
        "dataset.workers": 0,
        "dataset.held-out": 0.0,
        "autoencoder": folder,
        "init": "",
        "fresh": None,
        "micro-batches": 1,
        "steps": args.steps,
        "device": args.device,
        "output": folder / "run",
        "log.every": 1,
        "log.validate-every": 0,
        "log.sample-every": 0,
        "log.checkpoint-every": 0,
    }
    if toy:
        given |= {"model.arch": "vit_d2w64 vit_d4w64 mlp_d2w64", "model.image-size": "64 96", "dataset.batch": 2}
    words = []
    for option, value in given.items():
        words += [f"--{option}", *([] if value is None else str(value).split() or [""])]
    recipe = load_recipe(path, words)
    assert isinstance(recipe, DatasetTransformerRecipe)
    return recipe


def random_dataset(folder: Path, bucket: Bucket, toy: bool) -> Path:
    """As `nova encode` writes it, with an autoencoder of random weights in `folder`/vae and captions of full length."""
    widths = (32, 32, 32, 32) if toy else (128, 256, 512, 512)
    vae: Any
    if bucket.frames > 1:
        vae = AutoencoderKLOpenSora(block_out_channels=widths)
    else:
        down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
        vae = AutoencoderKL(block_out_channels=widths, down_block_types=down, up_block_types=up)
    vae.save_pretrained(folder / "vae")
    found = autoencoder_info(str(folder))
    info = DatasetInfo(
        str(folder),
        found.fingerprint,
        found.latent_channels,
        found.spatial_stride,
        found.temporal_stride,
        text_encoder="microsoft/phi-2",
        text_dim=TEXT_DIM,
    )
    data = folder / "data"
    info.save(data)
    random = torch.Generator().manual_seed(0)
    samples = [
        EncodedSample(
            id=f"{number}",
            source=f"{number}",
            start=0.0,
            end=1.0,
            caption="Long. And short.",
            fps=12.0,
            motion=5.0,
            bucket=bucket,
            moments=torch.randn(info.moments_shape(bucket), generator=random).bfloat16(),
            text=torch.randn(256, TEXT_DIM, generator=random).half(),
            text_short=torch.randn(32, TEXT_DIM, generator=random).half(),
        )
        for number in range(CLIPS)
    ]
    write_shard(data / "data" / bucket.name / "0.parquet", samples, found.fingerprint)
    return data


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Recipes)))
