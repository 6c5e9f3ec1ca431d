"""Checkpoints in exactly the published form: the five on the hub, at a tiny width, open and sample by every door."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import CONFORMANCE
from nova_video import NovaPipeline
from nova_video.autoencoders import AutoencoderKLOpenSora
from nova_video.bench.configs import SIZES, Size
from nova_video.cli import main as cli
from nova_video.io.media import write_media
from nova_video.model import NOVATransformer3DModel
from nova_video.pipeline.loading import outline_transformer
from nova_video.text.features import encode_batch

QUICK: dict[str, Any] = {"num_inference_steps": 2, "num_diffusion_steps": 2}
TINY = "vit_d1w64", "vit_d2w64", "mlp_d1w64"
RELEASED = {  # the published name -> its size
    "nova-d48w768-sdxl1024": "t2i-1024-0.3b",
    "nova-d48w1024-sd512": "t2i-512-0.6b",
    "nova-d48w1024-sdxl1024": "t2i-1024-0.6b",
    "nova-d48w1536-sdxl1024": "t2i-1024-1.4b",
    "nova-d48w1024-osp480": "t2v-480-0.6b",
}
VALUES = {  # millions of the transformer, the padding table included: 0.3, 0.6, 0.6, 1.4 and 0.6 billion
    "nova-d48w768-sdxl1024": 365.3,
    "nova-d48w1024-sd512": 647.0,
    "nova-d48w1024-sdxl1024": 647.0,
    "nova-d48w1536-sdxl1024": 1451.1,
    "nova-d48w1024-osp480": 645.5,
}
FORMS = {  # how the weights lie in each folder: shards of so many bytes, and whether the names say fp16
    "nova-d48w768-sdxl1024": (None, False),
    "nova-d48w1024-sd512": (150_000, False),
    "nova-d48w1024-sdxl1024": (None, True),
    "nova-d48w1536-sdxl1024": (150_000, True),
    "nova-d48w1024-osp480": (150_000, False),
}
SPY = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"


def transformer_config(name: str, size: Size, tiny: bool) -> dict[str, Any]:
    """The keys of a published transformer/config.json, with its own values or those of a tiny model."""
    video = name.endswith("osp480")
    height, width = ((64, 96) if video else (64, 64)) if tiny else size.image_size
    config = {
        "image_dim": 4,
        "image_size": [height, width] if video else height,
        "image_stride": 8,
        "text_token_dim": 32 if tiny else 2560,
        "text_token_len": 10 if tiny else 256,
        "video_base_size": [16 if video else 1, height // 32, width // 32],
        "image_base_size": [height // 16, width // 16],
        "arch": list(TINY if tiny else (f"vit_d16w{size.width}", f"vit_d32w{size.width}", size.denoiser)),
    }
    return config | ({"video_mixer_rank": 4 if tiny else 24} if video else {})


def save_weights(model: Any, folder: Path, shard: int | None, variant: bool, config: dict[str, Any]) -> None:
    """Half precision weights, and the published keys alone in the config."""
    model.half().save_pretrained(folder, max_shard_size=shard or "10GB", variant="fp16" if variant else None)
    (folder / "config.json").write_text(json.dumps(config))


def write_published(folder: Path, name: str) -> Path:
    """A folder as the hub's of this name, with random weights of a tiny model."""
    shard, variant = FORMS[name]
    video = name.endswith("osp480")
    base = CONFORMANCE / ("published-video" if video else "published-flow")
    config = transformer_config(name, SIZES[RELEASED[name]], tiny=True)
    torch.manual_seed(0)
    model = NOVATransformer3DModel(**config)
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    save_weights(model, folder / "transformer", shard, variant, config)
    vae_config = json.loads(
        (CONFORMANCE / ("text-to-video" if video else "published-flow") / "vae/config.json").read_text()
    )
    for key in ("use_quant_conv", "use_post_quant_conv", "force_upcast", "shift_factor", "latents_mean", "latents_std"):
        vae_config.pop(key, None)
    vae = (AutoencoderKLOpenSora if video else AutoencoderKL).from_config(vae_config)
    save_weights(vae, folder / "vae", shard, variant, vae_config)
    shutil.copytree(base / "tokenizer", folder / "tokenizer")
    shutil.copytree(base / "text_encoder", folder / "text_encoder")
    if shard is None:  # one file, with the language head in it as in the shards
        shards = sorted((folder / "text_encoder").glob("model-*.safetensors"))
        tensors = {key: value for path in shards for key, value in load_file(path).items()}
        for path in (*shards, folder / "text_encoder" / "model.safetensors.index.json"):
            path.unlink()
        middle = ".fp16" if variant else ""
        save_file(tensors, folder / "text_encoder" / f"model{middle}.safetensors", metadata={"format": "pt"})
    flow = name.endswith("sdxl1024")
    shutil.copytree(CONFORMANCE / ("published-flow" if flow else "published-video") / "scheduler", folder / "scheduler")
    kind = "FlowMatchEulerDiscreteScheduler" if flow else "DDPMScheduler"
    index = {"_class_name": "NOVAPipeline", "scheduler": ["diffusers", kind], "vae": ["__vae__", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    for part in ("transformer", "vae", "text_encoder"):  # the hub's small modules of the authors' code
        (folder / f"__{part}__.py").write_text(SPY)
        (folder / part / f"__{part}__.py").write_text(SPY)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("published")
    return {name: write_published(folder / name, name) for name in RELEASED}


@pytest.mark.parametrize("name", RELEASED)
def test_published_folders_open_and_sample(
    name: str, published: dict[str, Path], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    pipe = NovaPipeline.from_pretrained(published[name])
    pipe.set_progress_bar_config(disable=True)
    video = name.endswith("osp480")
    assert pipe.capabilities.image_size == ((64, 96) if video else (64, 64))
    assert pipe.capabilities.shiftable == name.endswith("sdxl1024")
    assert type(pipe.vae) is (AutoencoderKLOpenSora if video else AutoencoderKL)
    made = pipe("a red whale", num_frames=5 if video else 1, **QUICK)
    assert len(made.frames[0] if video else made.images) == (5 if video else 1)
    assert not list(published[name].rglob("ran"))
    assert "LOAD REPORT" not in caplog.text + capfd.readouterr().err


def test_half_precision_leaves_the_image_autoencoder_in_float32(published: dict[str, Path]) -> None:
    """The published config does not say `force_upcast`, and diffusers' default is true."""
    pipe = NovaPipeline.from_pretrained(published["nova-d48w768-sdxl1024"], torch_dtype=torch.float16)
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.float16, torch.float32)
    pipe = NovaPipeline.from_pretrained(published["nova-d48w1024-osp480"], torch_dtype=torch.float16)
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.float16, torch.float16)


@pytest.mark.parametrize("name", RELEASED)
def test_published_sizes(name: str, tmp_path: Path) -> None:
    """From the published keys, of shapes alone: as many values as the released weights have."""
    config = transformer_config(name, SIZES[RELEASED[name]], tiny=False)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = outline_transformer(tmp_path)
    values = sum(value.numel() for value in model.state_dict().values())
    assert values / 1e6 == pytest.approx(VALUES[name], abs=0.05)
    side = config["image_size"]
    assert list(model.config.image_size) == (side if isinstance(side, list) else [side, side])
    assert model.size_multiple == 32


@pytest.mark.parametrize("name", ["nova-d48w1024-sdxl1024", "nova-d48w1024-osp480"])
def test_every_command_opens_a_published_folder(
    name: str, published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generate, bench, encode with its autoencoder and its text encoder, and train from it."""
    model, video = published[name], name.endswith("osp480")
    monkeypatch.chdir(tmp_path)

    def nova(*arguments: object) -> None:
        assert cli.main([str(argument) for argument in arguments]) == 0

    steps = ("--sets", 2, "--diffusion-steps", 2)
    output = Path("out.mp4" if video else "out.png")
    nova("generate", "a red whale", "--model", model, "-o", output, "--num-frames", 5 if video else 1, *steps)
    assert output.is_file()

    bench = ("bench", "sample", "--config", model, "--repeats", 1, *steps, "--device", "cpu", "-o", "sample.json")
    nova(*bench, *(("--frames", 5) if video else ()))
    assert '"error": null' in Path("sample.json").read_text()
    nova(*("bench", "train", "--config", model, "--batch", 1, "--steps", 1, "--warm-up", 1, "--device", "cpu"))

    Path("source").mkdir()
    frames = np.random.default_rng(0).integers(0, 256, (9, 64, 96, 3), dtype=np.uint8)
    for number in range(4):
        if video:
            write_media(frames, f"source/{number}.mp4", 12, {})
        else:
            Image.fromarray(frames[number, :, :64]).save(f"source/{number}.png")
        Path(f"source/{number}.txt").write_text("a red whale near the old bridge")
    text = model / "text_encoder"  # of such a folder, named elsewhere
    nova("encode", "source", "-o", "data", "--model", model, "--text-encoder", text, "--no-ray", "--device", "cpu")

    Path("recipe.toml").write_text(
        f'kind = "transformer"\nsteps = 2\ndevice = "cpu"\noutput = "run"\ninit = "{model}"\nscheduler = "init"\n'
        '[dataset]\npath = "data"\nbatch = 2\nworkers = 0\nheld_out = 0.0\n[log]\nevery = 1\nvalidate_every = 0\n'
    )
    nova("train", "recipe.toml")
    recipe = Path("recipe.toml").read_text()
    Path("recipe.toml").write_text(recipe.replace('output = "run"', f'output = "other"\ntext_encoder = "{text}"'))
    nova("train", "recipe.toml")
    trained = NovaPipeline.from_pretrained("run/model")
    trained.set_progress_bar_config(disable=True)
    assert len(trained("a red whale", num_frames=1, **QUICK).images) == 1


@pytest.mark.parametrize("folder", ["published-flow", "published-video"])
def test_sentences_give_the_recorded_result(folder: str) -> None:
    """From the text encoder's features to latents and pixels; one prompt is longer than the model reads."""
    case = json.loads((CONFORMANCE / folder / "cases.json").read_text())["cases"]["generate_text"]
    tensors = load_file(CONFORMANCE / folder / "generate_text.safetensors")
    pipe = NovaPipeline.from_pretrained(CONFORMANCE / folder)
    pipe.set_progress_bar_config(disable=True)
    features, lengths = encode_batch(
        pipe.tokenizer, pipe.text_encoder, [*case["prompt"], case["negative_prompt"]], 10, torch.device("cpu")
    )
    recorded = [*(tensors[f"prompt_embeds.{i}"] for i in range(2)), tensors["negative_prompt_embeds.0"]]
    for row, length, expected in zip(features, lengths, recorded, strict=True):
        torch.testing.assert_close(row[:length], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    frames = 4 * (case.get("max_latent_length", 1) - 1) + 1
    names = ("prompt", "negative_prompt", "num_inference_steps", "num_diffusion_steps", "guidance_scale")
    request = {name: case[name] for name in names}

    def made(output_type: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(case["seed"])
        result = pipe(**request, num_frames=frames, generator=generator, output_type=output_type)
        return result.images if result.frames is None else result.frames

    latents = tensors["latents"]
    torch.testing.assert_close(made("latent"), latents, rtol=0, atol=1e-4 * float(latents.abs().max()))
    if "pixels" in tensors:
        pixels = (tensors["pixels"] / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(made("pt"), pixels, rtol=0, atol=1e-4)
