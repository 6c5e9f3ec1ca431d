"""Where to compute and in what precision, from the words a user types; and how much of it torch compiles."""

import torch

from nova_video.common.errors import InputError

VARIANTS = 64  # of one compiled function
DEVICES = ("cpu", "cuda", "mps")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def choose_device(name: str = "auto") -> torch.device:
    """`auto` is the NVIDIA GPU if there is one, else the CPU. A device that is not there is an error.

    mps, an Apple GPU, is taken where it is named alone: no test of this project has run on one.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in DEVICES:
        raise InputError(f"device is {name!r}, expected auto, cpu, cuda, cuda:NUMBER or mps")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device 'mps' asked for, but torch finds no Apple GPU on this machine; expected cpu")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise InputError(f"device {name!r} asked for, but this machine has no usable CUDA device; expected cpu")
        if device.index is not None and device.index >= count:
            raise InputError(f"device {name!r} asked for, expected cuda:0 to cuda:{count - 1}")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is what checkpoints are stored in where that is fast: float16 on a GPU, float32 elsewhere."""
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def compile_every_variant() -> None:
    """Raise torch's limit for the process: it compiles eight variants of a function by default, and leaves the rest
    uncompiled. Models, dtypes, sizes, masks, adapters and ways of guidance are more."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
