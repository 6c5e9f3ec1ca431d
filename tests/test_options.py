"""Options: a setting is one field, and everything else follows from it."""

import ast
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest

from nova_video.common.errors import InputError
from nova_video.common.option_fields import (
    Number,
    Option,
    check_options,
    facts_of,
    json_schema,
    key_of,
    option,
    option_fields,
    with_aliases,
)
from nova_video.pipeline.options import Options
from nova_video.pipeline.request import GenerateRequest

SRC = Path(__file__).parents[1] / "src"


@with_aliases
@dataclass(frozen=True, kw_only=True)
class Blur:
    radius: float = option(0.0, "Radius in pixels.", low=0, high=64, aliases=("num_pixels",))
    passes: int | None = option(None, "Passes.", low=1, unset="two")
    kind: Literal["box", "gauss"] = option("box", "Shape of the blur.")
    weight: Number | None = option(None, "Weight of the blur.", low=0, above=True)
    whole: bool | None = option(None, "Blur the whole picture.")

    def __post_init__(self) -> None:
        check_options(self)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"radius": 65}, "radius is 65: expected a number of at least 0 and at most 64"),
        ({"radius": None}, "radius is None: expected a number"),
        ({"passes": 1.5}, "passes is 1.5: expected a whole number of at least 1"),
        ({"kind": "star"}, "kind is 'star': expected box or gauss"),
        ({"weight": [(0, 1.0), (1, 0)]}, "weight is 0: expected a number of more than 0"),
        ({"weight": [(1, 1.0)]}, "weight starts at 1 s"),
        ({"whole": 1}, "whole is 1: expected True or False"),
        ({"num_pixels": -1}, "radius is -1"),
        ({"num_pixels": 2, "radius": 3}, "got radius 3 and num_pixels 2: expected one of them"),
    ],
)
def test_bounds_are_those_of_the_field(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        Blur(**values)
    assert message in str(error.value)


def test_an_alias_is_another_name() -> None:
    made: Any = Blur(num_pixels=3.0)
    assert (made.radius, made.num_pixels) == (3.0, 3.0)


def test_the_schema_says_what_the_field_says() -> None:
    schema = json_schema(Blur)
    assert schema["properties"]["radius"] == {
        "type": "number",
        "minimum": 0,
        "maximum": 64,
        "default": 0.0,
        "description": "Radius in pixels.",
    }
    assert schema["properties"]["passes"]["anyOf"] == [{"type": "integer", "minimum": 1}, {"type": "null"}]
    assert schema["properties"]["passes"]["description"] == "Passes. None: two."
    for good in ({}, {"kind": "gauss", "radius": 2}, {"weight": [[0, 1.0], [2, 3.0]]}):
        jsonschema.validate(good, schema)
    for bad in ({"kind": "star"}, {"passes": 0}, {"weight": [[0, 0.0]]}, {"radios": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)


def test_the_schema_of_a_request() -> None:
    schema = GenerateRequest.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert json.loads(json.dumps(schema)) == schema
    assert schema["properties"].keys() == option_fields(GenerateRequest).keys() >= option_fields(Options).keys()
    assert all(each["description"] for each in schema["properties"].values())
    jsonschema.validate({"prompt": [[0, "a whale"], [2, "an owl"]], "sets": 8, "preset": "fast"}, schema)


NEW_FIELD = """    sharpness: float | None = option(None, "How sharp.", low=0, high=1, metavar="SHARE")
"""
USE = """
import json, sys
from nova_video import NovaPipeline
from nova_video.cli.main import main
from nova_video.io.media import read_metadata
from nova_video.pipeline.request import GenerateRequest

model, folder = sys.argv[1:]
quick = ["--model", model, "--num-frames", "1", "--sets", "2", "--diffusion-steps", "1"]
script = f"{folder}/story.toml"
open(script, "w").write("prompt = 'a whale'\\nsharpness = 0.25\\n")
codes = [
    main(["generate", "a whale", "--sharpness", "0.5", "-o", f"{folder}/flag.png", *quick]),
    main(["generate", "--script", script, "-o", f"{folder}/script.png", *quick]),
    main(["generate", "--like", f"{folder}/script.png", "-o", f"{folder}/like.png"]),
    main(["generate", "a whale", "--sharpness", "2", "-o", f"{folder}/wrong.png", *quick]),
]
pipe = NovaPipeline.from_pretrained(model)
made = pipe("a whale", sets=2, diffusion_steps=1, sharpness=0.75)
generation = pipe.start(GenerateRequest("a whale", sets=2, diffusion_steps=1, sharpness=0.75))
generation.save(f"{folder}/state")
found = {
    "codes": codes,
    **{name: read_metadata(f"{folder}/{name}.png")["settings"]["sharpness"] for name in ("flag", "script", "like")},
    "call": made.records[0]["settings"]["sharpness"],
    "state": pipe.resume(f"{folder}/state").plan.sharpness,
    "schema": GenerateRequest.json_schema()["properties"]["sharpness"],
}
print(json.dumps(found))
"""


def test_a_new_setting_is_one_field(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """One line is added to a copy of the package; the setting is then everywhere."""
    shutil.copytree(SRC / "nova_video", tmp_path / "nova_video", ignore=shutil.ignore_patterns("models", "__pycache__"))
    path = tmp_path / "nova_video/pipeline/options.py"
    text = path.read_text()
    place = "    hold_statistics: float"
    assert place in text
    path.write_text(text.replace(place, NEW_FIELD + place))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(SRC)])}
    command = [sys.executable, "-c", USE, str(tiny_checkpoint), str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "sharpness is 2.0: expected a number of at least 0 and at most 1" in run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == {
        "codes": [0, 0, 0, 2],
        "flag": 0.5,
        "script": 0.25,
        "like": 0.25,
        "call": 0.75,
        "state": 0.75,
        "schema": {
            "anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"type": "null"}],
            "default": None,
            "description": "How sharp.",
        },
    }


ROOMS = ("sampling", "fast", "pipeline", "bench", "cli")
"""Packages that handle requests. Width, fps and motion score of media and datasets, and seeds of samples of a dataset
or a benchmark, are other settings."""
MOST_FILES = 3


def copies(tree: ast.AST, names: set[str]) -> int:
    """Arguments, assignments and keys of a setting's name whose value is an attribute of a name of it."""
    count = 0
    for node in ast.walk(tree):
        pairs: list[tuple[str, ast.expr | None]] = []
        if isinstance(node, ast.keyword):
            pairs = [(node.arg or "", node.value)]
        elif isinstance(node, ast.Dict):
            pairs = [
                (str(key.value), value)
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant)
            ]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            pairs = [(target.id, node.value)] if isinstance(target, ast.Name) else []
        count += sum(
            name in names and isinstance(value, ast.Attribute) and value.attr in names for name, value in pairs
        )
    return count


def test_no_setting_is_copied_by_hand_in_many_files() -> None:
    trees = {
        path.relative_to(SRC): ast.parse(path.read_text(encoding="utf-8"))
        for room in ROOMS
        for path in (SRC / "nova_video" / room).rglob("*.py")
        if path.name != "data.py"
    }
    assert copies(ast.parse("f(sets=args.sets)\nsets = x.num_sets\n{'sets': y.sets}"), {"sets", "num_sets"}) == 3
    found: dict[str, list[str]] = {}
    for name, each in option_fields(GenerateRequest).items():
        names = {name, key_of(each), *facts_of(each).aliases}
        found[name] = [str(path) for path, tree in trees.items() if copies(tree, names)]
    assert {name: files for name, files in found.items() if len(files) > MOST_FILES} == {}


def test_every_option_has_help_and_no_name_twice() -> None:
    names: list[str] = []
    for name, each in option_fields(GenerateRequest).items():
        facts = facts_of(each)
        assert isinstance(facts, Option)
        assert facts.help.endswith((".", ")"))
        names += {name, key_of(each), *facts.aliases}
    assert len(names) == len(set(names))
    assert len(fields(Options)) == len(option_fields(Options))
