"""A clip that fails in a network costs itself alone; a fault of all of them stops the run."""

from collections.abc import Sequence

import pytest
import torch

from nova_video.common.errors import InputError
from nova_video.data.failures import IN_A_ROW, OneByOne, name_error


def double(clips: Sequence[int]) -> list[int]:
    """A network that fails on negative numbers."""
    if any(clip < 0 for clip in clips):
        raise RecursionError("too deep")
    return [2 * clip for clip in clips]


def test_one_clip_fails_alone() -> None:
    run = OneByOne()
    assert run(double, []) == []
    first, second, third = run(double, [1, -1, 3])
    assert (first, third) == (2, 6)
    assert isinstance(second, RecursionError)
    assert name_error(second) == "RecursionError: too deep"
    assert name_error(MemoryError()) == "MemoryError"


def test_what_fails_for_all_stops() -> None:
    run = OneByOne()
    for _ in range(3):  # one that goes through shows that the network works
        assert len(run(double, [-1] * (IN_A_ROW - 1) + [1])) == IN_A_ROW
    with pytest.raises(InputError, match="encoding fails for every clip: RecursionError: too deep"):
        run(double, [-1] * IN_A_ROW)


def test_faults_of_settings_and_device_stop() -> None:
    for error in (InputError("no such model"), torch.OutOfMemoryError("out of memory")):

        def fail(clips: Sequence[int], error: Exception = error) -> list[int]:
            raise error

        with pytest.raises(type(error)):
            OneByOne()(fail, [1])
