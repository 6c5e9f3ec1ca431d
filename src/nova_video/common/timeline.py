"""Values that change while a clip goes on: sentences, motion scores, guidance, each from its second on.

`request.py` reads them from what people write, `[(0, "a whale moving left"), (2.0, "a whale spinning")]`; a value that
never changes is a timeline of one entry.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any, Generic, TypeGuard, TypeVar

from nova_video.common.checks import is_finite, quote
from nova_video.common.errors import InputError

T = TypeVar("T")

ROUNDING = 1e-6  # seconds: a frame's time, a quotient, may come out this much before the change that it meets


def is_timeline(value: object) -> bool:
    """A sequence of (seconds, value) pairs; not a string, and not a list of several timelines."""
    if isinstance(value, Timeline):
        return True
    return _is_list(value) and len(value) > 0 and all(_is_pair(entry) for entry in value)


@dataclass(frozen=True)
class Timeline(Generic[T]):
    """A value that changes in time."""

    times: tuple[float, ...]
    """Seconds from which each value holds: the first is 0, and they rise."""
    values: tuple[T, ...]

    @classmethod
    def of(cls, name: str, value: object) -> "Timeline[Any]":
        """A constant, or a sequence of (seconds, value) pairs; `name` is for messages."""
        if isinstance(value, Timeline):
            return value
        if not _is_list(value):
            return cls((0.0,), (value,))  # type: ignore[arg-type]  # what T is, the caller knows
        if len(value) == 0:
            raise InputError(f"{name} is an empty timeline: expected (seconds, value) pairs, the first at 0")
        for entry in value:
            if not _is_pair(entry):
                raise InputError(f"{name} has {entry!r} in its timeline: expected (seconds, value) pairs")
            if not (is_finite(entry[0]) and entry[0] >= 0):
                time = f"{entry[0]:g}" if is_finite(entry[0]) else quote(entry[0])
                raise InputError(f"{name} changes at {time} s: expected a time of at least 0")
        times = tuple(float(entry[0]) for entry in value)
        if times[0] != 0:
            raise InputError(f"{name} starts at {times[0]:g} s: expected a timeline whose first time is 0")
        for before, after in pairwise(times):
            if after <= before:
                raise InputError(f"{name} changes at {after:g} s after {before:g} s: expected times that rise")
        return cls(times, tuple(entry[1] for entry in value))

    @property
    def is_constant(self) -> bool:
        return len(self.values) == 1

    def index_at(self, seconds: float) -> int:
        """Which of the values holds then."""
        return max(bisect_right(self.times, seconds + ROUNDING) - 1, 0)

    def at(self, seconds: float) -> T:
        return self.values[self.index_at(seconds)]

    def changed(self, seconds: float, value: T) -> "Timeline[T]":
        """The timeline with another value from a time on, up to the next change that it has."""
        kept = [
            (time, own) for time, own in zip(self.times, self.values, strict=True) if abs(time - seconds) > ROUNDING
        ]
        entries = sorted([*kept, (seconds, value)], key=lambda entry: entry[0])
        return Timeline(tuple(time for time, _ in entries), tuple(own for _, own in entries))

    def check_end(self, name: str, seconds: float) -> None:
        """Raises where a change would come at the clip's end or later."""
        if self.times[-1] > 0 and self.times[-1] >= seconds - ROUNDING:
            raise InputError(
                f"{name} changes at {self.times[-1]:g} s: expected times before the clip's end, {seconds:g} s"
            )


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_pair(entry: object) -> bool:
    """(number, anything); lists count, as JSON and TOML have no tuples."""
    return _is_list(entry) and len(entry) == 2 and isinstance(entry[0], Real) and not isinstance(entry[0], bool)
