"""The text of `nova train RECIPE --help`: every setting of a recipe, from the records of `recipe.py`."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from nova_video.common.option_fields import facts_of, is_option
from nova_video.training.recipe import Recipe


def recipe_help(recipe: Recipe) -> str:
    """Every setting as an option: its value in the recipe, its default and what it means."""
    return "\n".join(_help_lines(type(recipe), recipe, "--"))


def _help_lines(kind: type[Any], values: Any, prefix: str) -> Iterator[str]:
    meanings = _meanings(kind)
    for each in sorted(dataclasses.fields(kind), key=lambda each: dataclasses.is_dataclass(getattr(values, each.name))):
        value, name = getattr(values, each.name), each.name.replace("_", "-")
        if dataclasses.is_dataclass(value):  # a table, after all settings outside of one
            yield from ("", meanings.get(each.name) or " ".join((inspect.getdoc(value) or "").split()))
            yield from _help_lines(type(value), value, f"{prefix}{name}.")
            continue
        default = "" if value == each.default else f"  (default: {_as_line(each.default)})"
        yield f"{prefix}{name} {_as_line(value)}{default}"
        if meaning := meanings.get(each.name) or (facts_of(each).help if is_option(each) else None):
            yield textwrap.fill(meaning, 100, initial_indent="    ", subsequent_indent="    ")


def _meanings(kind: type[Any]) -> dict[str, str]:
    """The string under each field of a dataclass and of those it inherits from."""
    found: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, reversed(kind.__mro__)):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        for line, after in pairwise(getattr(body, "body", [])):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                text = after.value if isinstance(after, ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    found[line.target.id] = " ".join(text.value.split())
    return found


def _as_line(value: object) -> str:
    """A value as it is typed after its option."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
