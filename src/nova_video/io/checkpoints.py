"""Finds checkpoints and their text parts: a bundled model, a local folder, or a download from the hub.

Nothing is loaded here. `pipeline/loading.py` reads the parts of the folder that is found.
"""

import re
from collections.abc import Container
from os import PathLike
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from nova_video.common.checks import quote
from nova_video.common.errors import InputError

PACKAGED_MODELS = Path(__file__).parents[1] / "models"
COMPONENTS = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer")
PART_SUFFIXES = (".json", ".safetensors", ".txt", ".model")
"""Suffixes of the files that a part is read from: no code, no pickles."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def resolve_checkpoint(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    without: Container[str] = (),
) -> Path:
    """The folder of a checkpoint: the one in the package ("emoji"), a local folder, or a download from the hub.

    Of the hub's, the parts named in `without` are left there.
    """
    if not isinstance(name_or_path, str | PathLike):
        raise InputError(f"model is {quote(name_or_path)}: expected a folder or a hub id")
    if isinstance(name_or_path, str) and _is_packaged(name_or_path):
        return PACKAGED_MODELS / name_or_path
    if not str(name_or_path).strip():
        raise InputError(f"model is {str(name_or_path)!r}: expected {_packaged_names()}a folder or a hub id")
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
    wanted = [f"{part}/*{suffix}" for part in COMPONENTS if part not in without for suffix in PART_SUFFIXES]
    try:
        place = snapshot_download(
            name_or_path,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            cache_dir=cache_dir,
            force_download=force_download,
            allow_patterns=[*wanted, "nova.json", "vocabulary.json", "model_index.json"],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"model {name_or_path!r}: no such folder here, and not to be had from the hub: {reason}"
        ) from None
    return Path(place)


def lasting_name(name: str) -> str:
    """The name of the same checkpoint or text encoder from any working directory: a local folder's whole path."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() and not _is_packaged(name) else name


def find_beside(name: str, folder: str | Path) -> str:
    """The folder that a relative path names from `folder` or one above it; else the name as it is.

    Older datasets and models kept such paths, which were relative to where a command was run.
    """
    if "/" not in name or "://" in str(folder) or Path(name).expanduser().is_dir():
        return name
    whole = Path(folder).resolve()
    return next((str(place / name) for place in (whole, *whole.parents) if (place / name).is_dir()), name)


def _is_packaged(name: str) -> bool:
    return re.fullmatch(r"[\w-]+", name) is not None and (PACKAGED_MODELS / name).is_dir()


def _packaged_names() -> str:
    names = sorted(path.name for path in PACKAGED_MODELS.glob("*") if path.is_dir())
    return "".join(f"{name!r}, " for name in names)


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
