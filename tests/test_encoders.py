"""The encoding stages with networks: batches give what single clips give, and both stages travel between processes."""

import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nova_video.autoencoders import AutoencoderKLCausalTiny
from nova_video.common.errors import InputError
from nova_video.data import encoders as encoders_module
from nova_video.data.encoders import (
    EncodeLatents,
    EncodeText,
    autoencoder_info,
    check_text_parts,
    fingerprint,
    same_text_encoder,
    text_names,
)
from nova_video.io import checkpoints
from nova_video.io.checkpoints import PACKAGED_MODELS
from nova_video.text.encoders import encode_prompts, load_text_encoder

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
    assert again._parts is None
    assert torch.equal(again(captions)[1].text, made[1].text)
    assert stage.width == 32
    assert EncodeText(str(tiny_text_encoder), "cpu", max_tokens=3)(captions)[1].text.shape == (3, 32)


def test_text_encoders_are_found_by_checkpoint_or_name(tiny_checkpoint: Path, tiny: Path) -> None:
    assert text_names("emoji") == ("sentence-transformers/all-MiniLM-L6-v2", None)
    assert text_names("microsoft/phi-2") == ("microsoft/phi-2", None)
    assert text_names("all-MiniLM-L6-v2") == ("all-MiniLM-L6-v2", None)
    assert text_names(str(tiny_checkpoint)) == (
        str(tiny_checkpoint / "text_encoder"),
        str(tiny_checkpoint / "tokenizer"),
    )
    with pytest.raises(InputError, match="names no text encoder"):
        text_names(str(CONFORMANCE / "text-to-video"))


def test_a_checkpoint_of_the_hub_brings_its_text_encoder(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose name looks like that of a text encoder there, which has nothing of a checkpoint."""
    asked = []

    def download(name: str, local_files_only: bool, **options: object) -> str:
        asked.append(local_files_only)
        return str(tiny_checkpoint if name == "BAAI/nova" else tmp_path)

    monkeypatch.setattr(checkpoints, "snapshot_download", download)
    assert text_names("BAAI/nova") == text_names(str(tiny_checkpoint))
    assert text_names("microsoft/phi-2") == ("microsoft/phi-2", None)
    assert asked == [True, True]
    assert EncodeText("BAAI/nova", device="cpu").width == 32
    assert asked[2:] == [False]
    assert text_names("sentence-transformers/all-MiniLM-L6-v2")[0] == "sentence-transformers/all-MiniLM-L6-v2"
    assert len(asked) == 3


def test_text_encoders_are_the_same_by_their_weights(
    tiny_checkpoint: Path, tiny_text_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever they lie, in half precision and with or without a head."""
    monkeypatch.setattr(encoders_module, "try_to_load_from_cache", lambda name, file: None)
    for one, other, expected in [
        ("emoji", "sentence-transformers/all-MiniLM-L6-v2", True),
        ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2", True),  # in the same package
        ("a/phi-2", "b/phi-2", None),
        ("microsoft/phi-2", "google/t5-small", False),
        ("sentence-transformers/all-MiniLM-L12-v2", "emoji", False),  # of which one alone is here
        ("microsoft/phi-2", str(tiny_text_encoder), None),
        (str(tmp_path / "gone"), str(tiny_text_encoder), None),
        (str(tmp_path / "gone"), "microsoft/phi-2", None),
        (str(tiny_checkpoint), str(tiny_text_encoder), True),
        ("emoji", str(tiny_text_encoder), False),
    ]:
        assert same_text_encoder(one, other) is expected, (one, other)
        assert same_text_encoder(other, one) is expected
    weights = load_file(tiny_text_encoder / "model.safetensors")
    for name, changed, expected in [
        ("half", {f"bert.{key}": value.bfloat16() for key, value in weights.items()} | {"head": torch.ones(3)}, True),
        ("other", {key: value + 0.01 for key, value in weights.items()}, False),
        ("wide", {key: torch.cat([value, value]) for key, value in weights.items()}, False),
    ]:
        folder = tmp_path / name
        folder.mkdir()
        save_file(changed, folder / "model.safetensors")
        assert same_text_encoder(str(folder), str(tiny_checkpoint)) is expected, name
    (tmp_path / "half" / "model.safetensors").write_bytes(b"x")
    assert same_text_encoder(str(tmp_path / "half"), str(tiny_checkpoint)) is None


def test_text_encoders_are_checked_without_their_weights(
    tiny_checkpoint: Path, tiny_text_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of this machine, in its cache of the hub too; what is not in there is fetched."""
    loaded: list[str] = []
    monkeypatch.setattr(encoders_module, "load_text_model", lambda name, dtype: loaded.append(name))
    assert check_text_parts(str(tiny_checkpoint)) == check_text_parts(str(tiny_text_encoder)) == 32
    assert check_text_parts("emoji") == 384

    def damaged(change: Callable[[Path], object]) -> str:
        folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / f"{len(list(tmp_path.iterdir()))}"))
        change(folder)
        with pytest.raises(InputError) as error:
            check_text_parts(str(folder))
        return str(error.value).removeprefix(f"{folder}/")

    weights = "text_encoder/model.safetensors"
    assert damaged(lambda folder: (folder / weights).unlink()).startswith("text_encoder: has no weights")
    assert damaged(lambda folder: (folder / weights).write_bytes(b"x")).startswith(f"{weights}: corrupt or truncated")
    assert "cannot load the text encoder" in damaged(lambda folder: (folder / "text_encoder/config.json").unlink())
    assert "cannot load the tokenizer" in damaged(lambda folder: (folder / "tokenizer/tokenizer.json").unlink())
    with pytest.raises(InputError, match="there is no text encoder folder /gone"):
        check_text_parts("/gone")
    assert not loaded

    def not_there(*names: str, **options: object) -> str:
        raise OSError

    monkeypatch.setattr(checkpoints, "snapshot_download", not_there)  # it is no checkpoint
    monkeypatch.setattr(encoders_module, "text_width", lambda name: 32)
    monkeypatch.setattr(encoders_module, "load_tokenizer", lambda name: None)
    for has in (None, tiny_text_encoder / "config.json", tiny_checkpoint / "tokenizer" / "config.json"):
        monkeypatch.setattr(encoders_module, "try_to_load_from_cache", lambda name, file, has=has: has and str(has))
        assert check_text_parts("one/encoder") == 32
    assert loaded == ["one/encoder", "one/encoder"]  # nothing of it was here, or no weights


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
