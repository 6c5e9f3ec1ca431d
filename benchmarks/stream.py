"""When a stream shows its first picture, and whether time and memory stay flat: `python benchmarks/stream.py --help`.

Two things are measured. `--config t2v-480-0.6b` builds the released text-to-video model at its size with random weights
and given prompt features, and times the events of `pipe.stream(preview=True)` from its start to the first final frame.
`--model emoji --num-frames 1000` streams without end from a checkpoint and compares frames early and late. Results are
written as JSON, with device, versions and command.
"""

import json
import math
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import tyro

import nova_video
from nova_video import NovaPipeline
from nova_video.autoencoders import AutoencoderKLOpenSora
from nova_video.devices import choose_device, choose_dtype
from nova_video.generation import FrameReady, LatentPreview
from nova_video.model import NOVATransformer3DModel
from nova_video.request import GenerateRequest

TENTH = 0.1  # of the frames are compared: those after the first tenth with the last ones


@dataclass(frozen=True)
class Stream:
    """Time a stream."""

    output: Path
    """JSON file to write."""
    config: Literal["t2v-480-0.6b"] | None = None
    """The released size to build with random weights; the first frames are timed."""
    model: str = "emoji"
    """Else: a checkpoint, streamed without end."""
    num_frames: int = 1000
    """Frames of it."""
    prompt: str = "a whale moving left on a blue background"
    sets: int | None = None
    diffusion_steps: int | None = None
    device: str = "auto"


def main(args: Stream) -> None:
    device = choose_device(args.device)
    measured = time_first_frames(device) if args.config else time_flatness(args, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
    versions = {"nova_video": nova_video.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    command = shlex.join(["python", "benchmarks/stream.py", *sys.argv[1:]])
    result = {"benchmark": "stream", **measured, "device": name, "versions": versions, "command": command}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def time_first_frames(device: torch.device) -> dict[str, Any]:
    """Seconds from the start of a 480x768 stream to its first preview and its first final frame."""
    dtype = choose_dtype("auto", device)
    with device:
        transformer = NOVATransformer3DModel(
            image_size=(480, 768),
            image_base_size=(30, 48),
            video_base_size=(16, 15, 24),
            video_mixer_rank=24,
            arch=("vit_d16w1024", "vit_d32w1024", "mlp_d3w1280"),
        )
        vae = AutoencoderKLOpenSora()
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    pipe = NovaPipeline(transformer.to(dtype).eval(), scheduler, vae.to(dtype).eval())
    pipe.set_progress_bar_config(disable=True)
    features = torch.randn(20, 2560, generator=torch.Generator().manual_seed(0))
    runs = []
    for _ in range(2):  # the first warms up
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start, seen = time.perf_counter(), {}
        for event in pipe.stream(prompt_embeds=[features], num_frames=33, preview=True, output_type="np"):
            seconds = round(time.perf_counter() - start, 3)
            if isinstance(event, LatentPreview):
                seen.setdefault("first_preview_seconds", seconds)
                if not runs:
                    break
            if isinstance(event, FrameReady):
                seen["first_frame_seconds"] = seconds
                break
        runs.append(seen | {"peak_memory_gb": round(torch.cuda.max_memory_allocated() / 2**30, 2)})
    return {"config": "t2v-480-0.6b", "frames": 33, "dtype": str(dtype).removeprefix("torch."), **runs[-1]}


def time_flatness(args: Stream, device: torch.device) -> dict[str, Any]:
    """Seconds a frame and memory of a stream without end, after the first tenth of the frames and at the end."""
    pipe = NovaPipeline.from_pretrained(args.model, torch_dtype=choose_dtype("auto", device)).to(device)
    pipe.set_progress_bar_config(disable=True)
    request = GenerateRequest(
        args.prompt,
        num_frames=math.inf,
        num_inference_steps=args.sets,
        num_diffusion_steps=args.diffusion_steps,
        output_type="np",
        seed=0,
    )
    times, memory = [time.perf_counter()], []
    for index, _ in enumerate(pipe.start(request).stream()):
        times.append(time.perf_counter())
        memory.append(torch.cuda.memory_allocated() / 2**20 if device.type == "cuda" else 0.0)
        if index + 1 == args.num_frames:
            break
    count = max(1, int(args.num_frames * TENTH))
    early, late = (times[i + count] - times[i] for i in (count, len(times) - 1 - count))
    return {
        "model": args.model,
        "frames": args.num_frames,
        "seconds_a_frame": {"early": round(early / count, 4), "late": round(late / count, 4)},
        "memory_mb": {"early": round(max(memory[count : 2 * count]), 1), "late": round(max(memory[-count:]), 1)},
    }


if __name__ == "__main__":
    main(tyro.cli(Stream))
