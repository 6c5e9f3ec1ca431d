"""Tensors of a record, by name."""

from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def tensors_of(batch: Any) -> dict[str, Tensor]:
    """Tensors of a dataclass or a mapping by name."""
    named = {f.name: getattr(batch, f.name) for f in fields(batch)} if is_dataclass(batch) else dict(batch)
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}
