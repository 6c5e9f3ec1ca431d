"""When frames are shown, and which of them to take at another rate.

Times are those of presentation, in seconds. One function picks frames everywhere: the nearest in time.
"""

import math
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np

T = TypeVar("T")
TimedFrame = tuple[float, T]
"""A frame and its time in seconds."""

HOLD_FACTOR = 1.5  # a frame shown for this many times the shortest ones stands for several equal ones


def nearest_frames(frames: Iterable[TimedFrame[T]], fps: float, shown: float) -> Iterator[TimedFrame[T]]:
    """`fps` frames a second of those with their times: the nearest to each moment, counted from the first.

    Of two as near, the earlier is taken. The last frame is shown for `shown` seconds.
    """
    before: TimedFrame[T] | None = None
    start, count = 0.0, 0
    for at, frame in frames:
        if before is None:
            start = at
        else:
            while start + count / fps <= (before[0] + at) / 2:
                yield start + count / fps, before[1]
                count += 1
        before = at, frame
    if before is not None:
        end = before[0] + max(shown / 2, shown - 0.5 / fps)  # where a next frame would be nearer, or the clip is over
        while start + count / fps <= end:
            yield start + count / fps, before[1]
            count += 1


def steady_rate(times: Iterable[float], told: float) -> float:
    """The rate at which frames at these rising times can be counted.

    It is `told`, what the file says, where each frame is within half a frame of its place at that rate; else, of a
    variable rate, the rate of most frames. 0 for a single frame of no told rate.
    """
    at = np.fromiter(times, float)
    if len(at) < 2:
        return told
    mean = (len(at) - 1) / (at[-1] - at[0]) if at[-1] > at[0] else 0.0
    for rate in (told, mean):
        if rate > 0 and np.abs(at - at[0] - np.arange(len(at)) / rate).max() < 0.5 / rate:
            return rate
    gaps = np.diff(at)
    gap = float(np.median(gaps[gaps > 0])) if (gaps > 0).any() else 0.0
    return 1 / gap if gap else told


def repeats(durations: list[float], sure: float) -> list[int]:
    """How often each frame of an animation comes at a steady rate. Files hold equal frames once, shown for longer.

    Durations below `sure` are too coarse to tell, and count once each.
    """
    shortest = min(durations)
    if shortest < sure:
        return [1] * len(durations)
    usual = float(np.mean([duration for duration in durations if duration < HOLD_FACTOR * shortest]))
    return [max(1, math.floor(duration / usual + 0.5)) for duration in durations]
