"""What a video takes on a small card, and at what price: `python benchmarks/memory.py --help`.

Builds the released text-to-video model at its size with random weights, and a random text encoder of Phi-2's size, and
makes the 33x480x768 clip from a sentence: with all parts on the GPU and in the ways of `nova_video.pipeline.offload`.
Prints peak memory and time of each as soon as it is there, also for one that fails, and writes those so far as JSON.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from result_file import result_of, write_result
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PhiConfig, PhiModel, PreTrainedTokenizerFast

from nova_video import NovaPipeline
from nova_video.bench.configs import SIZES, build, resize_model
from nova_video.common.devices import choose_device, choose_dtype
from nova_video.common.errors import InputError
from nova_video.pipeline.offload import enable_low_memory

PROMPT = "a whale moving left on a blue background"


@dataclass(frozen=True)
class Memory:
    """Measure memory."""

    output: Path = Path("benchmarks/measured/memory.json")
    """JSON file to write."""
    size: Literal["released", "toy"] = "released"
    """33 frames of 480x768 and 2.7 B weights for the text, or a toy for a CPU."""
    ways: tuple[str, ...] = ()
    """Those whose names begin so; all if none."""
    sets: int | None = None
    diffusion_steps: int | None = None
    limit_gb: float | None = None
    """As on a card with so much memory (1e9 bytes): torch may hold no more of it. What the driver takes for a process,
    about half a GB, comes on top."""
    device: str = "auto"


def main(args: Memory) -> None:
    device = choose_device(args.device)
    dtype = choose_dtype("auto", device)
    if args.limit_gb is not None and device.type != "cuda":
        raise InputError(f"limit_gb is {args.limit_gb:g}: expected none without a GPU")
    print(f"{'way':52}{'peak GB':>9}{'held GB':>9}{'set up s':>10}{'first s':>9}{'second s':>10}", flush=True)
    chosen = [way for way in ways() if not args.ways or way[0].startswith(args.ways)]
    rows: list[dict[str, Any]] = []
    result = result_of("memory", device, size=args.size, limit_gb=args.limit_gb, rows=rows)
    for name, set_up in chosen:
        rows.append(attempt(name, set_up, args, device, dtype))
        write_result(args.output, result)


def ways() -> list[tuple[str, Callable[[NovaPipeline, torch.device], Any]]]:
    """Name, and what prepares a pipeline whose parts are in the processor's memory."""

    return [
        ("low memory", lambda pipe, device: enable_low_memory(pipe, device)),
        ("low memory, tiled", lambda pipe, device: enable_low_memory(pipe, device, tiled=True)),
        ("low memory, text in int8", lambda pipe, device: enable_low_memory(pipe, device, text_encoder="int8")),
        ("the library's whole-model offload", lambda pipe, device: pipe.enable_model_cpu_offload(device=device)),
        ("all on the device", lambda pipe, device: pipe.to(device)),
    ]


def attempt(
    name: str,
    set_up: Callable[[NovaPipeline, torch.device], Any],
    args: Memory,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """One way: a pipeline built for it, two calls; or what went wrong with it."""
    pipe: NovaPipeline | None = None
    try:
        limit_memory(None, device)
        pipe = build_pipe(args, device, dtype)
        limit_memory(args.limit_gb, device)
        start = time.perf_counter()
        set_up(pipe, device)
        ready = time.perf_counter() - start
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds = [call(pipe, args, device) for _ in range(2)]
        peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
        held = torch.cuda.max_memory_reserved() / 1e9 if device.type == "cuda" else 0.0
        row: dict[str, Any] = {"way": name, "peak_gb": round(peak, 2), "held_gb": round(held, 2)}
        row |= {"set_up_seconds": round(ready, 2), "seconds": [round(value, 3) for value in seconds]}
        print(f"{name:52}{peak:9.2f}{held:9.2f}{ready:10.2f}{seconds[0]:9.3f}{seconds[1]:10.3f}", flush=True)
    except Exception as error:
        row = {"way": name, "error": f"{type(error).__name__}: {error}"[:400]}
        print(f"{name:52} FAILED: {row['error']}", flush=True)
    del pipe
    gc.collect()  # hooks hold each other
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def limit_memory(limit_gb: float | None, device: torch.device) -> None:
    """Of the device torch may hold so much from now on; None: all of it."""
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    index = torch.cuda.current_device() if device.index is None else device.index
    whole = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0 if limit_gb is None else min(limit_gb * 1e9 / whole, 1.0), index)


def call(pipe: NovaPipeline, args: Memory, device: torch.device) -> float:
    """Seconds from the sentence to pixels."""
    start = time.perf_counter()
    pipe(
        PROMPT,
        num_frames=33 if args.size == "released" else 5,
        num_inference_steps=args.sets,
        num_diffusion_steps=args.diffusion_steps,
        generator=torch.Generator(device).manual_seed(0),
        output_type="pt",
    )
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def build_pipe(args: Memory, device: torch.device, dtype: torch.dtype) -> NovaPipeline:
    """All parts with random weights, made on the device and put into the processor's memory."""
    size = SIZES["t2v-480-0.6b"]
    layers, words = (32, 51200) if args.size == "released" else (1, 100)
    pipe = build(size if args.size == "released" else resize_model(size, 64, 96), device, dtype)
    for part in (pipe.transformer, pipe.vae):
        part.to("cpu")
    config = PhiConfig(
        vocab_size=words,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=layers,
        num_attention_heads=32,
        partial_rotary_factor=0.4,
    )
    with device:
        encoder = PhiModel(config).to(dtype).eval().requires_grad_(False)
    vocabulary = {word: index for index, word in enumerate(["[UNK]", *PROMPT.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    words_of = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    made = NovaPipeline(pipe.transformer, pipe.scheduler, pipe.vae, encoder.to("cpu"), words_of, settings=pipe.settings)
    made.set_progress_bar_config(disable=True)
    return made


if __name__ == "__main__":
    main(tyro.cli(Memory))
