"""A model of nova-video as ComfyUI passes it from node to node: on its device while it runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management as memory
import folder_paths
import torch

from nova_video import NovaPipeline
from nova_video.common.devices import choose_device, choose_dtype
from nova_video.io.checkpoints import PACKAGED_MODELS

FOLDER = "nova"
"""The folder of checkpoints below ComfyUI's `models`, and its key in `extra_model_paths.yaml`."""
KEEP, RETURN, TURNS = "keep on the device", "return to memory after use", "parts take turns on the GPU"
PLACES = (KEEP, RETURN, TURNS)


def register_folder() -> None:
    """Tells ComfyUI where checkpoints lie."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def checkpoints() -> list[str]:
    """The bundled models, and the folders of checkpoints below ComfyUI's `models`."""
    bundled = sorted(path.name for path in PACKAGED_MODELS.iterdir() if (path / "transformer").is_dir())
    return [*bundled, *(name for name in _own() if name not in bundled)]


def place_of(checkpoint: str, other: str) -> str:
    """The folder or hub id that the widgets of the loader name; `other` wins if it is not empty."""
    return other.strip() or _own().get(checkpoint, checkpoint)


def fingerprint(place: str) -> tuple[tuple[str, int, int], ...]:
    """The sizes and times of a local checkpoint's files: it is loaded again when they change."""
    folder = Path(place).expanduser()
    paths = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    told = [(path, path.stat()) for path in paths]
    return tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in told)


def _own() -> dict[str, str]:
    """The names of checkpoints below ComfyUI's `models` -> their folders."""
    roots = [Path(root) for root in folder_paths.get_folder_paths(FOLDER)]
    found = [path for root in roots if root.is_dir() for path in sorted(root.iterdir())]
    return {path.name: str(path) for path in found if (path / "transformer").is_dir()}


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A pipeline and where it is kept between runs. ComfyUI's own cache holds it and lets it go."""

    pipe: NovaPipeline
    device: torch.device
    kept: str
    """One of `PLACES`."""

    @classmethod
    def open(
        cls, place: str, device: str, dtype: str, kept: str, adapter: str | None = None, scale: float = 1.0
    ) -> "LoadedModel":
        """Opens a checkpoint. The device "auto" is the one that ComfyUI uses."""
        chosen = choose_device(str(memory.get_torch_device()) if device == "auto" else device)
        pipe = NovaPipeline.from_pretrained(
            place, torch_dtype=choose_dtype(dtype, chosen), low_memory=chosen if kept == TURNS else False
        )
        if adapter is not None:
            pipe.load_lora_weights(adapter, scale=scale)
        pipe.set_progress_bar_config(disable=True)
        return cls(pipe, chosen, kept)

    @contextmanager
    def on_device(self) -> Iterator[NovaPipeline]:
        """The pipeline, on its device within the block."""
        if self.kept == TURNS:
            yield self.pipe
            return
        if self.device.type != "cpu" and self.pipe.device != self.device:
            memory.free_memory(1.2 * self._bytes(), self.device)
        self.pipe.to(self.device)
        try:
            yield self.pipe
        finally:
            if self.kept == RETURN and self.device.type != "cpu":
                self.pipe.release()
                self.pipe.to("cpu")
                memory.soft_empty_cache()

    def _bytes(self) -> int:
        modules = [part for part in self.pipe.components.values() if isinstance(part, torch.nn.Module)]
        return sum(weight.numel() * weight.element_size() for module in modules for weight in module.parameters())
