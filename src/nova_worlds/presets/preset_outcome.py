"""The outcome of one variant of `presets.py`, sentence by sentence, and the files that keep it.

A file holds the key that it was made under, a JSON text of all that decides the result; it is taken for that key alone.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nova_video.io.files import atomic_path


@dataclass(frozen=True, eq=False)
class Outcome:
    """The outcome of one variant."""

    flags: dict[str, Tensor]
    """By score, whether each clip or picture is right: (N,) bool."""
    error: Tensor
    """(N,) squared distance of each clip's latents from the exact ones."""
    size: Tensor
    """(N,) squared norm of the exact ones."""
    seconds: float
    """Median of a batch, from prompt features to latents."""
    vae_seconds: float
    """Median of a batch, from latents to pixels."""
    versions: dict[str, str]

    @property
    def distance(self) -> float:
        """Root mean square of the difference of all latents, relative to that of the exact ones."""
        return float((self.error.double().sum() / self.size.double().sum()).sqrt())

    def save(self, path: Path, key: str) -> None:
        tensors = {f"flags.{name}": right for name, right in self.flags.items()}
        record = {
            "scores": list(self.flags),
            "seconds": self.seconds,
            "vae_seconds": self.vae_seconds,
            "versions": self.versions,
        }
        save_tensors(path, tensors | {"error": self.error, "size": self.size}, key, json.dumps(record))

    @classmethod
    def load(cls, path: Path, key: str) -> "Outcome | None":
        """The outcome that was kept for exactly this key; None if there is none."""
        kept = load_tensors(path, key)
        if kept is None:
            return None
        tensors, record = kept[0], json.loads(kept[1])
        flags = {name: tensors[f"flags.{name}"] for name in record.pop("scores")}
        return cls(flags, tensors["error"], tensors["size"], **record)


def digest(folder: Path, parts: Sequence[str]) -> str:
    """A hash of the files in these parts of a folder, and of their names."""
    found = hashlib.sha256()
    for part in parts:
        place = folder / part
        for path in [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file()):
            found.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:32]


def save_tensors(path: Path, tensors: dict[str, Tensor], key: str, record: str = "{}") -> None:
    with atomic_path(path) as temporary:
        save_file(
            {name: rows.cpu().contiguous() for name, rows in tensors.items()}, temporary, {"key": key, "record": record}
        )


def load_tensors(path: Path, key: str) -> tuple[dict[str, Tensor], str] | None:
    """The tensors that were saved with this key, and their record."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
            if notes.get("key") != key:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}, str(notes["record"])  # noqa: SIM118
    except (SafetensorError, OSError):
        return None
