"""Adapters in the names that other tools write, brought to the names that diffusers gives a model's own layers.

| written by | a layer's tensors |
|---|---|
| diffusers, nova-video | `transformer.<layer>.lora_A.weight`, `lora_B.weight`, perhaps `alpha` |
| peft | `base_model.model.<layer>.lora_A.weight`, and `lora_alpha` in adapter_config.json |
| ComfyUI and its trainers | `diffusion_model.<layer>.lora_A.weight` or `lora_down.weight`, perhaps `alpha` |
| kohya | `lora_unet_<layer, with underscores for dots>.lora_down.weight`, `lora_up.weight`, `alpha` |

All mean W x + alpha / rank * B A x, and alpha is the rank where nothing tells it. Other kinds of adapters are refused.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nova_video.common.errors import InputError

PREFIXES = (
    "transformer.",
    "base_model.model.",
    "base_model.model.transformer.",
    "diffusion_model.",
    "model.diffusion_model.",
    "base_model.model.diffusion_model.",
)
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
WEIGHT = re.compile(
    r"(?P<layer>.+)\.(?P<half>lora_[AB]|lora_down|lora_up|lora\.down|lora\.up)(\.(?!weight$)\w+)?\.weight"
)
HALVES = {"lora_down": "lora_A", "lora.down": "lora_A", "lora_up": "lora_B", "lora.up": "lora_B"}
OTHER_KINDS = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "ia3_": "IA3",
    "lora_mid": "LoCon with a Tucker core",
    "lora_embedding_": "LoRA of an embedding",
    "text_encoder": "LoRA of a text encoder",
    "lora_te": "LoRA of a text encoder",
    ".bias": "LoRA with biases",
}
"""Parts of names by which the kinds are known that are not read."""
DIFFERENCES = (".diff", ".diff_b")
"""Ends of the names of whole differences of weights."""


def read_forms(
    model: nn.Module, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None, where: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of any form above -> tensors by the model's own names, and the settings by which peft scales them.

    `config` is what adapter_config.json holds, if there is one.
    """
    _check_config(config or {}, where)
    layers = linear_names(model)
    flat: dict[str, list[str]] = {}
    for name in layers:
        flat.setdefault(name.replace(".", "_"), []).append(name)
    found: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        if (kind := _other_kind(key)) is not None:
            raise InputError(f"{where}: is {kind}, by its {key}: expected LoRA of linear layers of the transformer")
        if key.endswith(".alpha"):
            if tensor.numel() != 1:
                raise InputError(f"{where}: {key} has {tensor.numel()} values: expected one")
            alphas[_layer(key.removesuffix(".alpha"), layers, flat, where)] = float(tensor)
            continue
        match = WEIGHT.fullmatch(key)
        if match is None:
            raise InputError(f"{where}: has {key}: expected names such as transformer.<layer>.lora_A.weight")
        if not tensor.is_floating_point():
            raise InputError(f"{where}: {key} is {tensor.dtype}: expected floating point values")
        name = f"{_layer(match['layer'], layers, flat, where)}.{HALVES.get(match['half'], match['half'])}.weight"
        if name in found:
            raise InputError(f"{where}: has {name} twice, the second as {key}: expected one of each")
        found[name] = tensor
    if not found:
        raise InputError(f"{where}: has no tensors: expected names such as transformer.<layer>.lora_A.weight")
    return found, _settings(found, alphas, config or {}, where)


def linear_names(model: nn.Module) -> set[str]:
    """Linear layers of the model itself, by the names that they have without adapters."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "base_layer", module), nn.Linear)
        and not re.search(r"\.(base_layer|lora_[AB])(\.|$)", name)
    }


def _other_kind(key: str) -> str | None:
    """The kind of adapter that a tensor is of by its name, where it is one that is not read."""
    if key.endswith(DIFFERENCES):
        return "whole differences of weights"
    return next((kind for part, kind in OTHER_KINDS.items() if part in key), None)


def _layer(written: str, layers: set[str], flat: Mapping[str, list[str]], where: str) -> str:
    """The model's name of a layer; one that it lacks as it is, without the prefix, for the check that follows."""
    names = [written, *(written.removeprefix(prefix) for prefix in PREFIXES)]
    for name in names:
        if name in layers:
            return name
    for prefix in FLAT_PREFIXES:
        if written.startswith(prefix):
            found = flat.get(written.removeprefix(prefix), [])
            if len(found) > 1:
                raise InputError(f"{where}: {written} is {' or '.join(found)}: expected names with dots")
            return found[0] if found else written
    return min(names, key=len)


def _check_config(config: Mapping[str, Any], where: str) -> None:
    kind = config.get("peft_type", "LORA")
    if str(kind).upper() != "LORA":
        raise InputError(f"{where}: peft_type is {kind!r}: expected LORA")
    for name in ("alpha_pattern", "rank_pattern"):
        if not isinstance(config.get(name) or {}, Mapping):
            raise InputError(f"{where}: {name} is {config[name]!r}: expected a number by the name of each layer")
    others = {"use_dora": "DoRA", "fan_in_fan_out": "LoRA of transposed weights", "lora_bias": "LoRA with biases"}
    for name, kind in others.items():
        if config.get(name):
            raise InputError(f"{where}: is {kind}, by its {name}: expected LoRA of linear layers of the transformer")


def _settings(
    tensors: Mapping[str, Tensor], alphas: Mapping[str, float], config: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """peft's settings, in which every layer has its own rank and alpha."""
    ranks = {name.removesuffix(".lora_A.weight"): len(tensor) for name, tensor in tensors.items() if ".lora_A." in name}
    scaled = {layer: alphas.get(layer, _config_alpha(config, layer, rank, where)) for layer, rank in ranks.items()}
    for layer, alpha in scaled.items():
        if not math.isfinite(alpha):
            raise InputError(f"{where}: alpha of {layer} is {alpha}: expected a finite number")
    if lost := [layer for layer in alphas if layer not in ranks]:
        raise InputError(f"{where}: has alpha of {lost[0]} without its lora_A: expected both")
    first = next(iter(ranks), "")
    return {
        "r": ranks.get(first, 1),
        "lora_alpha": scaled.get(first, 1),
        "rank_pattern": ranks,
        "alpha_pattern": scaled,
        "target_modules": sorted(ranks),
    }


def _config_alpha(config: Mapping[str, Any], layer: str, rank: int, where: str) -> float:
    """What adapter_config.json says of a layer; its rank, where there is none."""
    patterns = config.get("alpha_pattern") or {}
    try:
        own = next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), None)
    except re.error as error:
        raise InputError(f"{where}: alpha_pattern has a name that is no pattern of layers: {error}") from None
    alpha = own if own is not None else config.get("lora_alpha", rank)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise InputError(f"{where}: lora_alpha is {alpha!r}: expected a number")
    return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1)
