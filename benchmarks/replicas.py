"""Times a server of one replica and one of several on Ray: `python benchmarks/replicas.py --help`.

Each server is begun anew, on this machine alone, and is asked for as many clips at once. Each replica has as many
threads: the ratio is what more replicas are worth where cores are left. Rows are written as JSON, with the machine's
load before each, since other work on it takes from both.
"""

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from result_file import result_of, write_result

from nova_video.bench.server_client import own_server
from nova_video.common.errors import InputError

LOOKS = 20  # of whether all replicas are ready


@dataclass(frozen=True)
class Replicas:
    """Time replicas of a server."""

    output: Path = Path("benchmarks/measured/replicas.json")
    """JSON file to write."""
    model: str = "emoji"
    replicas: tuple[int, ...] = (1, 2)
    threads: int = 1
    """Threads of each replica."""
    clips: int = 16
    """Clips that are asked for at once, and counted."""
    frames: int = 17
    repeats: int = 2
    """Rounds of all servers; the best of each counts."""


@dataclass(frozen=True)
class ReplicaRow:
    """One server in one round."""

    replicas: int
    clips: int
    seconds: float
    clips_a_minute: float
    load: float
    """Running processes of the machine before, on average over a minute."""


def main(args: Replicas) -> int:
    rows: list[dict[str, Any]] = []
    best: dict[int, float] = {}
    facts = {"model": args.model, "cores": os.cpu_count(), "threads": args.threads, "frames": args.frames}
    result = result_of("replicas", torch.device("cpu"), **facts, rows=rows)
    for _ in range(args.repeats):
        for count in args.replicas:
            row = measure(args, count)
            rows.append(asdict(row))
            print(f"{count} replicas: {row.clips_a_minute:.1f} clips a minute, load {row.load:.1f} before", flush=True)
            best[count] = max(best.get(count, 0.0), row.clips_a_minute)
            result["best"] = {str(each): rate for each, rate in best.items()}
            result["ratio"] = round(best[max(best)] / best[min(best)], 3)
            write_result(args.output, result)
    print(f"{result['ratio']:.2f} times as many")
    print(args.output)
    return 0


def measure(args: Replicas, count: int) -> ReplicaRow:
    """The time from the first request to the last result, after every replica has made a clip."""
    load = os.getloadavg()[0]
    flags = [
        "--model",
        args.model,
        "--engine",
        "ray",
        "--replicas",
        str(count),
        "--threads",
        str(args.threads),
        "--warm",
    ]
    with own_server(flags) as server:
        for _ in range(LOOKS * count):  # each may be answered by another replica
            server.client.wait_until_ready()
        began = time.monotonic()
        wanted = {"prompt": "a panda growing on a green background", "num_frames": args.frames}
        ids = [server.client.create_video({**wanted, "seed": seed})["id"] for seed in range(args.clips)]
        ended = [server.client.wait(id) for id in ids]
        seconds = time.monotonic() - began
    if failed := [job for job in ended if job["status"] != "completed"]:
        raise InputError(f"{len(failed)} of {args.clips} clips were not made: {failed[0]['error']}")
    return ReplicaRow(count, args.clips, round(seconds, 2), round(60 * args.clips / seconds, 2), round(load, 2))


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Replicas, description=__doc__)))
