"""Timelines: what counts as one, what holds when, and what is refused."""

import math
import re

import numpy as np
import pytest

from nova_video.common.errors import InputError
from nova_video.common.timeline import Timeline, is_timeline

SPIN: list[tuple[float, str]] = [(0, "moving"), (2.0, "spinning")]


def test_what_is_a_timeline() -> None:
    for value in (SPIN, [[0, 5.0], [1.5, 2.0]], [(np.float32(0), 1)], Timeline.of("x", 3)):
        assert is_timeline(value)
    for value in ("a whale", ["a", "b"], ["ab", "cd"], [SPIN, SPIN], [], 5.0, None, [(0, 1, 2)], [(True, "a")]):
        assert not is_timeline(value)


def test_constants() -> None:
    for value in ("a whale", 5.0, None):
        timeline = Timeline.of("prompt", value)
        assert timeline.is_constant
        assert (timeline.at(0), timeline.at(1e9)) == (value, value)
        timeline.check_end("prompt", 0.1)
    assert Timeline.of("prompt", [(0, "a")]) == Timeline.of("prompt", "a")


def test_values_hold_from_their_second_on() -> None:
    timeline = Timeline.of("prompt", SPIN)
    assert not timeline.is_constant
    assert timeline == Timeline((0.0, 2.0), ("moving", "spinning"))
    assert Timeline.of("prompt", timeline) is timeline
    assert Timeline.of("prompt", [list(pair) for pair in SPIN]) == timeline
    assert [timeline.at(seconds) for seconds in (-1, 0, 1.99, 2.0, 50)] == ["moving"] * 3 + ["spinning"] * 2
    assert [timeline.index_at(seconds) for seconds in (0, 2)] == [0, 1]
    for fps in (7, 11.988, 12, 24, 30):  # a frame's time is met however its quotient rounds
        changes = Timeline.of("x", [(0, 0), *((frame / fps, frame) for frame in range(1, 200))])
        assert [changes.at(frame * (1 / fps)) for frame in range(200)] == list(range(200))


def test_the_end() -> None:
    timeline = Timeline.of("prompt", SPIN)
    timeline.check_end("prompt", 2.1)
    timeline.check_end("prompt", math.inf)
    for end in (2.0, 1.5):
        with pytest.raises(InputError, match=rf"^prompt changes at 2 s: expected times before the clip's end, {end:g}"):
            timeline.check_end("prompt", end)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "motion_flow is an empty timeline"),
        ([(1.0, 5)], "motion_flow starts at 1 s: expected a timeline whose first time is 0"),
        ([(0, 5), (2, 3), (1, 4)], "motion_flow changes at 1 s after 2 s: expected times that rise"),
        ([(0, 5), (0, 3)], "motion_flow changes at 0 s after 0 s"),
        ([(-1, 5)], "motion_flow changes at -1 s: expected a time of at least 0"),
        ([(0, 5), (math.inf, 3)], "motion_flow changes at inf s"),
        ([(math.nan, 5)], "motion_flow changes at nan s"),
        ([(0, 5), 3], "motion_flow has 3 in its timeline: expected (seconds, value) pairs"),
        ([(0, 5), (10**400, 3)], "motion_flow changes at 1000000000"),
        ([("0", 5)], "motion_flow has ('0', 5) in its timeline"),
        ([(0, 5, 6)], "motion_flow has (0, 5, 6) in its timeline"),
    ],
)
def test_wrong_timelines(value: object, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Timeline.of("motion_flow", value)
