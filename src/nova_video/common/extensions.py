"""Users' own parts by name: `module:Name`, imported from where the user works.

Only what the user names on the command line, in a recipe or in Python is imported, never what a checkpoint names.
"""

import importlib
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
