"""The fast engine against the plain loop, call by call in turn: `python benchmarks/pairs.py --help`.

On a machine whose speed changes from minute to minute, as shared processors' does, two rows of `nova bench sample` tell
little of each other. Here each plain call is followed by a fast one, and the ratio of every pair counts. Results are
written as JSON, with device, versions and command.
"""

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from result_file import result_of, write_result

from nova_video import NovaPipeline
from nova_video.common.devices import choose_device


@dataclass(frozen=True)
class Pairs:
    """Time both engines in turn."""

    output: Path = Path("benchmarks/measured/pairs.json")
    """JSON file to write."""
    model: str = "emoji"
    prompt: str = "a whale moving left on a blue background"
    pairs: int = 10
    num_frames: int | None = None
    device: str = "auto"


def main(args: Pairs) -> None:
    device = choose_device(args.device)
    pipe = NovaPipeline.from_pretrained(args.model).to(device)
    pipe.set_progress_bar_config(disable=True)

    def seconds(compile: bool) -> float:
        """From a sentence to latents."""
        generator = torch.Generator().manual_seed(0)
        start = time.perf_counter()
        made = pipe(args.prompt, num_frames=args.num_frames, generator=generator, output_type="latent", compile=compile)
        (made.images if made.frames is None else made.frames).cpu()
        return time.perf_counter() - start

    for compile in (True, False, True):
        seconds(compile)  # compiles, captures, fills caches
    times = [(seconds(False), seconds(True)) for _ in range(args.pairs)]
    result = result_of(
        "pairs",
        device,
        model=args.model,
        plain_seconds=statistics.median(plain for plain, _ in times),
        fast_seconds=statistics.median(fast for _, fast in times),
        times_as_fast=statistics.median(plain / fast for plain, fast in times),
        pairs=[[round(plain, 4), round(fast, 4)] for plain, fast in times],
        threads=torch.get_num_threads(),
    )
    write_result(args.output, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Pairs, description=__doc__))
