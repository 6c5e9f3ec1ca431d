"""Errors of single clips in a network that takes several together."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from nova_video.common.errors import InputError, first_line

IN_A_ROW = 8  # clips: when so many fail one after the other, the fault is not in the clips

A = TypeVar("A")
B = TypeVar("B")


class OneByOne:
    """Runs clips together, and one by one where that fails, so that a clip costs itself alone.

    A fault of the settings or the device stops the run, since what it costs would be every clip: an InputError, too
    little memory for a single clip, or `IN_A_ROW` failures.
    """

    def __init__(self) -> None:
        self.failures = 0
        """Since the last clip that went through."""

    def __call__(self, run: Callable[[Sequence[A]], Sequence[B]], clips: Sequence[A]) -> list[B | Exception]:
        """The result of `run` for each clip, or its error."""
        if not clips:
            return []
        try:
            made = list(run(clips))
        except InputError:
            raise
        except Exception as error:
            if len(clips) > 1:
                return [one for clip in clips for one in self(run, [clip])]
            self.failures += 1
            if isinstance(error, torch.OutOfMemoryError):
                raise
            if self.failures >= IN_A_ROW:
                raise InputError(f"encoding fails for every clip: {name_error(error)}") from error
            return [error]
        self.failures = 0
        return [*made]


def name_error(error: BaseException) -> str:
    """The class of an error and what it says, in one line."""
    name, text = type(error).__name__, first_line(error)
    return name if text == name else f"{name}: {text}"
