"""Users' own parts by name: `module:Name`, imported from where the user works.

Only what the user names on the command line, in a recipe or in Python is imported, never what a checkpoint names.
"""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

from nova_video.common.errors import InputError


def load_extension(name: str, what: str) -> Any:
    """Import the object that `module:Name` names; the current folder is searched too.

    `what` is the setting, for messages. Raises InputError where the name has another form or nothing is found.
    """
    module, colon, attribute = name.partition(":")
    if not (colon and module and attribute) or not all(part.isidentifier() for part in module.split(".")):
        raise InputError(f"{what} is {name!r}: expected module:Name, such as my_parts:MyPart")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise  # the user's module is there and imports another one that is not
        raise InputError(f"{what} is {name!r}: found no module {module} in {folder} or among the packages") from None
    if not hasattr(found, attribute):
        raise InputError(f"{what} is {name!r}: {module} ({found.__file__}) has no {attribute}")
    return getattr(found, attribute)


def names_extension(name: str) -> bool:
    """True if a name has the form `module:Name`; paths, URLs and hub ids have not."""
    return re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", name) is not None


def make_extension(name: str, what: str) -> Any:
    """The object that `module:Name` names; of a class, one that is made without arguments."""
    found = load_extension(name, what)
    if not isinstance(found, type):
        return found
    try:
        return found()
    except TypeError as error:
        raise InputError(f"{what} is {name!r}, a class that takes arguments ({error}): expected an object") from None


def check_members(part: object, what: str, kind: type) -> None:
    """Raises InputError for an object that lacks what a protocol has."""
    members = [name for name in vars(kind) if not name.startswith("_")]
    missing = [name for name in members if not hasattr(part, name)]
    if missing or isinstance(part, type):
        got = f"the class {part.__name__}" if isinstance(part, type) else f"{type(part).__name__} without {missing[0]}"
        raise InputError(f"{what} is {got}: expected an object with {', '.join(members)}")


def extension_name(part: object) -> str:
    """A user's own part in records: `module:Class`, with the values of a part that shows them."""
    kind = type(part)
    shown = repr(part)
    values = shown[shown.index("(") :] if type(part).__repr__ is not object.__repr__ and "(" in shown else ""
    return f"{kind.__module__}:{kind.__qualname__}{values}"
