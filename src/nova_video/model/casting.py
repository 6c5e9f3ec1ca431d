"""Layerwise casting: the encoders' linear weights in 8 bits, brought to the compute dtype a block at a time.

diffusers casts each layer for its own `forward`. Here a block is cast as a whole, and threads that share a model take
turns in it. Norms and all other modules stay in the compute dtype.
"""

import threading
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from nova_video.common.errors import InputError

NAME = "layerwise_casting"
"""Name of the hook, by which diffusers finds the compute dtype of a model."""


class BlockCasting(ModelHook):
    """Casts the linear layers of a block for the time of a call; threads take turns in it."""

    fn_ref: Any  # set by the registry

    def __init__(self, storage_dtype: torch.dtype, compute_dtype: torch.dtype, non_blocking: bool) -> None:
        super().__init__()
        self.storage_dtype, self.compute_dtype, self.non_blocking = storage_dtype, compute_dtype, non_blocking
        self.lock = threading.Lock()

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self._cast(module, self.storage_dtype)
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            self._cast(module, self.compute_dtype)
            try:
                return self.fn_ref.original_forward(*args, **kwargs)
            finally:
                self._cast(module, self.storage_dtype)

    def _cast(self, block: nn.Module, dtype: torch.dtype) -> None:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype=dtype, non_blocking=self.non_blocking)


def cast_blocks(model: Any, storage_dtype: torch.dtype, compute_dtype: torch.dtype, non_blocking: bool) -> None:
    """Store the linear weights of both encoders' blocks in `storage_dtype`."""
    if is_cast(model) or getattr(model, "peft_config", None):
        raise InputError(
            "the transformer is cast already or has adapters: expected a plain one; fuse adapters and unload them"
        )
    model.to(compute_dtype)
    for block in (*model.video_encoder.blocks, *model.image_encoder.blocks):
        hook = BlockCasting(storage_dtype, compute_dtype, non_blocking)
        HookRegistry.check_if_exists_or_initialize(block).register_hook(hook, NAME)


def is_cast(model: nn.Module) -> bool:
    """True if blocks or layers of the model are stored in another dtype than they compute in."""
    registries = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    return any(registry is not None and registry.get_hook(NAME) is not None for registry in registries)
