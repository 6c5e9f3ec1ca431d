"""Quick starts of the command `nova` in a process of its own.

Threads sleep while they wait, and diffusers does not load the large optional libraries that sampling does not use: it
loads them whole wherever they are installed.
"""

import os
import sys
from collections.abc import Iterable

SMALL_MODEL = 100_000_000  # parameters, below which more threads than these do not help on a processor
SMALL_MODEL_THREADS = 4

_hidden_names: list[str] = []


def sleep_while_waiting() -> None:
    """Let OpenMP's threads sleep between parallel regions, unless the user has chosen.

    Threads that spin slow each other down on a busy machine. torch reads the variable when it is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def hide(names: Iterable[str]) -> None:
    """Make libraries look absent to those that are imported before `reveal`."""
    for name in names:
        if name not in sys.modules:
            sys.modules[name] = None  # type: ignore[assignment]  # documented: an import of it fails
            _hidden_names.append(name)


def reveal() -> None:
    """Let what was hidden be imported again."""
    while _hidden_names:
        sys.modules.pop(_hidden_names.pop(), None)


def use_fitting_threads(parameters: int) -> None:
    """Limit torch's threads for a small model on a processor with many cores, unless the user has chosen."""
    import torch

    if parameters < SMALL_MODEL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), SMALL_MODEL_THREADS))
