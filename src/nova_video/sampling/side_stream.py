"""Work that a GPU does beside other work: on a stream of its own."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


@contextmanager
def beside(device: torch.device, work: Callable[[], Sequence[Tensor]]) -> Iterator[list[Tensor]]:
    """The tensors that `work` makes, on a GPU beside what this block launches; they are read behind it.

    It may read what is there before the block. Elsewhere it is just called first.
    """
    if device.type != "cuda":
        yield list(work())
        return
    main, side = torch.cuda.current_stream(device), side_stream(device)
    side.wait_stream(main)
    try:
        with torch.cuda.stream(side):
            made = work()
        results = [torch.empty_like(tensor) for tensor in made]  # of the stream that reads, and later reuses, them
        with torch.cuda.stream(side):
            for result, tensor in zip(results, made, strict=True):
                result.copy_(tensor)
        yield results
    finally:
        main.wait_stream(side)


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: what it works with is its own memory, used again in its own order."""
    return torch.cuda.Stream(device)
