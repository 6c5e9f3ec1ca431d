"""What the scripts of benchmarks/ share, and that each uses it: rows are on disk as soon as they are there."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from result_file import result_of, script_command, write_result

FOLDER = Path(__file__).parents[1] / "benchmarks"
OTHERS = ("tables", "plots", "scaling", "result_file")  # they measure nothing


def open_script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_script", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("output", [["--output", "/home/me/x.json"], ["--output=/home/me/x.json"], []])
def test_command_is_without_the_place_of_the_result(output: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/memory.py", "--ways", "low memory", *output, "--sets", "3"])
    assert script_command("memory") == "python benchmarks/memory.py --ways 'low memory' --sets 3"


def test_results_are_written_as_they_grow(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    result, path = result_of("made", torch.device("cpu"), rows=rows), tmp_path / "new" / "made.json"
    for number in range(2):
        rows.append({"row": number})
        write_result(path, result)
        written = json.loads(path.read_text())
        assert written["rows"] == rows
    assert written["benchmark"] == "made"
    assert written["command"].startswith("python benchmarks/made.py")
    assert written["device"].startswith("cpu")
    assert written["versions"]["torch"] == str(torch.__version__)


def test_a_run_that_is_cut_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, path = open_script("memory", monkeypatch), tmp_path / "memory.json"

    def attempt(name: str, *_: object) -> dict[str, Any]:
        if path.exists():
            raise KeyboardInterrupt
        return {"way": name}

    monkeypatch.setattr(memory, "attempt", attempt)
    with pytest.raises(KeyboardInterrupt):
        memory.main(memory.Memory(output=path, size="toy", device="cpu"))
    assert json.loads(path.read_text())["rows"] == [{"way": "low memory"}]


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in OTHERS))
def test_scripts_record_alike(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert re.search(rf'result_of\(\s*"{name}"', text)
    assert "write_result(args.output, " in text
    assert "sys.argv" not in text
