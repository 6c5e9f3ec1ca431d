"""Seconds from the start of the command `nova` to its file: `python benchmarks/first_picture.py --help`.

The bundled model makes a picture and a clip, each run in a process of its own. On a busy machine the seconds of the
processor tell more than those of the clock: both are written, with the load, as JSON with device, versions and command.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from result_file import result_of, write_result

COMMANDS = {
    "picture": ["generate", "a red apple on a white background", "--num-frames", "1", "-o", "made.png"],
    "clip": ["generate", "a panda growing on a green background", "-o", "made.mp4"],
}


@dataclass(frozen=True)
class FirstPicture:
    """Time the command on this machine's processor."""

    output: Path = Path("benchmarks/measured/first_picture.json")
    """JSON file to write."""
    repeats: int = 5
    """Runs that count, after one that warms the disk's cache."""


def main(args: FirstPicture) -> None:
    rows: list[dict[str, Any]] = []
    result = result_of("first_picture", torch.device("cpu"), cores=os.cpu_count(), rows=rows)
    for name, command in COMMANDS.items():
        clock, processor = zip(*(time_process(command) for _ in range(args.repeats + 1)), strict=True)
        rows.append(
            {
                "makes": name,
                "seconds": round(statistics.median(clock[1:]), 2),
                "processor_seconds": round(statistics.median(processor[1:]), 2),
                "load": round(os.getloadavg()[0], 1),
            }
        )
        write_result(args.output, result)
    print(json.dumps(result, indent=2))


def time_process(command: list[str]) -> tuple[float, float]:
    """Seconds by the clock, and of all cores, of one run in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        words = [sys.executable, "-m", "nova_video", *command, "--device", "cpu", "--seed", "0"]
        subprocess.run(words, cwd=folder, check=True, capture_output=True)
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main(tyro.cli(FirstPicture))
