"""The files of a part of a checkpoint: its config, and its weights, of which only the headers are read."""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nova_video.common.errors import InputError
from nova_video.io.text import decode_text, parse_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS = "diffusion_pytorch_model", "model"
VARIANTS = (None, "fp16", "bf16")
"""Variants that names of files may have, in the order in which they are looked for."""


@dataclass(frozen=True)
class Weights:
    """The safetensors files of a component."""

    files: list[Path]
    variant: str | None
    """fp16 and the like, where it is part of the files' names."""


def find_weights(folder: Path, base: str, variant: str | None = None) -> Weights:
    """Finds one file or the shards of an index: the variant, else the plain form, else fp16 or bf16."""
    for kind in dict.fromkeys([variant, *VARIANTS]):
        index, single = index_or_single(folder, base, kind)
        if index.is_file():
            return Weights(shard_files(index), kind)
        if single.is_file():
            return Weights([single], kind)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise InputError(
            f"{folder}: has only pickled weights, {pickles[0]}: expected {base}.safetensors"
            + (f"; {_convert_line(folder)} makes them of these" if base == DIFFUSERS_WEIGHTS else "")
        )
    raise InputError(f"{folder}: has no weights: expected {base}.safetensors")


def index_or_single(
    folder: Path, base: str, variant: str | None = None, suffix: str = "safetensors"
) -> tuple[Path, Path]:
    """The index of the shards that weights may lie in, and the one file that they may lie in."""
    middle = "" if variant is None else f".{variant}"
    return folder / f"{base}.{suffix}.index{middle}.json", folder / f"{base}{middle}.{suffix}"


def shard_files(index: Path) -> list[Path]:
    """The files that an index of shards names, beside it."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise InputError(f"{index}: expected a weight_map of key to file name")
    return [index.parent / Path(name).name for name in sorted(set(shards.values()))]


def has_weights(folder: Path, base: str) -> bool:
    """True if the folder has safetensors files, whole or in part."""
    return any(folder.glob(f"{base}*.safetensors"))


def _convert_line(folder: Path) -> str:
    """The command that converts the pickled weights of a part."""
    checkpoint = folder.parent if folder.name in ("transformer", "vae") else folder
    base = "" if (checkpoint / "scheduler").is_dir() else " --base MODEL"
    return f"nova convert {shlex.quote(str(checkpoint))}{base} -o NEW_FOLDER"


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
        values = parse_json(decode_text(path.read_bytes()))
    except FileNotFoundError:
        raise InputError(f"{path} not found: expected every component folder to hold its config") from None
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object")
    return values
