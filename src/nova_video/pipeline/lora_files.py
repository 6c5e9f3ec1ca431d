"""Files of adapters (LoRA): written as diffusers writes them, and read from diffusers, peft, ComfyUI and kohya.

An adapter's names are those of the model's layers: `video_encoder.blocks.0.attn.qkv.lora_A.weight` (rank, inputs) and
`lora_B.weight` (outputs, rank). In files they have a prefix:

| written by | a layer's tensors |
|---|---|
| diffusers, nova-video | `transformer.<layer>.lora_A.weight`, `lora_B.weight`, perhaps `alpha` |
| peft | `base_model.model.<layer>.lora_A.weight`, and `lora_alpha` in adapter_config.json |
| ComfyUI and its trainers | `diffusion_model.<layer>.lora_A.weight` or `lora_down.weight`, perhaps `alpha` |
| kohya | `lora_unet_<layer, with underscores for dots>.lora_down.weight`, `lora_up.weight`, `alpha` |

All mean W x + alpha / rank * B A x, and alpha is the rank where nothing tells it. Other kinds of adapters are refused.
"""

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nova_video.common.errors import InputError, first_line
from nova_video.io.checkpoints import HUB_ID
from nova_video.io.files import atomic_path
from nova_video.io.text import parse_json
from nova_video.io.weights import read_json
from nova_video.model import NOVATransformer3DModel
from nova_video.model.lora import lora_state_dict

LORA_FILE = "pytorch_lora_weights.safetensors"
LORA_PREFIX = "transformer."
LORA_METADATA = "lora_adapter_metadata"
"""Key of a file's metadata with peft's settings as JSON, each with the prefix in front of its name."""
LORA_BASE = "base_model_name_or_path"
"""One of these settings: the checkpoint that an adapter was trained beside."""
ADAPTER_CONFIG, PEFT_FILE = "adapter_config.json", "adapter_model.safetensors"
"""The file name under which peft saves an adapter."""
SUFFIXES = (".lora_A.weight", ".lora_B.weight")
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


log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Adapter:
    """The contents of an adapter's file."""

    tensors: dict[str, Tensor]
    """By names without the prefix."""
    settings: dict[str, Any] | None
    """peft's settings; without them alpha is the rank."""


def save_lora(
    model: NOVATransformer3DModel,
    folder: Path,
    name: str = "default",
    state: Mapping[str, Tensor] | None = None,
    base: str | None = None,
) -> Path:
    """Write pytorch_lora_weights.safetensors, which `NovaPipeline.load_lora_weights` opens.

    `state` is the whole state dict, where the model has only parts of it; `base` names the model's checkpoint.
    """
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
    path = folder / LORA_FILE
    with atomic_path(path) as part:
        save_file(tensors, part, metadata)
    return path


def load_adapter(
    name_or_path: str | Path,
    model: NOVATransformer3DModel,
    weight_name: str | None = None,
    subfolder: str | None = None,
    **hub: Any,
) -> Adapter:
    """Reads an adapter from a safetensors file, a folder or the hub, and checks it key by key.

    Files of peft, diffusers, ComfyUI and kohya are read (see above). `hub`: for `hf_hub_download`.
    """
    path = _find_adapter(name_or_path, weight_name, subfolder, hub)
    try:
        tensors = load_file(path)
        with safe_open(str(path), framework="pt") as file:
            told = (file.metadata() or {}).get(LORA_METADATA)
        settings = None if told is None else parse_json(told)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: expected a safetensors file with an adapter ({error})") from None
    if not isinstance(settings, dict | None):
        raise InputError(f"{path}: its metadata {LORA_METADATA} is {type(settings).__name__}: expected a JSON object")
    tensors = {key: value.float() if value.itemsize == 1 else value for key, value in tensors.items()}
    broken = next((key for key, value in tensors.items() if not bool(value.isfinite().all())), None)
    if broken is not None:
        raise InputError(f"{path}: {broken} has values that are not finite: expected finite weights")
    config_path = path.with_name(ADAPTER_CONFIG)
    config = read_json(config_path) if settings is None and config_path.is_file() else None
    own, scaled = read_forms(model, tensors, config, str(path))
    if settings is None:
        if config is None and any(key.startswith("base_model.model.") for key in tensors):
            log.warning("%s: there is no %s beside it, so lora_alpha is taken as the rank", path, ADAPTER_CONFIG)
        settings = scaled
    elif any(key.endswith(".alpha") for key in tensors):
        raise InputError(f"{path}: has alpha both as tensors and in its metadata: expected one of them")
    else:
        settings = {key.removeprefix(LORA_PREFIX): value for key, value in settings.items()}
        if not settings.get("target_modules"):
            raise InputError(f"{path}: its metadata has no target_modules: expected the names of the layers")
    adapter = Adapter(own, settings)
    check_adapter(model, adapter, str(path))
    return adapter


def _find_adapter(
    name_or_path: str | Path, weight_name: str | None, subfolder: str | None, hub: Mapping[str, Any]
) -> Path:
    """Finds the file of an adapter in a folder or on the hub, by the given name, diffusers' or peft's.

    A folder may also have one safetensors file of any other name.
    """
    path = Path(name_or_path).expanduser()
    if subfolder is not None and path.is_dir():
        path /= subfolder
    names = (LORA_FILE, PEFT_FILE) if weight_name is None else (weight_name,)
    listed = " or ".join(names)
    if path.is_file():
        return path
    if path.is_dir():
        for name in names:
            if (path / name).is_file():
                return path / name
        files = sorted(path.glob("*.safetensors"))
        if weight_name is None and len(files) == 1:
            return files[0]
        there = f", but {', '.join(file.name for file in files[:5])}" if files else ""
        instead = "weight_name with one of these" if files else "one that has"
        raise InputError(f"adapter {path}: the folder has no {listed}{there}: expected {instead}")
    if isinstance(name_or_path, Path) or not HUB_ID.fullmatch(name_or_path):
        raise InputError(
            f"adapter {str(name_or_path)!r} not found: expected a file, a folder with {listed}, or a hub id"
        )
    for name in names:
        try:
            place = hf_hub_download(name_or_path, name, subfolder=subfolder, **hub)
            if name == PEFT_FILE:
                hf_hub_download(name_or_path, ADAPTER_CONFIG, subfolder=subfolder, **hub)  # lies beside it
            return Path(str(place))
        except EntryNotFoundError as error:
            if name == names[-1]:
                raise InputError(f"adapter {name_or_path!r}: has no {listed} on the hub: {first_line(error)}") from None
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise InputError(
                f"adapter {name_or_path!r}: no such file here, and not to be had from the hub: {first_line(error)}"
            ) from None
    raise AssertionError("names is never empty")


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


# Names of other tools ------------------------------------------------------------------------------------------------


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
    """The model's name of a layer. An unknown layer keeps its name, without the prefix, for a later check."""
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
    """The alpha of a layer in adapter_config.json; without one, its rank."""
    patterns = config.get("alpha_pattern") or {}
    try:
        own = next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), None)
    except re.error as error:
        raise InputError(f"{where}: alpha_pattern has a name that is no pattern of layers: {error}") from None
    alpha = own if own is not None else config.get("lora_alpha", rank)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise InputError(f"{where}: lora_alpha is {alpha!r}: expected a number")
    return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1)
