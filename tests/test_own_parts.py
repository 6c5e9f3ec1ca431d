"""Own autoencoders, text encoders and sources from encoding to sampling; diffusers' autoencoders on the same way."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ModelMixin

from nova_video import NovaPipeline
from nova_video.cli import main as cli
from nova_video.common.errors import InputError
from nova_video.data.dataset import DatasetInfo, list_shards, read_shard
from nova_video.io import media
from nova_video.training.recipe import DatasetRecipe, DatasetTransformerRecipe, LogRecipe, ModelRecipe
from nova_video.training.trainer import train
from test_adapter import make_cog, make_dc, make_ltx, make_wan

EXAMPLES = Path(__file__).parents[1] / "examples"
VAE, TEXT = "own_autoencoder:BlockColours", "own_text_encoder:WordVectors"


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Four clips of 18 frames, 64x64, each with a caption."""
    folder = tmp_path / "clips"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(4):
        texture = generator.integers(0, 255, (64, 100, 3), np.uint8)
        media.write_media(np.stack([texture[:, k : k + 64] for k in range(18)]), folder / f"{number}.mp4", 8, {})
        (folder / f"{number}.txt").write_text(f"a red whale moving left {number}")
    return folder


@pytest.fixture
def in_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Works where the user's own modules are."""
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.syspath_prepend(str(EXAMPLES))


def encode(source: object, output: Path, *arguments: object, size: str = "64x64", frames: int = 17) -> int:
    words = ["encode", source, "-o", output, "--no-ray", "--device", "cpu", "--size", size, "--frames", frames]
    return cli.main([str(word) for word in (*words, "--fps", 8, *arguments)])


def tiny_recipe(output: Path, dataset: Path, **others: object) -> DatasetTransformerRecipe:
    plain = DatasetTransformerRecipe(
        steps=2,
        scheduler="flow",
        device="cpu",
        output=str(output),
        dataset=DatasetRecipe(str(dataset), batch=1, held_out=0.0, workers=0),
        model=ModelRecipe(("vit_d1w32", "vit_d1w32", "mlp_d1w32"), -1, True, 8, 4),
        log=LogRecipe(every=1, validate_every=0, checkpoint_every=0),
    )
    return replace(plain, **others)


def logged(output: Path) -> list[float]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_own_parts_encode_train_and_sample(
    clips: Path, tmp_path: Path, in_examples: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """By module:Class on the command line and in the recipe, as objects in Python; a dataset alone runs no code."""
    dataset, output = tmp_path / "dataset", tmp_path / "run"
    assert encode(clips, dataset, "--autoencoder", VAE, "--text-encoder", TEXT, frames=9) == 0
    info = DatasetInfo.load(dataset)
    assert (info.autoencoder, info.latent_channels, info.spatial_stride, info.temporal_stride) == (VAE, 3, 16, 4)
    assert (info.text_encoder, info.text_dim, info.text_fingerprint) == (TEXT, 32, None)
    plain = tiny_recipe(output, dataset)
    with pytest.raises(InputError, match=f"dataset.json names the autoencoder: {VAE} is your own code: expected"):
        train(plain)
    sampled = LogRecipe(every=1, validate_every=0, checkpoint_every=0, sample_every=2)
    with pytest.raises(InputError, match=f"dataset.json names the text encoder: {TEXT} is your own code: expected"):
        train(replace(plain, autoencoder=VAE, log=sampled))
    train(replace(plain, autoencoder=VAE, text_encoder=TEXT, log=sampled))
    assert len(logged(output)) == 2
    assert len(list((output / "sheets").iterdir())) == 1
    model = output / "model"
    assert not (model / "vae").exists()
    own = sys.modules["own_autoencoder"].BlockColours(), sys.modules["own_text_encoder"].WordVectors()
    pipe = NovaPipeline.from_pretrained(model, vae=own[0], text_encoder=own[1])
    made = pipe("a red whale", num_frames=9, num_inference_steps=2, num_diffusion_steps=2, output_type="np")
    assert made.frames.shape == (1, 9, 64, 64, 3)
    assert np.ptp(made.frames[0, 0, :16, :16], axis=(0, 1)).max() < 1e-6  # blocks of one colour
    by_name = NovaPipeline.from_pretrained(model, vae=VAE, text_encoder=TEXT)
    assert type(by_name.vae).__name__ == "BlockColours"
    with pytest.raises(InputError, match=f"names the text encoder '{TEXT}', which is no part of it"):
        NovaPipeline.from_pretrained(model, vae=own[0])("a whale", num_frames=1)
    capsys.readouterr()
    assert cli.main(["data", "inspect", str(dataset)]) == 2
    assert f"{VAE} is your own code: expected --model {VAE}" in capsys.readouterr().err


@pytest.mark.parametrize(("make", "frames"), [(make_wan, 17), (make_ltx, 17), (make_cog, 9), (make_dc, 1)])
def test_diffusers_autoencoders_encode_train_and_sample(
    make: Callable[[], ModelMixin], frames: int, clips: Path, tmp_path: Path
) -> None:
    """A folder of the autoencoder alone encodes; what is trained on it opens with that autoencoder and decodes."""
    torch.manual_seed(0)
    vae, dataset, output = tmp_path / "autoencoder", tmp_path / "dataset", tmp_path / "run"
    make().save_pretrained(vae)
    assert encode(clips, dataset, "--autoencoder", vae, frames=frames) == 0
    train(tiny_recipe(output, dataset))
    assert len(logged(output)) == 2
    pipe = NovaPipeline.from_pretrained(output / "model")
    assert type(pipe.vae) is type(make())
    video = {"num_frames": frames} if frames > 1 else {}
    embeds = [torch.zeros(3, pipe.transformer.config.text_token_dim)]
    made = pipe(prompt_embeds=embeds, num_inference_steps=2, num_diffusion_steps=2, output_type="np", **video)
    assert (made.frames[0].shape if frames > 1 else made.images.shape) == (frames, 64, 64, 3)
    if frames > 1:
        with pytest.raises(InputError, match=f"num_frames is inf, and {type(pipe.vae).__name__} decodes whole clips"):
            pipe.stream(prompt_embeds=embeds, num_frames=float("inf"))


def test_frame_counts_that_the_autoencoder_lacks_are_refused(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_ltx().save_pretrained(tmp_path / "ltx")
    assert encode(clips, tmp_path / "dataset", "--autoencoder", tmp_path / "ltx", frames=5) == 2
    assert "frames is 5: expected 8k + 1 for the autoencoder" in capsys.readouterr().err.replace(", as the", " for the")
    assert encode(clips, tmp_path / "dataset", "--autoencoder", tmp_path / "ltx", size="96x64") == 2
    assert "size is 96x64: expected width and height in multiples of 64" in capsys.readouterr().err


def test_an_own_source_is_encoded_and_followed(
    tmp_path: Path, in_examples: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By module:Class; what is wrong with a sample is told, and a run again finds nothing new."""
    name, output = "own_source:ColouredSquares", tmp_path / "dataset"
    arguments = ("--autoencoder", VAE, "--text-encoder", TEXT)
    assert encode(name, output, *arguments, frames=1) == 0
    assert DatasetInfo.load(output).settings["source"] == name
    (shards,) = list_shards(output).values()
    samples = [sample for shard in shards for sample in read_shard(shard.url)]
    assert [(sample.source, sample.caption) for sample in samples[:2]] == [
        ("red.png", "a red square"),
        ("green.png", "a green square"),
    ]
    assert samples[0].moments[0, 0, 0, 0] == 1  # red
    capsys.readouterr()
    assert encode(name, output, *arguments, frames=1) == 0
    assert "all was there, nothing was encoded" in capsys.readouterr().out
    assert cli.main(["data", "inspect", str(output), "--model", VAE, "-o", str(tmp_path / "a.png")]) == 0
    assert "the sources are not there" in capsys.readouterr().out
    assert (
        cli.main(["data", "inspect", str(output), "--model", VAE, "--sources", name, "-o", str(tmp_path / "a.png")])
        == 0
    )
    assert "decoded against source" in capsys.readouterr().out
    more = [("cyan.png", 3, "a cyan square"), ("grey.png", b"no picture", "a grey square"), "lost"]
    own = sys.modules["own_source"].ColouredSquares
    plain = list(own())
    monkeypatch.setattr(own, "__iter__", lambda self: iter([*plain, *more]))
    monkeypatch.setattr(own, "fingerprint", "more of them")
    assert encode(name, output, *arguments, frames=1) == 0
    assert "3 rejected" in capsys.readouterr().out
    rejected = [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]
    assert {line["source"]: line["reason"] for line in rejected} == {
        "cyan.png": "its media is int: expected bytes, a path or a URL",
        "grey.png": "broken: it is damaged, or of no known format",
        "00010": "is str: expected (name, media, caption)",
    }


def test_a_relative_path_of_an_older_dataset_is_found_above_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Older versions noted the paths as they were typed, relative to where the command ran."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tiny_checkpoint)
    (tmp_path / "data" / "set").mkdir(parents=True)
    info = DatasetInfo("models/tiny", "0" * 16, 4, 8, text_encoder="models/gone")
    info.save(tmp_path / "data" / "set")
    loaded = DatasetInfo.load(tmp_path / "data" / "set")
    assert (loaded.autoencoder, loaded.text_encoder) == (str(tmp_path / "models" / "tiny"), "models/gone")
