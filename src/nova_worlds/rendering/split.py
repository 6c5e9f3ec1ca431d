"""The combinations that are held out: one tenth, chosen by a hash of the words.

They are the same on every machine and for every set.

A clip is known by (object, motion, background), a single image counts as a clip staying still, and an image of two
objects is known by (object, relation, object). Speeds, sizes and places do not matter.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from nova_worlds.rendering.lexicon import COLORS, MOTIONS, RELATIONS

HELD_OUT_ONE_IN = 10


def is_held_out(*parts: str) -> bool:
    """True if the combination of these words is never trained on."""
    digest = hashlib.sha256("|".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def held_out_clips(names: Sequence[str]) -> Tensor:
    """(objects, motions, backgrounds) bool."""
    flags = [is_held_out(name, motion, color) for name in names for motion in MOTIONS for color in COLORS]
    return torch.tensor(flags).view(len(names), len(MOTIONS), len(COLORS))


def held_out_pairs(names: Sequence[str]) -> Tensor:
    """(objects, relations, objects) bool: first object, relation, second object."""
    flags = [is_held_out(first, relation, second) for first in names for relation in RELATIONS for second in names]
    return torch.tensor(flags).view(len(names), len(RELATIONS), len(names))
