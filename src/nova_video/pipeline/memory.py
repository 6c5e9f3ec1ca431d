"""The pipeline's switches for memory, by the names that they have in diffusers."""

import logging
from abc import abstractmethod
from typing import Any

import torch
from diffusers import DiffusionPipeline

log = logging.getLogger(__name__)


class MemoryMixin(DiffusionPipeline):
    """The part of `NovaPipeline` that trades speed for memory as diffusers' pipelines do. `offload.py` does more."""

    @abstractmethod
    def require_vae(self, what: str) -> Any: ...

    def enable_vae_slicing(self) -> None:
        """Decode one picture or clip at a time."""
        self.require_vae("slicing").enable_slicing()

    def disable_vae_slicing(self) -> None:
        self.require_vae("slicing").disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode large frames in overlapping tiles."""
        self.require_vae("tiling").enable_tiling()

    def disable_vae_tiling(self) -> None:
        self.require_vae("tiling").disable_tiling()

    def enable_group_offload(
        self,
        onload_device: torch.device,
        *options: Any,
        exclude_modules: str | list[str] | None = None,
        **named: Any,
    ) -> None:
        """diffusers' group offload, for the text encoder: transformer and autoencoder stay whole on the device.

        Their calls are no `forward`, where that offload brings weights. `low_memory` lets them take turns.
        """
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or ())
        excluded += [name for name in ("transformer", "vae") if name not in excluded]
        super().enable_group_offload(onload_device, *options, exclude_modules=excluded, **named)

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Nothing, and says so: attention is computed without ever holding a whole matrix of scores."""
        log.warning(
            "enable_attention_slicing changes nothing: attention never holds its scores as a whole here;"
            " low_memory=True in from_pretrained is for small GPUs"
        )

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Nothing, and says so: torch's own attention, which is used here, is memory efficient."""
        log.warning("enable_xformers_memory_efficient_attention changes nothing: torch's own attention is used")
