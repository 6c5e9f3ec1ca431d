"""Which tokens are known when: reveal order, set sizes and mask ratios, shared by training and sampling (section 3.2).

`Order` is what a user's own order of revelation has to have; `draw_order` and `set_sizes_of` ask one, for training and
sampling alike. Plain functions without weights. Draws take an explicit generator.

Legend: B samples, L tokens of a frame on a grid of rows and columns.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nova_video.common.errors import InputError
from nova_video.common.extensions import check_members


def set_sizes(num_tokens: int, num_sets: int) -> list[int]:
    """Tokens of each set under the cosine schedule, which sum to L: m_i - m_{i+1}, m_i = round(L cos(pi i / 2n)).

    Empty sets are left out, so the list may be shorter than `num_sets`.
    """
    masked = [round(num_tokens * math.cos(math.pi / 2 * i / num_sets)) for i in range(num_sets + 1)]
    sizes = (now - after for now, after in itertools.pairwise(masked))
    return [size for size in sizes if size > 0]


def random_order(uniform: Tensor) -> Tensor:
    """Order of revelation (B, L) from uniform numbers (B, L, 1): their argsort, the same for all frames."""
    return uniform.squeeze(-1).argsort(dim=-1)


class Order(Protocol):
    """Which tokens each set of a frame reveals: an order of all tokens, cut into sets (section 3.2).

    Training reveals the first tokens of the order and learns the others; sampling reveals set after set.
    """

    def reveal(self, uniform: Tensor, grid: tuple[int, int]) -> Tensor:
        """Uniform numbers (B, L, 1) of the tokens on a grid (rows, columns) -> token ids (B, L) in order.

        Ids count row by row. On a GPU this may be captured in a graph: it makes its tensors on `uniform.device`.
        """
        ...

    def sizes(self, tokens: int, sets: int) -> list[int]:
        """The number of tokens of each set, at least 1 each; all are `tokens`. `sets` is what the request asks for."""
        ...


@dataclass(frozen=True)
class RandomOrder:
    """The paper's order: random, in sets that grow by the cosine schedule."""

    def reveal(self, uniform: Tensor, grid: tuple[int, int]) -> Tensor:
        return random_order(uniform)

    def sizes(self, tokens: int, sets: int) -> list[int]:
        return set_sizes(tokens, sets)


RANDOM_ORDER = RandomOrder()


def check_order(order: object) -> None:
    """Raises InputError for an object that is no `Order`."""
    check_members(order, "order", Order)


def draw_order(order: Order, uniform: Tensor, grid: tuple[int, int]) -> Tensor:
    """Ids (B, L) in the order of revelation, from uniform numbers (B, L, 1). Raises InputError where one is missing."""
    ids = order.reveal(uniform, grid)
    if type(order) is RandomOrder or (ids.is_cuda and torch.cuda.is_current_stream_capturing()):
        return ids
    every = torch.arange(uniform.shape[1], device=ids.device)
    whole = ids.shape == uniform.shape[:2] and ids.dtype == torch.int64
    if not whole or not bool((ids.sort(dim=1).values == every).all()):
        raise InputError(
            f"order {type(order).__name__} gave {str(ids.dtype).removeprefix('torch.')} {tuple(ids.shape)}: expected"
            f" every one of {len(every)} token ids once, in int64 {tuple(uniform.shape[:2])}"
        )
    return ids


def set_sizes_of(order: Order, num_tokens: int, num_sets: int) -> list[int]:
    """Tokens of each set. Raises InputError where an order's sets are not all the tokens."""
    sizes = order.sizes(num_tokens, num_sets)
    if sum(sizes) != num_tokens or any(size < 1 for size in sizes):
        raise InputError(
            f"order {type(order).__name__} gave sets of {sum(sizes)} tokens in all: expected {num_tokens}, each of 1 or"
            " more"
        )
    return sizes


def mask_ratios(count: int, generator: torch.Generator | None = None, device: torch.device | None = None) -> Tensor:
    """The paper's mask ratios (count,): a normal of mean 1 and std 0.25, truncated to [0.7, 1].

    Drawn by inverting the normal's distribution function between the two bounds.
    """
    low, high = (0.5 * (1 + math.erf((bound - 1.0) / 0.25 / math.sqrt(2))) for bound in (0.7, 1.0))
    u = torch.rand(count, generator=generator, device=device) * (high - low) + low
    return (1.0 + 0.25 * math.sqrt(2) * torch.erfinv(2 * u - 1)).clamp(0.7, 1.0)
