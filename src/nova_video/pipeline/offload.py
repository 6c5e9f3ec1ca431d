"""A pipeline on a small card: its parts take turns there, and the text encoder passes through layer by layer.

Nothing here changes a result but `text_encoder="int8"` and `tiled`. The transformer is whole on the device while it
samples, since every set needs all of it; the autoencoder decodes in the arrangement of `fast/autoencoder.py`, a few
frames at a time. Text is encoded once a call, so its encoder may as well be sent over layer by layer. CUDA graphs
read the transformer's weights where they are: they last until it leaves, which pays for clips from the second frame on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from accelerate.utils import send_to_device
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

from nova_video.common.errors import InputError
from nova_video.common.extras import install_command
from nova_video.common.startup import reveal

TextEncoder = Literal["float", "int8"]


class Offloadable(Protocol):
    """The pipeline, as its parts are made to take turns."""

    transformer: Any
    vae: Any
    text_encoder: Any

    def remove_all_hooks(self) -> None: ...

    def drop_graphs(self) -> None: ...


@dataclass(frozen=True)
class LowMemory:
    """How to get by on a small GPU, for `NovaPipeline.from_pretrained`."""

    device: torch.device | str = "cuda"
    text_encoder: TextEncoder = "float"
    tiled: bool = False
    """These two as in `enable_low_memory`."""

    @classmethod
    def of(cls, asked: "LowMemory | torch.device | str | bool") -> "LowMemory | None":
        """Reads `low_memory` as settings or None. Without a GPU it is refused."""
        if asked is False:
            return None
        low = asked if isinstance(asked, cls) else cls() if asked is True else cls(asked)  # type: ignore[arg-type]
        place = torch.device(low.device)
        if place.type != "cuda" or not torch.cuda.is_available():
            here = "there is none here" if place.type == "cuda" else f"got {place}"
            raise InputError(f"low_memory is for a GPU: {here}; without one, leave it out")
        return low


def enable_low_memory(
    pipe: Offloadable, device: torch.device | str, text_encoder: TextEncoder = "float", tiled: bool = False
) -> None:
    """Let the pipeline's parts take turns on `device`, from their place in the processor's memory. Only once a pipe.

    `text_encoder`: "float" as it is, layer by layer; "int8" with linear layers of 8 bit weights, which halves what it
    takes anywhere and changes the features a little, and whole. `tiled`: frames larger than the autoencoder's tile in
    overlapping tiles too, for sizes that do not fit otherwise; the pixels differ a little.
    """
    device = torch.device(device)
    if any(isinstance(getattr(part, "_hf_hook", None), OffloadHook) for part in (pipe.transformer, pipe.vae)):
        raise InputError("low memory is on for this pipeline already: expected to be asked once")
    if text_encoder not in ("float", "int8"):
        raise InputError(f"text_encoder is {text_encoder!r}: expected 'float' or 'int8'")
    if text_encoder == "int8" and pipe.text_encoder is None:
        raise InputError("text_encoder is 'int8': expected a checkpoint with a text encoder in it, this one has none")
    if tiled and pipe.vae is None:
        raise InputError("tiled is True: expected a checkpoint with an autoencoder in it, this one has none")
    pipe.remove_all_hooks()
    parts = [pipe.transformer] + ([] if pipe.vae is None else [pipe.vae])
    if pipe.text_encoder is not None:
        pipe.text_encoder.to("cpu")
        if text_encoder == "int8":
            quantise(pipe.text_encoder)
            parts.append(pipe.text_encoder)
        else:
            pass_through(pipe.text_encoder, device)
    take_turns(parts, device, on_leave={pipe.transformer: pipe.drop_graphs})
    if pipe.vae is not None:
        pipe.vae.enable_slicing()
        if tiled:
            pipe.vae.enable_tiling()


def quantise(module: nn.Module) -> None:
    """Weights of the linear layers in 8 bits with a scale for each output, products in the dtype they had."""
    reveal()
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise InputError(
            f"a text encoder in int8 needs torchao: expected it to be installed ({install_command('lowmem')})"
        ) from None
    quantize_(module, Int8WeightOnlyConfig())


def pass_through(module: nn.Module, device: torch.device) -> None:
    """Every layer on the device only while it computes; on CUDA the next is on its way meanwhile."""
    apply_group_offloading(
        module,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        use_stream=device.type == "cuda",
    )


def take_turns(
    parts: Sequence[nn.Module], device: torch.device, on_leave: Mapping[nn.Module, Callable[[], None]] | None = None
) -> None:
    """Keep one of the parts at a time on the device: the one that was last brought there or called.

    `on_leave`: what is called before a part goes back.
    """
    hooks: list[OffloadHook] = []
    for part in parts:
        hooks.append(OffloadHook(part, device, hooks, (on_leave or {}).get(part)))
        add_hook_to_module(part, hooks[-1])


class OffloadHook(CpuOffload):
    """The hook of a part that takes turns on the device with others: bringing it sends the others back.

    Unlike accelerate's own, it keeps the weights where they came from, in pinned memory on CUDA, so that going back
    copies nothing. Changes of weights on the device are therefore lost, as after any reload.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        hooks: list["OffloadHook"],
        on_leave: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(device)
        self.module = module
        self.hooks = hooks
        """Of all parts, this one's too."""
        self.home: dict[Tensor, Tensor] = {}
        """Tensors of the part that are on the device -> what they were before."""
        self.on_leave = on_leave

    def init_hook(self, module: nn.Module) -> nn.Module:
        module.to("cpu")
        if torch.device(self.execution_device).type == "cuda":
            for tensor in self._tensors():
                if _is_plain(tensor):
                    tensor.data = tensor.data.pin_memory()
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        others = [hook.to_host() for hook in self.hooks if hook is not self]
        if any(others) and torch.device(self.execution_device).type == "cuda":
            torch.cuda.empty_cache()  # parts ask for blocks of other sizes
        self.to_device()
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)

    def to_device(self) -> None:
        """Bring the part."""
        device = torch.device(self.execution_device)
        if not all(_is_plain(tensor) for tensor in self._tensors()):
            self.module.to(device)  # quantised weights know how to move themselves
            return
        for tensor in self._tensors():
            if tensor.device.type != device.type:
                self.home[tensor] = tensor.data
                tensor.data = tensor.data.to(device, non_blocking=True)

    def to_host(self) -> bool:
        """Send the part back; True if it was on the device."""
        if all(tensor.device.type == "cpu" for tensor in self._tensors()):
            return False
        if self.on_leave is not None:
            self.on_leave()
        for tensor, before in self.home.items():
            tensor.data = before
        self.home = {}
        self.module.to("cpu")  # what came to the device by another way
        return True

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.module.parameters()
        yield from self.module.buffers()


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)


# What hooks of any kind mean for the pipeline -------------------------------------------------------------------------


def bring(module: nn.Module) -> None:
    """Move a part to its device under CPU offload, where the library's hooks do so only at `forward` and `decode`."""
    hook = getattr(module, "_hf_hook", None)
    if isinstance(hook, CpuOffload):
        hook.pre_forward(module)


def takes_turns(module: nn.Module) -> bool:
    """True if the part takes turns by a hook of this module, whose weights stay where they are meanwhile."""
    return isinstance(getattr(module, "_hf_hook", None), OffloadHook)


def is_offloaded(*modules: nn.Module | None) -> bool:
    """True if a hook moves one of the parts."""
    return any(getattr(module, "_hf_hook", None) is not None for module in modules)


def execution_device(module: Any) -> torch.device:
    """Where a part computes: under CPU offload not where its weights are."""
    hook = getattr(module, "_hf_hook", None)
    return torch.device(hook.execution_device if isinstance(hook, CpuOffload) else module.device)
