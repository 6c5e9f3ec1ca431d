"""The one error for wrong input.

Every door of the library (command line, pipeline, loading, recipes, data) raises it before slow work starts.
"""


class InputError(ValueError):
    """Wrong input, said in one line: what was given and what is expected."""


def first_line(error: object) -> str:
    """What an error of a library says first; the next line too, where that is what the first one announces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
