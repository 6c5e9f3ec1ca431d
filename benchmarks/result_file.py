"""What the scripts in benchmarks/ share: how their results are written down, as far as they are there."""

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nova_video.bench.sample import device_name, versions
from nova_video.io.files import atomic_path


def script_command(name: str) -> str:
    """This run of benchmarks/NAME.py as typed, but for --output: where a result goes is no part of it."""
    words = iter(sys.argv[1:])
    kept = []
    for word in words:
        if word == "--output":
            next(words, None)
        elif not word.startswith("--output="):
            kept.append(word)
    return shlex.join(["python", f"benchmarks/{name}.py", *kept])


def result_of(name: str, device: torch.device, **values: Any) -> dict[str, Any]:
    """The values with the script's name and what is told of every run. Lists among them can still grow."""
    made = {"device": device_name(device), "versions": versions(), "command": script_command(name)}
    return {"benchmark": name, **values, **made}


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """As JSON, in place of what was there: after every row, so that a run that is cut keeps those it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
