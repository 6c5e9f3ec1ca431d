"""Loading: every component a checkpoint may have, and every way in which a folder can be wrong, named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nova_video import NovaPipeline
from nova_video.autoencoders import AutoencoderKLOpenSora
from nova_video.common.errors import InputError
from nova_video.io import checkpoints
from nova_video.io.checkpoints import resolve_checkpoint
from nova_video.pipeline.loading import load_autoencoder, load_scheduler, load_transformer, read_text_encoder

CONFORMANCE = Path(__file__).parent / "conformance"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(CONFORMANCE / "text-to-image", tmp_path / "copy")
    return tmp_path / "copy"


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_config(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# Where a checkpoint is ------------------------------------------------------------------------------------------------


def test_folders_and_packaged_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert resolve_checkpoint(str(CONFORMANCE)) == CONFORMANCE
    assert resolve_checkpoint(CONFORMANCE) == CONFORMANCE
    (tmp_path / "emoji").mkdir()
    monkeypatch.setattr(checkpoints, "PACKAGED_MODELS", tmp_path)
    assert resolve_checkpoint("emoji") == tmp_path / "emoji"


@pytest.mark.parametrize("name", ["no-such-model", "./nowhere", "/nowhere/at/all", "a/b/c", Path("some/folder")])
def test_missing_model(name: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="not found: expected") as caught:
        resolve_checkpoint(name)
    assert str(name) in str(caught.value)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="is a file"):
        resolve_checkpoint(tmp_path / "model.safetensors")


def test_the_hub_is_asked_for_safe_files_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, object] = {}

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(checkpoints, "snapshot_download", download)
    assert resolve_checkpoint("BAAI/nova-d48w1024-osp480", revision="main") == tmp_path
    assert (asked["name"], asked["revision"]) == ("BAAI/nova-d48w1024-osp480", "main")
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list)
    assert "transformer/*.safetensors" in patterns
    assert all(p.endswith((".json", ".safetensors", ".txt", ".model")) for p in patterns)


def test_the_hub_without_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **options: object) -> str:
        raise LocalEntryNotFoundError("no network\nand a long story")

    monkeypatch.setattr(checkpoints, "snapshot_download", download)
    with pytest.raises(InputError, match="'BAAI/nothing'.*no network") as caught:
        resolve_checkpoint("BAAI/nothing")
    assert "\n" not in str(caught.value)


# Parts that fit -------------------------------------------------------------------------------------------------------


def test_dtype_as_in_diffusers() -> None:
    stored = load_file(CONFORMANCE / "rotary-flow" / "transformer" / WEIGHTS)
    model = load_transformer(CONFORMANCE / "rotary-flow")
    assert model.dtype == torch.float32  # of float16 weights
    assert not model.training
    assert all(torch.equal(value, stored[key].float()) for key, value in model.state_dict().items())
    assert load_transformer(CONFORMANCE / "rotary-flow", torch.bfloat16).dtype == torch.bfloat16


def test_components_by_their_class_names() -> None:
    assert isinstance(load_autoencoder(CONFORMANCE / "text-to-image"), AutoencoderKL)
    assert isinstance(load_autoencoder(CONFORMANCE / "text-to-video"), AutoencoderKLOpenSora)
    assert load_autoencoder(CONFORMANCE / "rotary-flow") is None
    assert isinstance(load_scheduler(CONFORMANCE / "text-to-image"), DDPMScheduler)
    flow = load_scheduler(CONFORMANCE / "rotary-flow")
    assert isinstance(flow, FlowMatchEulerDiscreteScheduler)
    assert flow.shift == 3.0


def test_text_parts(tiny_checkpoint: Path) -> None:
    pipe = NovaPipeline.from_pretrained(tiny_checkpoint)
    assert pipe.text_encoder.config.hidden_size == 32
    assert pipe.tokenizer("a whale")["input_ids"]
    bare = NovaPipeline.from_pretrained(CONFORMANCE / "text-to-image")
    assert (bare.text_encoder, bare.tokenizer) == (None, None)


@pytest.mark.parametrize("name", ["AutoencoderKLPublished", "AutoencoderKLOpenSora", None])
@pytest.mark.parametrize(("model", "cls"), [("text-to-image", AutoencoderKL), ("text-to-video", AutoencoderKLOpenSora)])
def test_an_autoencoder_is_known_by_its_weights(model: str, cls: type, name: str | None, tmp_path: Path) -> None:
    shutil.copytree(CONFORMANCE / model / "vae", tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text()) | {"_class_name": name}
    (tmp_path / "vae" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    assert type(load_autoencoder(tmp_path)) is cls


def test_sharded_weights(checkpoint: Path) -> None:
    folder = checkpoint / "transformer"
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    keys = sorted(tensors)
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = [keys[: len(keys) // 2], keys[len(keys) // 2 :]]
    for name, half in zip(names, halves, strict=True):
        save_file({key: tensors[key] for key in half}, folder / name, metadata={"format": "pt"})
    weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    model = load_transformer(checkpoint)
    assert all(torch.equal(value, tensors[key].float()) for key, value in model.state_dict().items())
    (folder / names[1]).unlink()
    with pytest.raises(InputError, match=f"{names[1]}: not found"):
        load_transformer(checkpoint)


def test_half_precision_variant(checkpoint: Path) -> None:
    folder = checkpoint / "transformer"
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    assert load_transformer(checkpoint).dtype == torch.float32


def test_old_names_of_the_image_autoencoder_s_attention(checkpoint: Path) -> None:
    current = load_autoencoder(checkpoint)
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def rename(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            for new, name in old.items():
                if new in key:
                    tensors[key.replace(new, name)] = tensors.pop(key)

    rewrite(checkpoint / "vae" / WEIGHTS, rename)
    assert any(".query." in key for key in load_file(checkpoint / "vae" / WEIGHTS))
    renamed = load_autoencoder(checkpoint)
    assert current is not None
    assert renamed is not None
    assert all(torch.equal(value, current.state_dict()[key]) for key, value in renamed.state_dict().items())


# Parts from elsewhere -------------------------------------------------------------------------------------------------


def test_parts_are_given_as_they_are() -> None:
    """Modules, as in diffusers: the base needs no part of that name, and None leaves an optional one out."""
    base = CONFORMANCE / "text-to-image"
    vae, transformer = load_autoencoder(base), load_transformer(base, torch.bfloat16)
    flow = FlowMatchEulerDiscreteScheduler(shift=2.0)
    pipe = NovaPipeline.from_pretrained(base, transformer=transformer, vae=vae, scheduler=flow)
    assert (pipe.transformer, pipe.vae, pipe.scheduler) == (transformer, vae, flow)
    assert pipe.transformer.dtype == torch.bfloat16
    assert NovaPipeline.from_pretrained(base, vae=None).vae is None


def test_parts_are_given_by_their_place(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A checkpoint that has the part, or the folder of the part alone."""
    shutil.copytree(CONFORMANCE / "text-to-video" / "transformer", tmp_path / "trained")
    pipe = NovaPipeline.from_pretrained(
        CONFORMANCE / "text-to-image",
        transformer=tmp_path / "trained",
        vae=str(CONFORMANCE / "text-to-video"),
        scheduler=CONFORMANCE / "rotary-flow",
        text_encoder=tiny_checkpoint / "text_encoder",
        tokenizer=tiny_checkpoint,
    )
    assert pipe.transformer.has_motion
    assert isinstance(pipe.vae, AutoencoderKLOpenSora)
    assert pipe.scheduler.shift == 3.0
    assert len(pipe("a whale", num_frames=1, num_inference_steps=2, num_diffusion_steps=2).images) == 1


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"transformer": None}, "transformer is None: expected NOVATransformer3DModel"),
        ({"vae": torch.nn.Linear(1, 1)}, "vae is Linear: expected ModelMixin"),
        ({"scheduler": 3}, "scheduler is int: expected SchedulerMixin"),
        ({"transformer": "no-such-folder"}, "transformer: model 'no-such-folder' not found"),
        ({"vae": CONFORMANCE / "rotary-flow"}, r"rotary-flow/config\.json not found"),
    ],
)
def test_parts_that_are_none(parts: dict[str, object], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        NovaPipeline.from_pretrained(CONFORMANCE / "text-to-image", **parts)


def test_half_of_the_text_parts_is_refused(tiny_checkpoint: Path) -> None:
    """The other half is not taken from elsewhere without a word."""
    pipe = NovaPipeline.from_pretrained("emoji", tokenizer=tiny_checkpoint)
    with pytest.raises(InputError, match="has no text_encoder/"):
        pipe("a whale")


# Parts that do not ----------------------------------------------------------------------------------------------------


def test_missing_key(checkpoint: Path) -> None:
    rewrite(checkpoint / "transformer" / WEIGHTS, lambda t: t.pop("mask_embed.bos_token"))
    with pytest.raises(InputError, match=r"missing keys mask_embed\.bos_token"):
        load_transformer(checkpoint)


def test_extra_key(checkpoint: Path) -> None:
    rewrite(checkpoint / "transformer" / WEIGHTS, lambda t: t.update(surprise=torch.zeros(1)))
    with pytest.raises(InputError, match="extra keys surprise"):
        load_transformer(checkpoint)


def test_wrong_shape(checkpoint: Path) -> None:
    rewrite(checkpoint / "transformer" / WEIGHTS, lambda t: t.update({"mask_embed.bos_token": torch.zeros(1, 65)}))
    with pytest.raises(InputError, match=r"mask_embed\.bos_token \(1, 65\) \(expected \(1, 64\)\)"):
        load_transformer(checkpoint)


def test_many_problems_on_one_line(checkpoint: Path) -> None:
    edit_config(checkpoint / "transformer" / "config.json", arch=["vit_d3w64", "vit_d4w64", "mlp_d2w64"])
    with pytest.raises(InputError, match=r"missing keys video_encoder\.blocks\.2.* and \d+ more") as caught:
        load_transformer(checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 7, 1000, -1000])
def test_truncated_file(checkpoint: Path, size: int) -> None:
    path = checkpoint / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=f"{WEIGHTS}: corrupt or truncated"):
        load_transformer(checkpoint)


def test_corrupt_file(checkpoint: Path) -> None:
    (checkpoint / "vae" / WEIGHTS).write_bytes(b"not a safetensors file at all" * 40)
    with pytest.raises(InputError, match="corrupt"):
        load_autoencoder(checkpoint)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "last.ckpt"])
def test_pickle(checkpoint: Path, name: str) -> None:
    folder = checkpoint / "transformer"
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / name)
    with pytest.raises(InputError, match=f"only pickled weights, {name}: expected {WEIGHTS}"):
        load_transformer(checkpoint)


def test_pickled_text_encoder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint / "text_encoder", tmp_path / "text_encoder")
    tensors = load_file(tmp_path / "text_encoder" / "model.safetensors")
    (tmp_path / "text_encoder" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pickled weights, pytorch_model\.bin"):
        read_text_encoder(tmp_path / "text_encoder")


def test_text_encoder_s_keys(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint / "text_encoder", tmp_path / "text_encoder")
    path = tmp_path / "text_encoder" / "model.safetensors"
    rewrite(path, lambda t: t.update(surprise=torch.zeros(1)))
    with pytest.raises(InputError, match="extra keys surprise"):
        read_text_encoder(tmp_path / "text_encoder")
    rewrite(path, lambda t: (t.pop("surprise"), t.pop("embeddings.word_embeddings.weight")))
    with pytest.raises(InputError, match=r"embeddings\.word_embeddings\.weight"):
        read_text_encoder(tmp_path / "text_encoder")


def test_no_weights(checkpoint: Path) -> None:
    (checkpoint / "transformer" / WEIGHTS).unlink()
    with pytest.raises(InputError, match="has no weights"):
        load_transformer(checkpoint)


def test_no_config(checkpoint: Path) -> None:
    (checkpoint / "transformer" / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json not found"):
        load_transformer(checkpoint)


@pytest.mark.parametrize("text", ["{", "[]", "\xff", "[" * 100_000])
def test_unreadable_config(checkpoint: Path, text: str) -> None:
    (checkpoint / "transformer" / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"config\.json: "):
        load_transformer(checkpoint)


def test_config_of_another_class(checkpoint: Path) -> None:
    edit_config(checkpoint / "transformer" / "config.json", _class_name="UNet2DModel")
    with pytest.raises(InputError, match="'UNet2DModel': expected NOVATransformer3DModel"):
        load_transformer(checkpoint)
    edit_config(checkpoint / "vae" / "config.json", _class_name="UNet2DModel")
    rewrite(checkpoint / "vae" / WEIGHTS, lambda t: t.pop("encoder.conv_in.weight"))
    with pytest.raises(InputError, match="'UNet2DModel': expected AutoencoderKL or"):
        load_autoencoder(checkpoint)


def test_impossible_config(checkpoint: Path) -> None:
    edit_config(checkpoint / "transformer" / "config.json", arch=["vit_d2w64", "vit_d4w64", "tiny"])
    with pytest.raises(InputError, match="'tiny'"):
        load_transformer(checkpoint)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("image_dim", [0, -4, 4.5, "4", None, True, 10**400]),
        ("image_size", [0, -64, 100, [64], [64, 0], [64, 64, 64], "64", None, [64.0, 64.0]]),
        ("image_stride", [0, -8, None, "8"]),
        ("text_token_dim", [-1, "32", [32]]),
        ("text_token_len", [0, 513, None]),
        ("image_base_size", [4, [4], [4, -4], None, "44"]),
        ("video_base_size", [1, [1, 2], [0, 2, 2], None]),
        ("video_mixer_rank", [1.5, "4", 10**9]),
        ("rotary_pos_embed", ["no", 3, []]),
        ("arch", [None, "vit_d1w64", ["vit_d1w64"] * 2, ["vit_d0w64", "vit_d2w64", "mlp_d1w64"], [1, 2, 3]]),
        ("arch", [["vit_d1w0", "vit_d1w0", "mlp_d1w1"], ["vit_d1w72", "vit_d2w72", "mlp_d1w64"]]),
        ("arch", [["vit_d999999999w64", "vit_d2w64", "mlp_d1w64"], ["vit_d1w64", "vit_d2w64", f"mlp_d{'9' * 5000}w1"]]),
    ],
)
def test_values_that_no_transformer_can_have(checkpoint: Path, name: str, values: list[object]) -> None:
    for value in values:
        edit_config(checkpoint / "transformer" / "config.json", **{name: value})
        with pytest.raises(InputError, match=name.removesuffix("_size")) as caught:
            load_transformer(checkpoint)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [{}, {"text_token_dim": None}, {"text_token_dim": 0, "num_classes": 1000}])
def test_class_conditional_models_are_named(checkpoint: Path, config: dict[str, object]) -> None:
    def relabel(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith("text_embed.")]:
            tensors[key.replace("text_embed", "label_embed")] = tensors.pop(key)

    edit_config(checkpoint / "transformer" / "config.json", **config)
    rewrite(checkpoint / "transformer" / WEIGHTS, relabel)
    with pytest.raises(InputError, match="class-conditional"):
        load_transformer(checkpoint)


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("vae", {"latent_channels": -4}),
        ("vae", {"block_out_channels": 3}),
        ("vae", {"norm_num_groups": 0}),
        ("scheduler", {"beta_schedule": "none"}),
        ("scheduler", {"num_train_timesteps": -1}),
        ("scheduler", {"num_train_timesteps": 10**12}),
        ("scheduler", {"trained_betas": "none"}),
    ],
)
def test_values_that_a_library_does_not_take(checkpoint: Path, part: str, values: dict[str, object]) -> None:
    edit_config(next((checkpoint / part).glob("*config.json")), **values)
    with pytest.raises(InputError, match="config.json: ") as caught:
        (load_autoencoder if part == "vae" else load_scheduler)(checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["AutoencoderKL", "NoSuchScheduler", "os", None])
def test_scheduler_of_another_kind(checkpoint: Path, name: str | None) -> None:
    edit_config(checkpoint / "scheduler" / "scheduler_config.json", _class_name=name)
    with pytest.raises(InputError, match=f"_class_name is {name!r}: expected a diffusers scheduler"):
        load_scheduler(checkpoint)


@pytest.mark.parametrize("part", ["transformer", "scheduler"])
def test_missing_component(checkpoint: Path, part: str) -> None:
    shutil.rmtree(checkpoint / part)
    with pytest.raises(InputError, match=f"has no {part}/"):
        (load_transformer if part == "transformer" else load_scheduler)(checkpoint)


@pytest.mark.parametrize(("upcast", "expected"), [(True, torch.float32), (False, torch.float16)])
def test_image_autoencoders_that_overflow_stay_in_float32(upcast: bool, expected: torch.dtype, tmp_path: Path) -> None:
    shutil.copytree(CONFORMANCE / "text-to-image", tmp_path / "model")
    config = tmp_path / "model" / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": upcast}))
    vae = load_autoencoder(tmp_path / "model", torch.float16)
    assert vae.dtype == expected
