"""Shared by the sub-commands: loading a model, a progress bar, sizes. No heavy import before a command runs."""

import re
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from nova_video.cli.arguments import ModelFlags, model_of
from nova_video.common.errors import InputError
from nova_video.common.extensions import load_extension
from nova_video.common.startup import reveal, use_fitting_threads

if TYPE_CHECKING:
    from pathlib import Path

    from rich.progress import Progress

    from nova_video.pipeline.offload import LowMemory
    from nova_video.pipeline.pipeline import NovaPipeline
    from nova_video.pipeline.settings import Defaults

SMALL = ("low_memory", "tiled", "int8_text")
"""Flags for a small GPU."""


def load_pipeline(
    model: str,
    device: str,
    dtype: str,
    low_memory: "LowMemory | None" = None,
    lora: "Path | None" = None,
    lora_scale: float = 1.0,
    head: str | None = None,
) -> "NovaPipeline":
    """The model on its device, with an adapter in its weights. The device is checked before anything is loaded.

    `head` names the class of the user's own head, `module:Class`.
    """
    from nova_video.common.devices import choose_device, choose_dtype

    place = choose_device(device)
    import diffusers
    import transformers

    from nova_video.pipeline.pipeline import NovaPipeline

    reveal()
    diffusers.utils.logging.disable_progress_bar()  # the bars of loading; sampling has ours
    transformers.utils.logging.disable_progress_bar()
    pipe = NovaPipeline.from_pretrained(
        model,
        torch_dtype=choose_dtype(dtype, place),
        low_memory=False if low_memory is None else replace(low_memory, device=place),
        head=None if head is None else load_extension(head, "head"),
    )
    if lora is not None:
        from nova_video.model.lora import merge

        pipe.load_lora_weights(lora, scale=lora_scale)
        merge(pipe.transformer)
    if low_memory is None:
        pipe.to(place)
    if place.type == "cpu":
        use_fitting_threads(pipe.transformer.num_parameters())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_of(args: ModelFlags) -> "NovaPipeline":
    """The model that a command's flags name, on its device."""
    if args.lora_scale is not None and args.lora is None:
        raise InputError("got --lora-scale alone: expected --lora with it")
    if args.lora is not None and not args.lora.exists():
        raise InputError(f"lora {args.lora} not found: expected a safetensors file or its folder")
    scale = 1.0 if args.lora_scale is None else args.lora_scale
    return load_pipeline(
        model_of(args), args.device or "auto", args.dtype or "auto", low_memory_of(args), args.lora, scale, args.head
    )


def low_memory_of(args: ModelFlags) -> "LowMemory | None":
    if not args.low_memory:
        for name in SMALL[1:]:
            if getattr(args, name):
                raise InputError(f"got --{name.replace('_', '-')} alone: expected --low-memory with it")
        return None
    from nova_video.pipeline.offload import LowMemory

    return LowMemory(text_encoder="int8" if args.int8_text else "float", tiled=args.tiled)


def outline_pipeline(model: str, head: str | None = None) -> "NovaPipeline":
    """A pipeline of shapes and settings alone: what requests are checked against before any weights are read."""
    from nova_video.io.checkpoints import resolve_checkpoint
    from nova_video.pipeline.loading import component_folder, load_scheduler, outline_autoencoder, outline_transformer
    from nova_video.pipeline.pipeline import NovaPipeline
    from nova_video.pipeline.settings import CheckpointSettings

    folder = resolve_checkpoint(model)
    vae = folder / "vae"
    return NovaPipeline(
        scheduler=load_scheduler(folder),
        transformer=outline_transformer(
            component_folder(folder, "transformer"), None if head is None else load_extension(head, "head")
        ),
        vae=outline_autoencoder(vae) if vae.is_dir() else None,
        settings=CheckpointSettings.load(folder),
    )


def progress_bar() -> "Progress":
    """An empty progress bar with the time left, on stderr, where that is a terminal."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),  # else what is printed would leave the file or pipe that waits for it
    )


def checkpoint_defaults(model: str) -> "Defaults":
    """The defaults of a model, read without loading it."""
    from nova_video.io.checkpoints import resolve_checkpoint
    from nova_video.pipeline.settings import CheckpointSettings

    return CheckpointSettings.load(resolve_checkpoint(model)).defaults


def size_of(text: str | None) -> tuple[int | None, int | None]:
    """Height and width of WIDTHxHEIGHT."""
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d+)[x×](\d+)", text)
    if match is None:
        raise InputError(f"size is {text!r}, expected WIDTHxHEIGHT such as 768x480")
    return int(match[2]), int(match[1])
