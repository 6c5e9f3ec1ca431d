"""Low-rank adapters (LoRA): two thin matrices beside a linear layer, W x + scale * alpha / rank * B A x.

peft computes them and diffusers' `PeftAdapterMixin`, which the model has, adds, switches and removes them. Here is what
both leave open: how adapters are stored and checked against a model, and what of them tensors alone do not tell.

An adapter's names are those of the model's layers: `video_encoder.blocks.0.attn.qkv.lora_A.weight` (rank, inputs) and
`lora_B.weight` (outputs, rank). In files they have "transformer." in front, as diffusers' have.
"""

import json
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nova_video.common.errors import InputError
from nova_video.common.extras import install_command
from nova_video.io.files import make_readable
from nova_video.model.transformer import NOVATransformer3DModel

LORA_FILE = "pytorch_lora_weights.safetensors"
LORA_PREFIX = "transformer."
LORA_METADATA = "lora_adapter_metadata"
"""Key of a file's metadata with peft's settings as JSON, each with the prefix in front of its name."""
LORA_BASE = "base_model_name_or_path"
"""One of these settings: the checkpoint that an adapter was trained beside."""
LORA_TARGETS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
"""Attention and MLP of every block of both encoders. The denoiser's are proj.fc1 and proj.fc2."""
SUFFIXES = (".lora_A.weight", ".lora_B.weight")


def require_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError:
        raise InputError(f"adapters need peft: expected it to be installed ({install_command('train')})") from None


def adapter_names(model: NOVATransformer3DModel) -> list[str]:
    """Of the adapters that the model has now, used or not."""
    return list(getattr(model, "peft_config", None) or {})


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and layers that have adapters: peft's, each around the layer that was there."""
    return ((name, module) for name, module in model.named_modules() if "merged_adapters" in vars(module))


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters in use."""
    return next((list(layer.active_adapters) for _, layer in adapted_layers(model)), [])


def adapter_state(model: nn.Module) -> Hashable:
    """What of the adapters is no tensor: which are used, at what scale, and which are in the weights already.

    Numbers like these are fixed in recorded or compiled work; where they change it has to be made anew.
    """
    return tuple(
        (tuple(layer.active_adapters), tuple(layer.merged_adapters), layer.disable_adapters, *layer.scaling.items())
        for _, layer in adapted_layers(model)
    )


# As tensors and files -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Adapter:
    """What a file holds."""

    tensors: dict[str, Tensor]
    """By names without the prefix."""
    settings: dict[str, Any] | None
    """peft's; None: not told, and then alpha is the rank."""


def lora_state_dict(
    model: NOVATransformer3DModel, name: str = "default", state: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors of the adapter `name`. `state`: the whole state dict, where the model has only parts."""
    from peft import get_peft_model_state_dict

    found: dict[str, Tensor] = get_peft_model_state_dict(
        model, state_dict=state, adapter_name=name, save_embedding_layers=False
    )
    return found


def load_lora_state(model: NOVATransformer3DModel, tensors: Mapping[str, Tensor], name: str = "default") -> None:
    """Into an adapter that the model has."""
    from peft import set_peft_model_state_dict

    expected = {key: tuple(value.shape) for key, value in lora_state_dict(model, name).items()}
    for key in [*expected, *tensors]:
        was = tuple(tensors[key].shape) if key in tensors else "nothing"
        if was != expected.get(key, "nothing"):
            raise InputError(f"adapter: {key} is {was}: expected {expected.get(key, 'nothing')}")
    set_peft_model_state_dict(model, dict(tensors), adapter_name=name)


def save_lora(
    model: NOVATransformer3DModel,
    folder: Path,
    name: str = "default",
    state: Mapping[str, Tensor] | None = None,
    base: str | None = None,
) -> Path:
    """Write pytorch_lora_weights.safetensors, which `NovaPipeline.load_lora_weights` opens; `state` as above, `base`
    names the checkpoint that the model is of."""
    tensors = {
        LORA_PREFIX + key: value.detach().cpu().contiguous()
        for key, value in lora_state_dict(model, name, state).items()
    }
    settings = {
        LORA_PREFIX + key: sorted(value) if isinstance(value, set) else value
        for key, value in model.peft_config[name].to_dict().items()
    }
    if base is not None:
        settings[f"{LORA_PREFIX}{LORA_BASE}"] = base
    metadata = {"format": "pt", LORA_METADATA: json.dumps(settings, indent=2, sort_keys=True, default=str)}
    folder.mkdir(parents=True, exist_ok=True)
    path, aside = folder / LORA_FILE, folder / f".{LORA_FILE}"
    save_file(tensors, aside, metadata)
    make_readable(aside)
    aside.replace(path)
    return path


def check_adapter(model: NOVATransformer3DModel, adapter: Adapter, where: str) -> None:
    """Raises InputError, with the first tensor that is not for this model."""
    for key, tensor in adapter.tensors.items():
        suffix = next((suffix for suffix in SUFFIXES if key.endswith(suffix)), None)
        if suffix is None:
            raise InputError(f"{where}: has {key}: expected names that end with {' or '.join(SUFFIXES)}")
        layer_name = key.removesuffix(suffix)
        layer = _linear(model, layer_name)
        if layer is None:
            raise InputError(f"{where} is for another model: it has {key}: expected a linear layer of this model")
        partner = adapter.tensors.get(layer_name + SUFFIXES[suffix == SUFFIXES[0]])
        if partner is None:
            raise InputError(f"{where}: has {key} alone: expected lora_A and lora_B of each layer")
        outputs, inputs = layer.weight.shape
        rank = partner.shape[0] if suffix == SUFFIXES[1] else tensor.shape[0]
        expected = (rank, inputs) if suffix == SUFFIXES[0] else (outputs, rank)
        if tuple(tensor.shape) != expected:
            raise InputError(
                f"{where} is for another model: {key} is {tuple(tensor.shape)}: expected {expected} beside this "
                f"model's {layer_name} {(outputs, inputs)}"
            )


def _linear(model: nn.Module, name: str) -> nn.Linear | None:
    """The linear layer of a name, also where adapters are around it."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    module = getattr(module, "base_layer", module)
    return module if isinstance(module, nn.Linear) else None


# Into the weights and out again ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Unfused:
    """What a layer was before adapters were added to its weight."""

    weight: Tensor
    """On the processor."""
    scaling: dict[str, float]


@torch.no_grad()
def fuse(
    model: NOVATransformer3DModel, scale: float = 1.0, names: list[str] | None = None, safe: bool = False
) -> dict[str, Unfused]:
    """Add adapters, the active ones or those named, to the weights they stand beside; returns what was there."""
    before = {
        name: Unfused(layer.base_layer.weight.detach().to("cpu", copy=True), dict(layer.scaling))
        for name, layer in adapted_layers(model)
    }
    model.fuse_lora(scale, safe_fusing=safe, adapter_names=names)
    return before


@torch.no_grad()
def unfuse(model: NOVATransformer3DModel, before: Mapping[str, Unfused]) -> None:
    """The weights as they were to the last bit, beside their adapters again."""
    model.unfuse_lora()
    for name, layer in adapted_layers(model):
        layer.base_layer.weight.copy_(before[name].weight)
        layer.scaling.update(before[name].scaling)


def merge(model: NOVATransformer3DModel) -> None:
    """Active adapters become part of the weights for good, and no adapter is left: the model is a plain one again."""
    layers = [layer for _, layer in adapted_layers(model)]
    if any(set(layer.active_adapters) - set(layer.merged_adapters) for layer in layers):
        with torch.no_grad():
            model.fuse_lora()
    if layers:
        model.unload_lora()
