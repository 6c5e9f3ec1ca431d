"""Weights of the released trainer become a checkpoint that opens: `nova convert`.

The trainer writes `checkpoint-N/transformer/` with a config and a pickled `diffusion_pytorch_model.bin`, and averaged
weights in `ema_checkpoints/`, without the other parts of a checkpoint. Pickles are read in this module alone, with
`weights_only`, which runs nothing that a file says: a pickle that needs more is refused.
"""

import logging
import os
import pickle
import shutil
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nova_video.autoencoders import find_layout
from nova_video.common.checks import check_local
from nova_video.common.errors import InputError, first_line
from nova_video.io.checkpoints import COMPONENTS, PART_SUFFIXES, lasting_name, resolve_checkpoint
from nova_video.io.files import make_readable
from nova_video.io.weights import (
    DIFFUSERS_WEIGHTS,
    PICKLES,
    TRANSFORMERS_WEIGHTS,
    VARIANTS,
    find_weights,
    has_weights,
    index_or_single,
    shard_files,
)
from nova_video.pipeline.loading import (
    check_text_conditional,
    check_weights,
    component_folder,
    current_names,
    outline_autoencoder,
    outline_transformer,
)
from nova_video.pipeline.settings import SETTINGS_FILE, CheckpointSettings
from nova_video.text.load import text_width

WRAPPERS = ("state_dict", "model_state_dict", "ema_state_dict", "model", "module", "ema")
"""Names under which trainers store the weights beside other values."""
PREFIXES = ("module.", "transformer.")
"""Prefixes that wrappers put before every name: of several GPUs, of a whole pipeline."""
COMPILE_PREFIX = "_orig_mod."
"""The prefix that torch.compile puts before all names, or before those of compiled modules."""
OTHERS = tuple(name for name in COMPONENTS if name != "transformer")
PADDING_TABLE = "text_embed.weight"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where the weights of a part lie."""

    folder: Path
    files: list[Path]
    root: Path
    """The checkpoint, which may have other parts too."""


def convert(source: Path, output: Path, base: str | None = None) -> Path:
    """Write a checkpoint of the weights at `source`, with the other parts of the model `base` where it has none."""
    check_local("output", output)
    if output.exists() or output.is_symlink():
        raise InputError(f"{output} exists: expected a new folder")
    if not output.absolute().parent.is_dir():
        raise InputError(f"{output}: there is no folder {output.absolute().parent}: expected one that exists")
    found = find_transformer(source)
    base_folder = None if base is None else resolve_checkpoint(base)
    if base_folder is not None:
        component_folder(base_folder, "scheduler")
    model = _read_transformer(found, base_folder)
    places = _find_others(found.root, base_folder)
    _check_others(model, places)
    with _new_folder(output) as folder:
        model.save_pretrained(folder / "transformer")
        for name, place in places.items():
            if name == "vae" and not has_weights(place, DIFFUSERS_WEIGHTS):
                _read_autoencoder(place).save_pretrained(folder / name)
            else:
                _link_files(place, folder / name)
        for checkpoint in (found.root, base_folder):
            if checkpoint is not None and (checkpoint / SETTINGS_FILE).is_file():
                settings = CheckpointSettings.load(checkpoint)
                text_encoder = settings.text_encoder and lasting_name(settings.text_encoder)
                CheckpointSettings(text_encoder, settings.defaults).save(folder)
                break
    for averages in (found.root / "ema_checkpoints", found.root.parent / "ema_checkpoints"):
        if averages.is_dir() and not found.folder.is_relative_to(averages):
            log.info("%s has averaged weights too: nova convert takes that folder as its source", averages)
    if "scheduler" not in places:
        opens = f"NovaPipeline.from_pretrained(MODEL, transformer={str(output)!r})"
        log.info("%s has the transformer alone: %s opens it; --base makes a whole checkpoint of it", output, opens)
    return output


# What is there --------------------------------------------------------------------------------------------------------


def find_transformer(source: Path) -> Source:
    """The one set of the transformer's weights at `source`: a file, or a folder with them or above them."""
    source = source.expanduser()
    if source.is_file():
        return Source(source.parent, [source], _root(source.parent))
    if not source.is_dir():
        raise InputError(f"{source} not found: expected a folder that the released trainer wrote, or a file of weights")
    for folder in (source, source / "transformer"):
        if folder.is_dir() and (files := _weight_files(folder)):
            return Source(folder, files, _root(folder))
    below = [
        folder
        for depth in ("*", "*/*", "*/*/*")
        for folder in sorted(source.glob(depth))
        if folder.is_dir() and folder.name not in OTHERS and _weight_files(folder)
    ]
    if len(below) != 1:
        found = f"has weights in {', '.join(map(str, below[:5]))}" if below else "has no weights"
        raise InputError(f"{source}: {found}: expected one folder with {DIFFUSERS_WEIGHTS}.bin or .safetensors")
    return Source(below[0], _weight_files(below[0]), _root(below[0]))


def _root(folder: Path) -> Path:
    return folder.parent if folder.name == "transformer" else folder


def _weight_files(folder: Path) -> list[Path]:
    """The files of one state dict: named as diffusers does, or the only pickle there. Empty where there are none."""
    for suffix in ("safetensors", "bin"):
        for variant in VARIANTS:
            index, single = index_or_single(folder, DIFFUSERS_WEIGHTS, variant, suffix)
            if index.is_file():
                return shard_files(index)
            if single.is_file():
                return [single]
    pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
    if len(pickles) > 1:
        names = ", ".join(path.name for path in pickles[:5])
        raise InputError(f"{folder}: has several files of weights, {names}: expected the one to take as the source")
    return pickles


def _find_config(found: Source, base: Path | None) -> Path:
    """The folder of the config that the weights were made for: theirs, that of the run, or the base's."""
    near = [found.folder, *(folder / "transformer" for folder in (found.folder, *found.folder.absolute().parents[:2]))]
    for folder in near:
        if (folder / "config.json").is_file():
            return folder
    if base is None:
        raise InputError(f"{found.folder}: has no config.json: expected one, or --base with the model that has it")
    log.info("%s has no config.json: that of %s is taken", found.folder, base)
    return component_folder(base, "transformer")


def _find_others(root: Path, base: Path | None) -> dict[str, Path]:
    """The folders of the other parts: the source's own, else the base's."""
    places = {}
    for name in OTHERS:
        for checkpoint in (root, base):
            if checkpoint is not None and (checkpoint / name).is_dir():
                places[name] = checkpoint / name
                break
    return places


def _check_others(model: Any, places: dict[str, Path]) -> None:
    """The autoencoder and the text encoder are of the sizes that the transformer was made for."""
    config = model.config
    if (place := places.get("vae")) is not None and has_weights(place, DIFFUSERS_WEIGHTS):
        channels = find_layout(outline_autoencoder(place)).channels
        if channels != config.image_dim:
            raise InputError(f"{place}: has {channels} latent channels: expected the transformer's {config.image_dim}")
    if (place := places.get("text_encoder")) is not None:
        width = text_width(str(place))
        if width != config.text_token_dim:
            raise InputError(f"{place}: has features of width {width}: expected {config.text_token_dim}")
        find_weights(place, TRANSFORMERS_WEIGHTS)


# Weights --------------------------------------------------------------------------------------------------------------


def _read_transformer(found: Source, base: Path | None) -> ModelMixin:
    outline = outline_transformer(_find_config(found, base))
    tensors = read_weights(found.files)
    check_text_conditional(found.folder, tensors)
    if PADDING_TABLE not in tensors and PADDING_TABLE in outline.state_dict():
        tensors[PADDING_TABLE] = _base_table(found, base)
    return _fill_model(outline, tensors, found.folder)


def _base_table(found: Source, base: Path | None) -> Tensor:
    """The padding table of the model that the training began with: no trainer changes it, and some leave it out."""
    if base is None:
        raise InputError(
            f"{found.folder}: has no {PADDING_TABLE}, the padding table that training leaves as it was: expected --base"
            " with the model that it began with"
        )
    log.info("%s has no %s: that of %s is taken", found.folder, PADDING_TABLE, base)
    tensors = read_weights(find_weights(component_folder(base, "transformer"), DIFFUSERS_WEIGHTS).files)
    if PADDING_TABLE not in tensors:
        raise InputError(f"{base}: has no {PADDING_TABLE} in safetensors: expected a model with that padding table")
    return tensors[PADDING_TABLE]


def _read_autoencoder(folder: Path) -> ModelMixin:
    """The autoencoder of pickled weights."""
    tensors = read_weights(_weight_files(folder))
    outline: ModelMixin = outline_autoencoder(folder, {key: tuple(value.shape) for key, value in tensors.items()})
    return _fill_model(outline, tensors, folder)


def _fill_model(outline: ModelMixin, tensors: dict[str, Tensor], folder: Path) -> ModelMixin:
    """The model with these weights, as they are stored."""
    check_weights(folder, outline, {key: tuple(value.shape) for key, value in tensors.items()})
    for key, value in tensors.items():
        if value.is_meta:
            raise InputError(f"{folder}: {key} has a shape and no values: expected trained weights")
        if not value.is_floating_point() or value.layout is not torch.strided:
            raise InputError(f"{folder}: {key} is {value.dtype}, {value.layout}: expected dense floating point values")
        if not value.isfinite().all():
            raise InputError(f"{folder}: {key} has values that are not finite: expected trained weights")
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    outline.load_state_dict(current_names(outline, tensors), assign=True)
    return outline


def read_weights(files: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of all files by name, on the CPU."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        tensors |= _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    tensors = {key.replace(COMPILE_PREFIX, ""): value for key, value in tensors.items()}
    while prefix := next((each for each in PREFIXES if tensors and all(key.startswith(each) for key in tensors)), None):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: corrupt or truncated safetensors file ({error})") from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """A pickled state dict. Nothing in it is run."""
    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise InputError(
            f"{path}: is a pickle of more than tensors, which could run code: expected a state dict alone"
        ) from None
    except Exception as error:  # torch raises many kinds for a damaged file
        raise InputError(f"{path}: not readable as weights of torch ({first_line(error)})") from None
    for _ in WRAPPERS:  # one inside another
        inner = [values[name] for name in WRAPPERS if isinstance(values, dict) and isinstance(values.get(name), dict)]
        values = inner[0] if inner else values
    if not isinstance(values, dict) or not values:
        raise InputError(f"{path}: holds {type(values).__name__}: expected a state dict")
    for key, value in values.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise InputError(f"{path}: holds {key!r} of type {type(value).__name__}: expected tensors by name")
    return dict(values)


# Writing --------------------------------------------------------------------------------------------------------------


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` to fill. It gets its name when the block ends well, and is removed when it does not."""
    temporary = output.absolute().with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        temporary.mkdir()
        yield temporary
        for path in temporary.rglob("*.safetensors"):
            if path.stat().st_nlink == 1:  # not a link to somebody's
                make_readable(path)
        os.rename(temporary, output)
    except (SafetensorError, OSError) as error:
        raise InputError(f"cannot write {output}: {first_line(error)}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _link_files(place: Path, folder: Path) -> None:
    """A second name for each file of a part, which takes no room, or a copy where that cannot be. Code stays behind."""
    folder.mkdir()
    for path in sorted(place.iterdir()):
        if path.is_file() and path.suffix in PART_SUFFIXES:
            try:
                os.link(path.resolve(), folder / path.name)
            except OSError:
                shutil.copyfile(path, folder / path.name)
