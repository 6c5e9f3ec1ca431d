"""The one error for wrong input, and the one for SIGTERM.

Every door of the library (command line, pipeline, loading, recipes, data) raises it before slow work starts.
"""

from collections.abc import Collection
from difflib import get_close_matches


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM: everything is put in order as after Ctrl-C."""


class InputError(ValueError):
    """Wrong input, said in one line: what was given and what is expected."""


class PartError(Exception):
    """Some of several results could not be made; the others are there."""


class MediaError(InputError):
    """A picture or clip that is not taken, and why; the caller adds the name of its file."""


def unknown(what: str, name: str, known: Collection[str], otherwise: str = "") -> InputError:
    """The error for an unknown name, with the nearest known ones, or else with `otherwise` or all."""
    words = {other.lstrip("-"): other for other in known}
    near = [words[word] for word in get_close_matches(name.lstrip("-"), words, 2, cutoff=0.65)]
    parts = [other for other in known if other.startswith(name) or other.endswith(f".{name.lstrip('-')}")]
    near = parts or near
    expected = " or ".join(near) or otherwise or f"one of {', '.join(known)}"
    return InputError(f"unknown {what} {name}: expected {expected}")


def first_line(error: object) -> str:
    """The first line of a library's error, with the next one if the first one announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
