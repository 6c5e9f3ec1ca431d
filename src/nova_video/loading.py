"""The one door by which weights enter: a checkpoint's folder, checked part by part, to modules.

A checkpoint is a folder of component folders (transformer/ vae/ scheduler/ text_encoder/ tokenizer/), each with its own
config, and optionally a `nova.json`. Released checkpoints and ours open alike: module names are the released state-dict
keys, so there is no converter. Only safetensors are read, and whatever is wrong is an `InputError` that names it.
"""

import inspect
import json
import re
from collections.abc import Collection, Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, ModelMixin, SchedulerMixin
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nova_video.autoencoders import AutoencoderKLCausalTiny, AutoencoderKLOpenSora
from nova_video.errors import InputError
from nova_video.model import NOVATransformer3DModel
from nova_video.model.lora import LORA_FILE, LORA_METADATA, LORA_PREFIX, Adapter, check_adapter
from nova_video.text.encoders import load_text_model, load_tokenizer

PACKAGED_MODELS = Path(__file__).parent / "models"
COMPONENTS = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS = "diffusion_pytorch_model", "model"

# Names that diffusers itself renames when it loads an old autoencoder: the attention of its middle block.
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def resolve_checkpoint(
    name_or_path: str | Path, *, revision: str | None = None, token: str | None = None, local_files_only: bool = False
) -> Path:
    """The folder of a checkpoint: the one in the package ("emoji"), a local folder, or a download from the hub."""
    if isinstance(name_or_path, str) and _is_packaged(name_or_path):
        return PACKAGED_MODELS / name_or_path
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"model {name_or_path}: is a file: expected a folder with transformer/, scheduler/ and so on")
    if isinstance(name_or_path, Path) or not HUB_ID.fullmatch(name_or_path):
        raise InputError(
            f"model {str(name_or_path)!r} not found: expected {_packaged_names()}an existing folder or a hub id such as"
            " BAAI/nova-d48w1024-osp480"
        )
    wanted = [f"{part}/*{suffix}" for part in COMPONENTS for suffix in (".json", ".safetensors", ".txt", ".model")]
    try:
        place = snapshot_download(
            name_or_path,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=[*wanted, "nova.json"],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"model {name_or_path!r}: no such folder here, and not to be had from the hub: {reason}"
        ) from None
    return Path(place)


def lasting_name(name: str) -> str:
    """What names the same checkpoint or text encoder from any working directory: a local folder's whole path, any other
    name as it is."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() and not _is_packaged(name) else name


def _is_packaged(name: str) -> bool:
    return re.fullmatch(r"[\w-]+", name) is not None and (PACKAGED_MODELS / name).is_dir()


def _packaged_names() -> str:
    names = sorted(path.name for path in PACKAGED_MODELS.glob("*") if path.is_dir())
    return "".join(f"{name!r}, " for name in names)


def load_transformer(checkpoint: Path, torch_dtype: torch.dtype | None = None) -> NOVATransformer3DModel:
    folder = _component_folder(checkpoint, "transformer")
    _check_class(folder, ["NOVATransformer3DModel"])
    model: NOVATransformer3DModel = load_component(NOVATransformer3DModel, folder, torch_dtype)
    return model


def load_autoencoder(checkpoint: Path, torch_dtype: torch.dtype | None = None) -> Any | None:
    """The autoencoder that vae/config.json names, or None where there is no vae/.

    An image autoencoder whose config says `force_upcast` overflows in float16 and stays in float32, as in diffusers'
    pipelines for it.
    """
    folder = checkpoint / "vae"
    if not folder.is_dir():
        return None
    classes = {cls.__name__: cls for cls in (AutoencoderKL, AutoencoderKLOpenSora, AutoencoderKLCausalTiny)}
    found = classes[_check_class(folder, classes)]
    overflows = found is AutoencoderKL and read_json(folder / "config.json").get("force_upcast")
    return load_component(found, folder, torch.float32 if overflows and torch_dtype is torch.float16 else torch_dtype)


def load_scheduler(checkpoint: Path) -> Any:
    """One of diffusers' own schedulers, by the name in scheduler/scheduler_config.json."""
    folder = _component_folder(checkpoint, "scheduler")
    config = read_json(folder / "scheduler_config.json")
    name = config.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) and name.endswith("Scheduler") else None
    if not isinstance(found, type) or not issubclass(found, SchedulerMixin):
        raise InputError(f"{folder / 'scheduler_config.json'}: _class_name is {name!r}: expected a diffusers scheduler")
    scheduler: Any = found
    return scheduler.from_config(config)


def load_text_parts(
    checkpoint: Path, torch_dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel | None, PreTrainedTokenizerBase | None]:
    """text_encoder/ and tokenizer/, each None where there is no such folder."""
    encoder, tokenizer = text_folder(checkpoint, "text_encoder"), text_folder(checkpoint, "tokenizer")
    model = None
    if encoder is not None:
        read_json(encoder / "config.json")
        stored = read_shapes(find_weights(encoder, TRANSFORMERS_WEIGHTS).files)
        model = load_text_model(str(encoder), torch_dtype)
        _check_text_keys(encoder, stored, model)
    return model, None if tokenizer is None else load_tokenizer(str(tokenizer))


def text_folder(checkpoint: Path, name: str) -> Path | None:
    """text_encoder/ or tokenizer/, None where there is none. In a trained checkpoint it may be a link, which is to lead
    somewhere."""
    folder = checkpoint / name
    if folder.is_symlink() and not folder.exists():
        raise InputError(
            f"{folder} is a link to {folder.readlink()}, which is not there: expected that folder, or a copy of it in"
            " the link's place"
        )
    return folder if folder.is_dir() else None


def _check_text_keys(folder: Path, stored: Iterable[str], model: PreTrainedModel) -> None:
    """No weights besides the encoder's, but for the language head of a model saved whole, which is not used."""
    expected = set(model.state_dict())
    prefix = f"{model.base_model_prefix}."
    unused = ("position_ids", "inv_freq", "lm_head.weight", "lm_head.bias")
    extra = [key for key in stored if key.removeprefix(prefix) not in expected and not key.endswith(unused)]
    if extra:
        raise InputError(f"{folder}: weights do not fit {type(model).__name__}: extra keys {_some(extra)}")


def load_adapter(name_or_path: str | Path, model: NOVATransformer3DModel, weight_name: str | None = None) -> Adapter:
    """A low-rank adapter for the model: a safetensors file, a folder with one, or a hub id; checked key by key."""
    path = _find_adapter(name_or_path, weight_name or LORA_FILE)
    try:
        tensors = load_file(path)
        with safe_open(str(path), framework="pt") as file:
            told = (file.metadata() or {}).get(LORA_METADATA)
        settings = None if told is None else json.loads(told)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: expected a safetensors file with an adapter ({error})") from None
    foreign = [key for key in tensors if not key.startswith(LORA_PREFIX)]
    if foreign or not tensors:
        has = foreign[0] if foreign else "no tensors"
        raise InputError(f"{path}: has {has}: expected names such as {LORA_PREFIX}<layer>.lora_A.weight")
    adapter = Adapter(
        {key.removeprefix(LORA_PREFIX): value for key, value in tensors.items()},
        None if settings is None else {key.removeprefix(LORA_PREFIX): value for key, value in settings.items()},
    )
    check_adapter(model, adapter, str(path))
    return adapter


def _find_adapter(name_or_path: str | Path, weight_name: str) -> Path:
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / weight_name).is_file():
            raise InputError(f"adapter {name_or_path}: the folder has no {weight_name}: expected one that has")
        return path / weight_name
    if isinstance(name_or_path, Path) or not HUB_ID.fullmatch(name_or_path):
        raise InputError(
            f"adapter {str(name_or_path)!r} not found: expected a file, a folder with {weight_name}, or a hub id"
        )
    try:
        return Path(hf_hub_download(name_or_path, weight_name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"adapter {name_or_path!r}: no such file here, and not to be had from the hub: {reason}"
        ) from None


def load_component(cls: type[ModelMixin], folder: Path, torch_dtype: torch.dtype | None = None) -> Any:
    """A diffusers model from its folder, every key and shape compared first; float32 unless a dtype is given."""
    expected = {key: tuple(value.shape) for key, value in outline_component(cls, folder).state_dict().items()}
    weights = find_weights(folder, DIFFUSERS_WEIGHTS)
    stored = {_current_name(key, expected): shape for key, shape in read_shapes(weights.files).items()}
    missing = [key for key in expected if key not in stored]
    extra = [key for key in stored if key not in expected]
    wrong = [
        f"{key} {stored[key]} (expected {shape})"
        for key, shape in expected.items()
        if key in stored and stored[key] != shape
    ]
    problems = [
        f"{what} {_some(keys)}"
        for what, keys in (("missing keys", missing), ("extra keys", extra), ("wrong shapes", wrong))
        if keys
    ]
    if problems:
        raise InputError(f"{folder}: weights do not fit {cls.__name__}: {'; '.join(problems)}")
    loaded = cls.from_pretrained(
        str(folder), torch_dtype=torch_dtype, variant=weights.variant, use_safetensors=True, local_files_only=True
    )
    return loaded.eval()


def outline_component(cls: type[ModelMixin], folder: Path) -> Any:
    """The model that a folder's config.json describes, of shapes alone: no weights are read."""
    config = read_json(folder / "config.json")
    try:
        known = inspect.signature(cls.__init__).parameters  # others are the library's to warn of, when it loads
        with torch.device("meta"):
            return cls.from_config({key: value for key, value in config.items() if key in known})
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise InputError(f"{folder / 'config.json'}: no {cls.__name__} can be made of it: {error}") from None


@dataclass(frozen=True)
class Weights:
    """The safetensors files of a component."""

    files: list[Path]
    variant: str | None
    """fp16 and the like, where it is part of the files' names."""


def find_weights(folder: Path, base: str) -> Weights:
    """One file or the shards of an index, in their plain form or else as the fp16 or bf16 variant."""
    for variant in (None, "fp16", "bf16"):
        middle = "" if variant is None else f".{variant}"
        index, single = folder / f"{base}.safetensors.index{middle}.json", folder / f"{base}{middle}.safetensors"
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
                raise InputError(f"{index}: expected a weight_map of key to file name")
            return Weights([folder / Path(name).name for name in sorted(set(shards.values()))], variant)
        if single.is_file():
            return Weights([single], variant)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise InputError(f"{folder}: has only pickled weights, {pickles[0]}: expected {base}.safetensors")
    raise InputError(f"{folder}: has no weights: expected {base}.safetensors")


def read_shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Key to shape over all files, from their headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(str(path), framework="pt") as tensors:
                shapes |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise InputError(f"{path}: not found, though the index beside it names it") from None
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: corrupt or truncated safetensors file ({error})") from None
    return shapes


def read_json(path: Path) -> dict[str, Any]:
    """A component's config."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} not found: expected every component folder to hold its config") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object")
    return values


def _component_folder(checkpoint: Path, name: str) -> Path:
    folder = checkpoint / name
    if not folder.is_dir():
        raise InputError(
            f"{checkpoint}: has no {name}/: expected a checkpoint with transformer/ and scheduler/ at least"
        )
    return folder


def _check_class(folder: Path, expected: Collection[str]) -> str:
    """The `_class_name` of a component's config, one of the expected."""
    name = read_json(folder / "config.json").get("_class_name")
    if not isinstance(name, str) or name not in expected:
        raise InputError(f"{folder / 'config.json'}: _class_name is {name!r}: expected {' or '.join(expected)}")
    return name


def _current_name(key: str, expected: Container[str]) -> str:
    """`key` as diffusers will read it."""
    if key in expected:
        return key
    for old, new in OLD_ATTENTION.items():
        if old in key and key.replace(old, new) in expected:
            return key.replace(old, new)
    return key


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
