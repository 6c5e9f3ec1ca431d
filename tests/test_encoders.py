"""The encoding stages with networks: batches give what single clips give, and both stages travel between processes."""

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nova_video.autoencoders import AutoencoderKLCausalTiny
from nova_video.common.errors import InputError
from nova_video.data.encoders import (
    EncodeLatents,
    EncodeText,
    autoencoder_info,
    fingerprint,
)
from nova_video.io.checkpoints import PACKAGED_MODELS
from nova_video.text.features import encode_prompts
from nova_video.text.load import load_text_encoder

CONFORMANCE = Path(__file__).parent / "conformance"


@dataclass
class Clip:
    frames: np.ndarray


def make_clips(*sizes: tuple[int, int, int]) -> list[Clip]:
    random = np.random.default_rng(0)
    return [Clip(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with nothing but a small causal autoencoder."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    vae = AutoencoderKLCausalTiny(latent_channels=4, block_out_channels=(8, 8, 8), norm_num_groups=4)
    vae.save_pretrained(folder / "vae")
    return folder


def test_moments_are_the_autoencoders_whatever_the_batch(tiny: Path) -> None:
    clips = make_clips((5, 16, 24), (1, 16, 16), (5, 16, 24), (9, 16, 16), (5, 16, 24))
    stage = EncodeLatents(str(tiny), "cpu", batch=2)
    moments = stage(clips)
    vae = stage.load()
    for clip, made in zip(clips, moments, strict=True):
        pixels = torch.from_numpy(clip.frames / 127.5 - 1).float().permute(3, 0, 1, 2)[None]
        expected = vae.encode(pixels).latent_dist.parameters[0]
        assert made.shape == expected.shape == (8, (len(clip.frames) - 1) // 4 + 1, 2, clip.frames.shape[2] // 8)
        assert made.dtype == torch.bfloat16
        torch.testing.assert_close(made.float(), expected, rtol=2**-8, atol=1e-4)
    again = pickle.loads(pickle.dumps(stage))
    assert again._vae is None
    assert all(torch.equal(one, other) for one, other in zip(again(clips), moments, strict=True))
    assert stage([]) == []


def test_image_autoencoders_take_pictures_alone() -> None:
    model = str(CONFORMANCE / "text-to-image")
    info = autoencoder_info(model)
    assert info.temporal_stride == 1
    stage = EncodeLatents(model, "cpu")
    side = 4 * info.spatial_stride
    made = stage(make_clips((1, side, side)))
    assert made[0].shape == (2 * info.latent_channels, 1, 4, 4)
    with pytest.raises(InputError, match="takes pictures: expected clips of 1 frame, got 5"):
        stage(make_clips((5, side, side)))


def test_fingerprints_are_of_the_weights(tiny: Path, tmp_path: Path) -> None:
    info = autoencoder_info(str(tiny))
    assert (info.latent_channels, info.spatial_stride, info.temporal_stride) == (4, 8, 4)
    path = tiny / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    copy = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({f"x.{key}": value.half() for key, value in weights.items()}, copy)
    assert fingerprint(tmp_path) == info.fingerprint
    key = next(iter(weights))
    save_file(weights | {key: weights[key] + 0.01}, copy)
    assert fingerprint(tmp_path) != info.fingerprint
    assert fingerprint(PACKAGED_MODELS / "emoji" / "vae") != info.fingerprint


def test_text_features_are_of_caption_and_first_sentence(tiny_text_encoder: Path) -> None:
    captions = ["the whale", "a whale moving left. the apple staying still.", "the whale", "a blue apple."]
    stage = EncodeText(str(tiny_text_encoder), "cpu")
    made = stage(captions)
    expected = encode_prompts(*load_text_encoder(str(tiny_text_encoder)), [*captions, "a whale moving left."], 256)
    for features, row in zip(made, expected, strict=False):
        assert features.text.dtype == torch.float16
        assert features.text.shape == row.shape
        torch.testing.assert_close(features.text.float(), row, rtol=1e-3, atol=1e-3)
    assert [features.short is None for features in made] == [True, False, True, True]
    assert made[1].short is not None
    torch.testing.assert_close(made[1].short.float(), expected[-1], rtol=1e-3, atol=1e-3)
    again = pickle.loads(pickle.dumps(stage))
    assert again._encoder is None
    assert torch.equal(again(captions)[1].text, made[1].text)
    assert stage.width == 32
    assert EncodeText(str(tiny_text_encoder), "cpu", max_tokens=3)(captions)[1].text.shape == (3, 32)


def test_wrong_checkpoints_are_named(tiny_text_encoder: Path) -> None:
    with pytest.raises(InputError, match="has no vae/: expected a checkpoint with an autoencoder"):
        EncodeLatents(str(tiny_text_encoder), "cpu")(make_clips((1, 8, 8)))
    with pytest.raises(InputError, match="nowhere"):
        autoencoder_info("nowhere")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_to_rounding(tiny: Path, tiny_text_encoder: Path) -> None:
    clips = make_clips((5, 16, 24), (5, 16, 24), (1, 16, 16))
    for one, other in zip(EncodeLatents(str(tiny), "cuda")(clips), EncodeLatents(str(tiny), "cpu")(clips), strict=True):
        difference = (one.float() - other.float()).square().mean().sqrt()
        assert one.device.type == "cpu"
        assert difference < 0.05 * other.float().square().mean().sqrt()
    captions = ["a whale moving left. the apple."]
    one, other = (EncodeText(str(tiny_text_encoder), device)(captions)[0].text for device in ("cuda", "cpu"))
    torch.testing.assert_close(one.float(), other.float(), rtol=0.02, atol=0.02)
