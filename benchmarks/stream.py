"""Whether time and memory of a stream without end stay flat: `python benchmarks/stream.py --help`.

Streams from a checkpoint and compares frames early and late. Results are written as JSON, with device, versions and
command. When a stream shows its first picture, `nova bench sample` measures.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from result_file import result_of, write_result

from nova_video import NovaPipeline
from nova_video.common.devices import choose_device, choose_dtype
from nova_video.pipeline.request import GenerateRequest

TENTH = 0.1  # of the frames are compared: those after the first tenth with the last ones


@dataclass(frozen=True)
class Stream:
    """Time a stream."""

    output: Path = Path(__file__).parent / "measured" / "stream.json"
    """JSON file to write."""
    model: str = "emoji"
    """A checkpoint."""
    num_frames: int = 1000
    prompt: str = "a whale moving left on a blue background"
    sets: int | None = None
    diffusion_steps: int | None = None
    device: str = "auto"


def main(args: Stream) -> None:
    device = choose_device(args.device)
    measured = time_flatness(args, device)
    result = result_of("stream", device, **measured)
    write_result(args.output, result)
    print(json.dumps(result, indent=2))


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
