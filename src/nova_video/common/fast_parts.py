"""The one place where the package finds its fast parts, and goes without them where they are left out."""

import importlib
from typing import Any

from nova_video.common.errors import InputError
from nova_video.common.notices import warn_once

FAST = "nova_video.fast"


def find_fast(part: str) -> Any | None:
    """The module `part` of `nova_video.fast`; None, with one line in the log, where that package is left out."""
    try:
        return importlib.import_module(f"{FAST}.{part}")
    except ModuleNotFoundError as error:
        if error.name not in (FAST, f"{FAST}.{part}"):
            raise
        warn_once(f"{FAST} is left out of this installation: everything is computed plainly, which is slower")
        return None


def require_fast(part: str, what: str) -> Any:
    """The module `part` of `nova_video.fast`; InputError that `what` needs it, where that package is left out."""
    if (found := find_fast(part)) is None:
        raise InputError(f"{what} needs {FAST}, which this installation lacks: expected a complete one")
    return found
