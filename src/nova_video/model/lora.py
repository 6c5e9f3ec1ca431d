"""Low-rank adapters (LoRA) of a model: two thin matrices beside a linear layer, W x + scale * alpha / rank * B A x.

peft computes them, and diffusers' `PeftAdapterMixin`, which the model has, adds, switches and removes them. This module
adds what both leave open. `pipeline/lora_files.py` reads and writes adapters.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nova_video.common.errors import InputError
from nova_video.common.extras import install_command
from nova_video.model.transformer import NOVATransformer3DModel

LORA_TARGETS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
"""Attention and MLP of every block of both encoders. The denoiser's are proj.fc1 and proj.fc2."""


def require_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError:
        raise InputError(f"adapters need peft: expected it to be installed ({install_command('train')})") from None


def adapter_names(model: NOVATransformer3DModel) -> list[str]:
    """Names of all adapters of the model, used or not."""
    return list(getattr(model, "peft_config", None) or {})


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and layers that have adapters: peft's layers, each around the model's own."""
    return ((name, module) for name, module in model.named_modules() if "merged_adapters" in vars(module))


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters in use."""
    return next((list(layer.active_adapters) for _, layer in adapted_layers(model)), [])


def adapter_state(model: nn.Module) -> Hashable:
    """Everything of the adapters that is not a tensor: which are used, their scales, and which are fused.

    Captured graphs and compiled code have these numbers fixed, and are made again when they change.
    """
    return tuple(
        (tuple(layer.active_adapters), tuple(layer.merged_adapters), layer.disable_adapters, *layer.scaling.items())
        for _, layer in adapted_layers(model)
    )


# Training -------------------------------------------------------------------------------------------------------------


def add_lora(
    model: NOVATransformer3DModel, rank: int, alpha: float | None = None, targets: Sequence[str] = ()
) -> list[nn.Parameter]:
    """Freeze the model and put an adapter beside each target layer; returns the parameters to train.

    `targets` are the ends of names of linear layers, by default `LORA_TARGETS`; alpha is by default the rank. A new
    adapter changes nothing, since its B is zero.
    """
    require_peft()
    from peft import LoraConfig

    targets = targets or LORA_TARGETS
    for target in targets:
        found = [module for name, module in model.named_modules() if f".{name}".endswith(f".{target}")]
        if not found or not all(isinstance(module, nn.Linear) for module in found):
            raise InputError(
                f"lora.targets has {target!r}: expected how names of linear layers end, such as {LORA_TARGETS[0]!r}"
            )
        full = min(min(module.in_features, module.out_features) for module in found)
        if rank > full:
            raise InputError(f"lora.rank is {rank}: expected at most {full}, the full rank of {target}")
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=list(targets)))
    return [
        parameter for _, layer in adapted_layers(model) for parameter in layer.parameters() if parameter.requires_grad
    ]


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
    """Put tensors into an adapter that the model has."""
    from peft import set_peft_model_state_dict

    expected = {key: tuple(value.shape) for key, value in lora_state_dict(model, name).items()}
    for key in [*expected, *tensors]:
        was = tuple(tensors[key].shape) if key in tensors else "nothing"
        if was != expected.get(key, "nothing"):
            raise InputError(f"adapter: {key} is {was}: expected {expected.get(key, 'nothing')}")
    set_peft_model_state_dict(model, dict(tensors), adapter_name=name)


# Into the weights and out again ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class UnfusedLayer:
    """A layer before adapters were added to its weight."""

    weight: Tensor
    """On the processor."""
    scaling: dict[str, float]


@torch.no_grad()
def fuse(
    model: NOVATransformer3DModel, scale: float = 1.0, names: list[str] | None = None, safe: bool = False
) -> dict[str, UnfusedLayer]:
    """Add adapters, the active ones or those named, to the weights; returns the weights before, for `unfuse`."""
    before = {
        name: UnfusedLayer(layer.base_layer.weight.detach().to("cpu", copy=True), dict(layer.scaling))
        for name, layer in adapted_layers(model)
    }
    model.fuse_lora(scale, safe_fusing=safe, adapter_names=names)
    return before


@torch.no_grad()
def unfuse(model: NOVATransformer3DModel, before: Mapping[str, UnfusedLayer]) -> None:
    """Put the weights of before `fuse` back, to the last bit. peft subtracts, which leaves rounding."""
    model.unfuse_lora()
    for name, layer in adapted_layers(model):
        layer.base_layer.weight.copy_(before[name].weight)
        layer.scaling.update(before[name].scaling)


def merge(model: NOVATransformer3DModel) -> None:
    """Add the active adapters to the weights for good and remove all adapters."""
    layers = [layer for _, layer in adapted_layers(model)]
    if any(set(layer.active_adapters) - set(layer.merged_adapters) for layer in layers):
        with torch.no_grad():
            model.fuse_lora()
    if layers:
        model.unload_lora()
