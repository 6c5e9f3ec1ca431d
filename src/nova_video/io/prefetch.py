"""A thread that makes items before they are needed: streams sample frames while earlier ones are decoded and used."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")

WAIT = 0.1  # seconds between two looks at whether the consumer has gone


@dataclass(frozen=True)
class _Failure:
    error: BaseException


class _End:
    pass


@contextlib.contextmanager
def prefetch(
    items: Iterator[T], depth: int, inside: contextlib.AbstractContextManager[object]
) -> Iterator[Iterator[T]]:
    """Makes `items` in a thread, at most `depth` of them early. Leaving the block ends the thread.

    The thread enters `inside`, such as a CUDA stream for what it computes. An error in the thread is raised where the
    consumer asks for the next item. Gradients are off in the thread, and it uses as many CPU threads as its consumer.
    """
    ready: queue.Queue[T | _Failure | _End] = queue.Queue(maxsize=depth)
    gone = threading.Event()
    cores = torch.get_num_threads()

    def put(item: T | _Failure | _End) -> None:
        while not gone.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=WAIT)
                break

    def work() -> None:
        torch.set_num_threads(cores)
        try:
            with torch.no_grad(), inside:
                for item in items:
                    put(item)
                    if gone.is_set():
                        return
            put(_End())
        except BaseException as error:  # also what is no Exception must reach the consumer
            put(_Failure(error))

    def consume() -> Iterator[T]:
        while not isinstance(item := ready.get(), _End):
            if isinstance(item, _Failure):
                raise item.error
            yield item

    thread = threading.Thread(target=work, name="nova-sampling", daemon=True)
    thread.start()
    try:
        yield consume()
    finally:
        gone.set()
        thread.join()
