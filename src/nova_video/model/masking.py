"""Which tokens are known when: reveal order, set sizes and mask ratios, shared by training and sampling (section 3.2).

Plain functions without weights. Draws take an explicit generator.
"""

import itertools
import math

import torch
from torch import Tensor


def set_sizes(num_tokens: int, num_sets: int) -> list[int]:
    """Tokens of each set under the cosine schedule: m_i - m_{i+1} with m_i = round(L cos(pi i / 2n)); sums to L.

    Empty sets are left out, so the list may be shorter than `num_sets`.
    """
    masked = [round(num_tokens * math.cos(math.pi / 2 * i / num_sets)) for i in range(num_sets + 1)]
    sizes = (now - after for now, after in itertools.pairwise(masked))
    return [size for size in sizes if size > 0]


def random_order(uniform: Tensor) -> Tensor:
    """Order of revelation (B, L) from uniform numbers (B, L, 1): their argsort, the same for all frames."""
    return uniform.squeeze(-1).argsort(dim=-1)


def mask_ratios(count: int, generator: torch.Generator | None = None, device: torch.device | None = None) -> Tensor:
    """(count,) mask ratios from a normal of mean 1 and std 0.25 truncated to [0.7, 1], as the paper trains with.

    Drawn by inverting the normal's distribution function between the two bounds.
    """
    low, high = (0.5 * (1 + math.erf((bound - 1.0) / 0.25 / math.sqrt(2))) for bound in (0.7, 1.0))
    u = torch.rand(count, generator=generator, device=device) * (high - low) + low
    return (1.0 + 0.25 * math.sqrt(2) * torch.erfinv(2 * u - 1)).clamp(0.7, 1.0)
