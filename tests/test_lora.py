"""Adapters: trained beside frozen weights, stored, opened by the pipeline, and the same result wherever they are."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nova_video import NovaPipeline
from nova_video.cli import main as cli
from nova_video.common.errors import InputError
from nova_video.io import media
from nova_video.model import NOVATransformer3DModel
from nova_video.model.lora import (
    LORA_TARGETS,
    adapter_state,
    add_lora,
    fuse,
    load_lora_state,
    lora_state_dict,
    merge,
    unfuse,
)
from nova_video.pipeline.lora_files import LORA_FILE, LORA_METADATA, save_lora
from nova_video.sampling.engine import Engine, PlainEngine
from nova_video.sampling.guidance import Guidance
from test_cli import interrupt_at
from test_sampling import embeds, generate_sets, make_state, open_scheduler, request_scheduler

DENOISER = ("proj.fc1", "proj.fc2", "norm1.proj", "time_cond_embed.condition_proj.fc1")
QUICK = {"num_inference_steps": 2, "num_diffusion_steps": 2, "num_frames": 5, "output_type": "latent"}


def new_model(checkpoint: Path) -> NOVATransformer3DModel:
    model: NOVATransformer3DModel = NOVATransformer3DModel.from_pretrained(checkpoint / "transformer")
    return model.eval()


def fill_in(model: NOVATransformer3DModel, seed: int = 0, std: float = 0.3) -> None:
    """As if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    state = {key: std * torch.randn(x.shape, generator=generator) for key, x in lora_state_dict(model).items()}
    load_lora_state(model, state)


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter of all blocks, the denoiser's too."""
    model = new_model(tiny_checkpoint)
    add_lora(model, rank=4, alpha=2.0, targets=LORA_TARGETS + DENOISER)
    fill_in(model)
    return save_lora(model, tmp_path_factory.mktemp("adapter")).parent


@pytest.fixture
def pipe(tiny_checkpoint: Path) -> NovaPipeline:
    pipe = NovaPipeline.from_pretrained(tiny_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: NovaPipeline, compile: bool | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe("a whale", generator=generator, guidance_scale=3.0, compile=compile, **QUICK).frames


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert torch.allclose(got, expected, atol=tolerance, rtol=tolerance), (got - expected).abs().max()


# Training ----------------------------------------------------------------------------------------------------------


def test_an_adapter_begins_at_nothing_and_is_all_that_learns(tiny_checkpoint: Path) -> None:
    model, base = new_model(tiny_checkpoint), new_model(tiny_checkpoint)
    trained = add_lora(model, rank=4)
    blocks = len(base.video_encoder.blocks) + len(base.image_encoder.blocks)
    assert len(trained) == 2 * len(LORA_TARGETS) * blocks
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained}
    assert {
        shape[0] for key, shape in ((k, v.shape) for k, v in lora_state_dict(model).items()) if "lora_A" in key
    } == {4}
    latents, positions = torch.randn(2, 4, 2, 8, 12), model.positions(2, (8, 12))
    condition = torch.randn(2, 7, model.width)
    with torch.no_grad():
        assert torch.equal(*(m.encode_frames(condition, latents, positions) for m in (model, base)))
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    losses = []
    for _ in range(5):
        loss = model.encode_frames(condition, latents, positions).sub(1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.unload_lora()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in base.state_dict().items())


def test_stored_and_put_back(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model, other = new_model(tiny_checkpoint), new_model(tiny_checkpoint)
    for each in (model, other):
        add_lora(each, rank=2, alpha=8.0, targets=("attn.qkv",))
    fill_in(model)
    path = save_lora(model, tmp_path / "new" / "folder")
    assert path.name == LORA_FILE
    assert [file.name for file in path.parent.iterdir()] == [LORA_FILE]
    stored = load_file(path)
    assert all(key.startswith("transformer.") and ".attn.qkv.lora_" in key for key in stored)
    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()[LORA_METADATA])
    assert (settings["transformer.r"], settings["transformer.lora_alpha"]) == (2, 8.0)
    load_lora_state(other, {key.removeprefix("transformer."): value for key, value in stored.items()})
    for key, value in lora_state_dict(model).items():
        assert torch.equal(value, lora_state_dict(other)[key])
    first = next(iter(lora_state_dict(model)))
    with pytest.raises(InputError, match=r"lora_A\.weight is \(3, 64\): expected \(2, 64\)|is \(3, "):
        load_lora_state(other, {**lora_state_dict(model), first: torch.zeros(3, 64)})
    with pytest.raises(InputError, match="is nothing: expected"):
        load_lora_state(other, {key: value for key, value in lora_state_dict(model).items() if key != first})
    whole = model.state_dict()  # as gathered from a model that is spread over processes
    assert torch.equal(lora_state_dict(model, state=whole)[first], stored["transformer." + first])


@pytest.mark.parametrize("target", ["attn.qvk", "patch_embed.proj", "attn", "qkv."])
def test_targets_are_linear_layers(tiny_checkpoint: Path, target: str) -> None:
    with pytest.raises(InputError, match=f"lora.targets has '{target}': expected how names of linear layers end"):
        add_lora(new_model(tiny_checkpoint), rank=4, targets=("mlp.fc1", target))


def test_a_rank_is_bounded_by_the_layers(tiny_checkpoint: Path) -> None:
    model = new_model(tiny_checkpoint)
    full = min(model.video_encoder.blocks[0].mlp.fc1.weight.shape)
    with pytest.raises(InputError, match=f"lora.rank is {full + 1}: expected at most {full}, the full rank of mlp.fc1"):
        add_lora(model, rank=full + 1, targets=("mlp.fc1",))


@torch.no_grad()
def test_fused_weights_come_back_to_the_last_bit(tiny_checkpoint: Path) -> None:
    model = new_model(tiny_checkpoint).bfloat16()
    add_lora(model, rank=4)
    fill_in(model)
    before, state = weights(model), adapter_state(model)
    kept = fuse(model, 0.7)
    name = "video_encoder.blocks.0.attn.qkv.base_layer.weight"
    assert not torch.equal(model.state_dict()[name], before[name])
    assert adapter_state(model) != state
    unfuse(model, kept)
    assert adapter_state(model) == state
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


# The pipeline ------------------------------------------------------------------------------------------------------


def test_loaded_fused_and_unloaded(pipe: NovaPipeline, adapter: Path) -> None:
    base, before = latents(pipe), weights(pipe.transformer)
    assert pipe.load_lora_weights(adapter, adapter_name="mine") == "mine"
    assert pipe.get_active_adapters() == ["mine"]
    adapted = latents(pipe)
    assert (adapted - base).abs().max() > 0.01
    pipe.fuse_lora()
    close(latents(pipe), adapted, 1e-5)
    pipe.unfuse_lora()
    assert torch.equal(latents(pipe), adapted)
    pipe.fuse_lora(lora_scale=0.5)
    half = latents(pipe)
    assert (half - adapted).abs().max() > 0.01
    pipe.unfuse_lora()
    pipe.set_adapters("mine", 0.5)
    close(latents(pipe), half, 1e-5)
    pipe.disable_lora()
    close(latents(pipe), base, 1e-5)
    pipe.enable_lora()
    pipe.unload_lora_weights()
    after = pipe.transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(latents(pipe), base)


def test_fused_for_good_is_a_plain_model(pipe: NovaPipeline, adapter: Path, tmp_path: Path) -> None:
    names = set(pipe.transformer.state_dict())
    pipe.load_lora_weights(adapter / LORA_FILE, scale=0.25)
    with pytest.raises(InputError, match=r"has adapters \(default_0\): expected them unloaded before it is saved"):
        pipe.save_pretrained(tmp_path / "not")
    beside = latents(pipe)
    pipe.fuse_lora()
    with pytest.raises(
        InputError, match=r"adapters are fused \(default_0\): expected unfuse_lora or unload_lora_weights"
    ):
        pipe.load_lora_weights(adapter)
    pipe.unload_lora_weights()
    assert set(pipe.transformer.state_dict()) == names
    pipe.save_pretrained(tmp_path / "whole")
    close(latents(NovaPipeline.from_pretrained(tmp_path / "whole")), beside, 1e-5)
    with pytest.raises(InputError, match="no adapter is fused"):
        pipe.unfuse_lora()
    with pytest.raises(InputError, match="no adapter is loaded"):
        pipe.fuse_lora()


def test_several_adapters(pipe: NovaPipeline, adapter: Path, tmp_path: Path) -> None:
    model = new_model(Path(pipe.config._name_or_path))
    add_lora(model, rank=2, targets=("mlp.fc2",))
    fill_in(model, 1)
    pipe.load_lora_weights(adapter, adapter_name="a")
    only = latents(pipe)
    pipe.load_lora_weights(save_lora(model, tmp_path), adapter_name="b")
    assert pipe.get_active_adapters() == ["b"]
    pipe.set_adapters(["a", "b"], [1.0, 0.5])
    both = latents(pipe)
    pipe.fuse_lora()
    assert pipe.fused_loras == {"a", "b"}
    close(latents(pipe), both, 1e-5)
    pipe.unfuse_lora()
    pipe.set_adapters("a")
    assert torch.equal(latents(pipe), only)
    again = pipe.save_lora_weights(tmp_path / "again", "b")
    stored = load_file(tmp_path / LORA_FILE)
    assert all(torch.equal(value, stored[key]) for key, value in load_file(again).items())
    with pytest.raises(InputError, match="adapter_name is 'a', which is loaded"):
        pipe.load_lora_weights(adapter, adapter_name="a")
    with pytest.raises(InputError, match="adapter_name is None: expected one of"):
        pipe.save_lora_weights(tmp_path)


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
FIRST = "transformer.video_encoder.blocks.0.attn.qkv.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: {k.replace("blocks.0", "blocks.40"): v for k, v in x.items()},
            "expected a linear layer of this model",
        ),
        (
            lambda x: x | {FIRST: torch.zeros(4, 999)},
            r"qkv.lora_A.weight is \(4, 999\): expected \(4, 64\) beside this",
        ),
        (lambda x: {k: v for k, v in x.items() if k != FIRST}, "expected lora_A and lora_B of each layer"),
        (lambda x: x | {"transformer.head.diff": torch.zeros(1)}, "is whole differences of weights"),
        (lambda x: x | {"transformer.head.weight": torch.zeros(1)}, r"expected names such as transformer\."),
        (lambda x: {}, "has no tensors: expected"),
    ],
    ids=["layer", "shape", "half", "kind", "name", "empty"],
)
def test_an_adapter_of_another_model_is_refused(
    pipe: NovaPipeline, adapter: Path, tmp_path: Path, change: Change, message: str
) -> None:
    before = set(pipe.transformer.state_dict())
    tensors = change(load_file(adapter / LORA_FILE))
    save_file(tensors, tmp_path / "wrong.safetensors")
    with pytest.raises(InputError, match=message) as error:
        pipe.load_lora_weights(tmp_path / "wrong.safetensors")
    assert "wrong.safetensors" in str(error.value)
    assert "\n" not in str(error.value)
    assert set(pipe.transformer.state_dict()) == before


LAYERS = ("image_encoder.blocks.0.attn.proj", "video_encoder.blocks.1.mlp.fc1")
RANKS, ALPHA = (4, 2), 3.0


def halves(pipe: NovaPipeline) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of two layers, of ranks 4 and 2."""
    generator = torch.Generator().manual_seed(5)
    made = {}
    for layer, rank in zip(LAYERS, RANKS, strict=True):
        outputs, inputs = pipe.transformer.get_submodule(layer).weight.shape
        made[layer] = tuple(torch.randn(*shape, generator=generator) for shape in ((rank, inputs), (outputs, rank)))
    return made


PEFT, KOHYA, OLD = ("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up")
FORMS = {  # what stands before a layer's name, and names of its halves
    "diffusers": ("transformer.", PEFT),
    "diffusers of old": ("transformer.", OLD),
    "no prefix": ("", PEFT),
    "comfy": ("diffusion_model.", PEFT),
    "comfy, down and up": ("diffusion_model.", KOHYA),
    "comfy, whole": ("model.diffusion_model.", PEFT),
    "comfy by peft": ("base_model.model.diffusion_model.", PEFT),
    "kohya": ("lora_unet_", KOHYA),
    "peft, named": ("base_model.model.", ("lora_A.default", "lora_B.default")),
}


def check_merged(pipe: NovaPipeline, place: Path, scales: Sequence[float]) -> None:
    """Fused, each layer is W + scale * B A; taken out again it is what it was."""
    weights = {layer: pipe.transformer.get_submodule(layer).weight.detach().clone() for layer in LAYERS}
    expected = {
        layer: weights[layer] + scale * b @ a
        for (layer, (a, b)), scale in zip(halves(pipe).items(), scales, strict=True)
    }
    pipe.load_lora_weights(place)
    pipe.fuse_lora()
    for layer in LAYERS:
        torch.testing.assert_close(pipe.transformer.get_submodule(layer).base_layer.weight, expected[layer])
    pipe.unfuse_lora()
    pipe.unload_lora_weights()


@pytest.mark.parametrize("with_alpha", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_files_of_other_tools(pipe: NovaPipeline, tmp_path: Path, form: str, with_alpha: bool) -> None:
    (prefix, (down, up)), tensors = FORMS[form], {}
    for layer, (a, b) in halves(pipe).items():
        name = prefix + (layer.replace(".", "_") if form == "kohya" else layer)
        tensors |= {f"{name}.{down}.weight": a, f"{name}.{up}.weight": b}
        if with_alpha:
            tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, tmp_path / "adapter.safetensors")
    check_merged(pipe, tmp_path / "adapter.safetensors", [ALPHA / rank if with_alpha else 1.0 for rank in RANKS])


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({"lora_alpha": 6, "r": 4, "rank_pattern": {"mlp.fc1": 2}}, [6 / 4, 6 / 2]),
        ({"lora_alpha": 6, "alpha_pattern": {"blocks.1.mlp.fc1": 1}}, [6 / 4, 1 / 2]),
        ({"lora_alpha": 6, "use_rslora": True}, [6 / 4**0.5, 6 / 2**0.5]),
    ],
)
def test_folders_of_peft(pipe: NovaPipeline, tmp_path: Path, config: dict[str, Any], scales: list[float]) -> None:
    tensors = {
        f"base_model.model.{layer}.lora_{half}.weight": tensor
        for layer, both in halves(pipe).items()
        for half, tensor in zip("AB", both, strict=True)
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    check_merged(pipe, tmp_path, scales)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("transformer.{}.lora_magnitude_vector", "DoRA"),
        ("lora_unet_{}.dora_scale", "DoRA"),
        ("lycoris_{}.lokr_w1", "LoKr"),
        ("lora_unet_{}.hada_w1_a", "LoHa"),
        ("lora_unet_{}.oft_blocks", "OFT"),
        ("lora_unet_{}.lora_mid.weight", "LoCon with a Tucker core"),
        ("lora_te_text_model_layer.lora_down.weight", "LoRA of a text encoder"),
        ("transformer.{}.lora_B.bias", "LoRA with biases"),
        ("diffusion_model.{}.diff", "whole differences of weights"),
        ("diffusion_model.{}.diff_b", "whole differences of weights"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(pipe: NovaPipeline, tmp_path: Path, key: str, kind: str) -> None:
    save_file({key.format(LAYERS[0]): torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=f"is {kind}, by its .*: expected LoRA of linear layers"):
        pipe.load_lora_weights(tmp_path / "other.safetensors")
    for config, message in ({"peft_type": "LOKR"}, "peft_type is 'LOKR'"), ({"use_dora": True}, "is DoRA"):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=message):
            pipe.load_lora_weights(tmp_path / "other.safetensors")


def test_what_is_no_adapter_is_refused(pipe: NovaPipeline, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the folder has no pytorch_lora_weights.safetensors"):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(InputError, match="'none.safetensors' not found"):
        pipe.load_lora_weights("none.safetensors")
    (tmp_path / LORA_FILE).write_bytes(b"short")
    with pytest.raises(InputError, match="expected a safetensors file with an adapter"):
        pipe.load_lora_weights(tmp_path)
    tensors = load_file(adapter / LORA_FILE)
    name = next(iter(tensors))
    save_file(tensors | {name: torch.full_like(tensors[name], float("nan"))}, tmp_path / LORA_FILE)
    with pytest.raises(InputError, match=f"{name} has values that are not finite: expected finite weights"):
        pipe.load_lora_weights(tmp_path)
    settings = {"transformer.r": 4, "transformer.unheard": 1, "transformer.target_modules": ["attn.qkv"]}
    save_file(tensors, tmp_path / LORA_FILE, {LORA_METADATA: json.dumps(settings)})
    with pytest.raises(InputError, match="no LoRA that peft can make: .*unheard"):
        pipe.load_lora_weights(tmp_path)
    for told, message in (("[1]", "is list: expected a JSON object"), ('{"r": 4}', "has no target_modules")):
        save_file(tensors, tmp_path / LORA_FILE, {LORA_METADATA: told})
        with pytest.raises(InputError, match=message):
            pipe.load_lora_weights(tmp_path)
    for patterns in ({"rank_pattern": [1]}, {"alpha_pattern": {"(": 2}}):
        told = json.dumps({"r": 4, "target_modules": ["attn.qkv"], **patterns})
        save_file(tensors, tmp_path / LORA_FILE, {LORA_METADATA: told})
        with pytest.raises(InputError, match="no LoRA that peft can make: ") as error:
            pipe.load_lora_weights(tmp_path)
        assert "\n" not in str(error.value)
    save_file({key: value.long() for key, value in tensors.items()}, tmp_path / LORA_FILE)
    with pytest.raises(InputError, match="is torch.int64: expected floating point values"):
        pipe.load_lora_weights(tmp_path)
    shutil.copy(adapter / LORA_FILE, tmp_path / "named.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name="named.safetensors")
    (tmp_path / LORA_FILE).rename(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="but named.safetensors, other.safetensors: expected weight_name"):
        pipe.load_lora_weights(tmp_path)
    (tmp_path / "other.safetensors").unlink()
    pipe.load_lora_weights(tmp_path.parent, subfolder=tmp_path.name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\]: expected a number by the name"),
        ({"rank_pattern": "x"}, "rank_pattern is 'x': expected"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern has a name that is no pattern"),
        (torch.ones(2), r"\.alpha has 2 values: expected one"),
    ],
)
def test_settings_of_adapters_that_are_wrong(pipe: NovaPipeline, tmp_path: Path, change: Any, message: str) -> None:
    a, b = halves(pipe)[LAYERS[0]]
    tensors = {f"{LAYERS[0]}.lora_A.weight": a, f"{LAYERS[0]}.lora_B.weight": b}
    if isinstance(change, dict):
        (tmp_path / "adapter_config.json").write_text(json.dumps(change))
    else:
        tensors[f"{LAYERS[0]}.alpha"] = change
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=message):
        pipe.load_lora_weights(tmp_path)


def test_adapters_in_8_bit_floats(pipe: NovaPipeline, tmp_path: Path) -> None:
    tensors = {
        f"{layer}.lora_{half}.weight": tensor.to(torch.float8_e4m3fn)
        for layer, both in halves(pipe).items()
        for half, tensor in zip("AB", both, strict=True)
    }
    save_file(tensors, tmp_path / LORA_FILE)
    pipe.load_lora_weights(tmp_path)
    found = lora_state_dict(pipe.transformer, "default_0")
    assert all(torch.equal(found[key], value.float()) for key, value in tensors.items())


def test_keywords_of_adapters(pipe: NovaPipeline, adapter: Path, tmp_path: Path) -> None:
    """Those of diffusers that change nothing are taken, others refused."""
    harmless: dict[str, Any] = {"use_safetensors": True, "low_cpu_mem_usage": True, "local_files_only": True}
    pipe.load_lora_weights(adapter, token=None, hotswap=False, **harmless)
    for call, message in (
        (lambda: pipe.load_lora_weights({}), "pretrained_model_name_or_path is dict: expected a file"),
        (lambda: pipe.load_lora_weights(adapter, hotswap=True), "hotswap is no argument.*: expected unload_lora_w"),
        (lambda: pipe.load_lora_weights(adapter, weigth_name="x"), "expected weight_name"),
        (lambda: pipe.save_lora_weights(tmp_path, transformer_lora_layers={}), "expected adapter_name"),
        (lambda: pipe.save_lora_weights(tmp_path, {}), "adapter_name is dict: expected one of"),
    ):
        with pytest.raises(InputError, match=message):
            call()


# Sampling ----------------------------------------------------------------------------------------------------------


def adapted(checkpoint: Path) -> NOVATransformer3DModel:
    model = new_model(checkpoint)
    add_lora(model, rank=4, targets=LORA_TARGETS + DENOISER)
    fill_in(model)
    return model.double()  # so that what differs is more than rounding


@torch.no_grad()
def sample(model: NOVATransformer3DModel, engine: Engine) -> Tensor:
    state = make_state(model, embeds(), Guidance(4.0), frames=2, sets=3)
    for _ in generate_sets(model, request_scheduler(open_scheduler("text-to-video"), None), state, engine):
        pass
    return state.latents()


def test_sampling_gives_what_merged_weights_give(tiny_checkpoint: Path) -> None:
    model, merged = adapted(tiny_checkpoint), adapted(tiny_checkpoint)
    merge(merged)
    assert set(merged.state_dict()) == set(new_model(tiny_checkpoint).state_dict())
    expected = sample(merged, PlainEngine(merged))
    close(sample(model, PlainEngine(model)), expected)
    base = new_model(tiny_checkpoint).double()
    assert (sample(base, PlainEngine(base)) - expected).abs().max() > 0.01


# The command line --------------------------------------------------------------------------------------------------


def test_the_command_takes_an_adapter(
    tiny_checkpoint: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(name: str, *flags: object) -> int:
        quick = f"--model {tiny_checkpoint} --seed 3 --sets 2 --diffusion-steps 1 --num-frames 5 --device cpu".split()
        return cli.main(["generate", "a whale", "-o", name, *quick, *map(str, flags)])

    assert run("base.png") == 0
    assert run("half.png", "--lora", adapter / LORA_FILE, "--lora-scale", 0.5) == 0
    assert run("full.png", "--lora", adapter) == 0
    base, half, full = (media.read_frames(f"{name}.png")[0].astype(int) for name in ("base", "half", "full"))
    assert abs(half - base).max() > 0
    assert abs(full - half).max() > 0
    assert "lora" not in media.read_metadata("base.png")
    assert media.read_metadata("half.png")["lora"] == str(adapter / LORA_FILE)
    assert media.read_metadata("half.png")["lora_scale"] == 0.5
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert run("again.png", "--lora", adapter, "--state", "kept.safetensors") == 130
    assert cli.main(["generate", "--resume", "kept.safetensors", "-o", "again.png", "--device", "cpu"]) == 0
    assert media.read_metadata("again.png")["lora"] == str(adapter)
    assert (media.read_frames("again.png")[0] == full).all()
    capsys.readouterr()
    assert run("x.png", "--lora-scale", 1) == 2
    assert capsys.readouterr().err.startswith("nova: got --lora-scale alone: expected --lora")
    assert run("x.png", "--lora", "nowhere.safetensors") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("nova: lora nowhere.safetensors not found")
