"""The command `nova` starts without the libraries that it has no use for, and leaves processors to others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nova_video.common import startup

CORE = ("torch", "diffusers", "transformers", "accelerate")
DATA = ("cv2", "pandas", "datasets", "pyarrow", "ray")
OPTIONAL = ("peft", "torchao", "scipy", "sklearn", "tensorboard", "matplotlib", *DATA)
PROGRAM = """
import json, os, sys
from nova_video.cli.main import main
sys.argv = ["nova", *json.loads(sys.argv[1])]
try:
    code = main()
except SystemExit as stop:
    code = stop.code
loaded = [name for name in json.loads(os.environ["NAMES"]) if sys.modules.get(name) is not None]
print(json.dumps({"code": code, "loaded": loaded, "policy": os.environ.get("OMP_WAIT_POLICY")}), file=sys.stderr)
"""


def run(arguments: list[str], names: tuple[str, ...], folder: Path) -> dict[str, object]:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(arguments)],
        cwd=folder,
        env=environment | {"NAMES": json.dumps(names)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    found: dict[str, object] = json.loads(done.stderr.splitlines()[-1])
    return found


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["words", "apple"]], ids=" ".join)
def test_what_needs_no_model_loads_none(arguments: list[str], tmp_path: Path) -> None:
    found = run(arguments, (*CORE, *OPTIONAL, "av"), tmp_path)
    assert (found["code"] or 0, found["loaded"]) == (0, [])


def test_a_picture_needs_no_optional_library(tmp_path: Path) -> None:
    setting = ["--num-frames", "1", "--sets", "1", "--diffusion-steps", "1", "--seed", "0", "-o", "made.png"]
    names = (*OPTIONAL, "diffusers.pipelines.auto_pipeline", "nova_video.training", "nova_video.evaluation")
    found = run(["generate", "a whale", *setting], names, tmp_path)
    assert found == {"code": 0, "loaded": [], "policy": "PASSIVE"}
    found = run(["info", "made.png"], (*CORE, *OPTIONAL), tmp_path)
    assert (found["code"], found["loaded"]) == (0, [])


def test_other_commands_load_no_quantisation(tmp_path: Path) -> None:
    """Importing it prints lines that say nothing about the command."""
    found = run(["encode", "nowhere", "-o", "new"], ("diffusers", "torchao"), tmp_path)
    assert (found["code"], found["loaded"]) == (2, ["diffusers"])


def test_what_was_hidden_can_be_imported_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    startup.hide({"colorsys", "json"})
    with pytest.raises(ImportError):
        import colorsys
    assert sys.modules["json"] is json  # what is loaded stays
    startup.reveal()
    import colorsys

    assert colorsys.rgb_to_hsv(0, 0, 0) == (0, 0, 0)


@pytest.mark.parametrize(
    ("parameters", "chosen", "threads"), [(13_000_000, None, 4), (645_000_000, None, 16), (13_000_000, "16", 16)]
)
def test_threads_fit_the_model(
    monkeypatch: pytest.MonkeyPatch, parameters: int, chosen: str | None, threads: int
) -> None:
    set_to = [16]
    monkeypatch.setattr(torch, "get_num_threads", lambda: set_to[-1])
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    startup.use_fitting_threads(parameters)
    assert set_to[-1] == threads
