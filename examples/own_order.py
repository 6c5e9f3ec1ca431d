"""Own orders of revelation: raster, and a Halton sequence that spreads each set over the frame (arXiv 2503.17076).

python own_order.py                                             # one picture with each order
nova generate "a whale" --order own_order:Halton -o star.png     # run where this file is
order = "own_order:Halton"                                      # in a recipe: training reveals tokens in this order
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nova_video.model import RandomOrder


@dataclass(frozen=True)
class Raster(RandomOrder):
    """Row by row, in sets of the paper's sizes."""

    def reveal(self, uniform: Tensor, grid: tuple[int, int]) -> Tensor:
        return torch.arange(uniform.shape[1], device=uniform.device).expand(uniform.shape[:2])


@dataclass(frozen=True)
class Halton(RandomOrder):
    """Tokens in the order in which a Halton sequence first comes to them."""

    def reveal(self, uniform: Tensor, grid: tuple[int, int]) -> Tensor:
        rows, columns = grid
        number = torch.arange(8 * rows * columns, device=uniform.device)
        cell = (radical_inverse(number + 1, 2) * rows).long() * columns + (
            radical_inverse(number + 1, 3) * columns
        ).long()
        never = torch.full((rows * columns,), len(number), device=uniform.device)
        first = never.scatter_reduce(0, cell, number, "amin")
        return first.argsort(stable=True).expand(uniform.shape[:2])


def radical_inverse(number: Tensor, base: int, digits: int = 24) -> Tensor:
    """Whole numbers, with their digits mirrored behind the point: in [0, 1)."""
    share, found = 1.0, torch.zeros(number.shape, dtype=torch.float64, device=number.device)
    for _ in range(digits):
        share /= base
        found = found + share * (number % base)
        number = number // base
    return found


def main() -> None:
    from nova_video import NovaPipeline

    pipe = NovaPipeline.from_pretrained("emoji")
    for order in (RandomOrder(), Raster(), Halton()):
        picture = pipe("a whale on a blue background", num_frames=1, seed=0, order=order).images[0]
        picture.save(f"{type(order).__name__.lower()}.png")


if __name__ == "__main__":
    main()
