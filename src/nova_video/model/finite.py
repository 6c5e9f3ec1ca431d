"""Which weight of a module is not finite: asked when a result is not, to name the cause."""

from contextlib import suppress
from itertools import chain

from torch import nn


def first_not_finite(module: nn.Module) -> str | None:
    """Name of the first weight or buffer with NaN or infinity in it, or None."""
    for name, value in chain(module.named_parameters(), module.named_buffers()):
        with suppress(NotImplementedError, RuntimeError):  # kinds of 8 bit weights that cannot be asked
            if value.is_floating_point() and not value.is_meta and not bool(value.isfinite().all()):
                return name
    return None
