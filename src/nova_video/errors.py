"""The one error for wrong input.

Every door of the library (command line, pipeline, loading, recipes, data) raises it before slow work starts.
"""


class InputError(ValueError):
    """Wrong input, said in one line: what was given and what is expected."""
