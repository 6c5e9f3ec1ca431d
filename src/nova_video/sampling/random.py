"""Random numbers of one request, from explicit generators in a fixed order.

The order is what makes a seed give one picture: the posterior noise of a given image, the order of revelation, then for
every set a frame of noise and, with DDPM, a frame of noise at every step but the last.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nova_video.common.checks import quote
from nova_video.common.errors import InputError
from nova_video.model import patchify

Generators = torch.Generator | Sequence[torch.Generator]


@dataclass(frozen=True)
class RandomState:
    """One generator for the whole batch or, so that a sample does not depend on its neighbours, one for each."""

    generators: Sequence[torch.Generator]
    device: torch.device
    dtype: torch.dtype

    def uniform(self, *shape: int) -> Tensor:
        return self._draw(torch.rand, shape, 1)[0]

    def normal(self, *shape: int) -> Tensor:
        return self._draw(torch.randn, shape, 1)[0]

    def normals(self, count: int, *shape: int) -> Tensor:
        """`count` draws of `normal`, one after the other: (count, *shape)."""
        return self._draw(torch.randn, shape, count)

    def _draw(self, draw: Callable[..., Tensor], shape: tuple[int, ...], count: int) -> Tensor:
        """Drawn where the generator lives, so that its numbers are the same whatever the model's device."""
        share = (shape[0] // len(self.generators), *shape[1:])
        parts = [
            torch.stack([draw(share, generator=g, device=g.device, dtype=self.dtype) for _ in range(count)])
            for g in self.generators
        ]
        return torch.cat(parts, dim=1).to(self.device)


@dataclass(frozen=True)
class FrameNoise:
    """Normal noise of a full latent frame, as its tokens."""

    random: RandomState
    shape: tuple[int, int, int, int]
    """(B, C, h, w)"""
    patch: int

    def draw(self, count: int) -> Tensor:
        """(count, B, L, P) float32: `count` frames of noise, in the order of drawing."""
        noise = self.random.normals(count, *self.shape)
        return patchify(noise.flatten(0, 1), self.patch).unflatten(0, (count, self.shape[0])).float()


def make_generators(
    given: Generators | None, seed: int | None, batch: int, device: torch.device
) -> list[torch.Generator]:
    """The generators of a call: given ones, one for all clips or one for each, or one with the seed."""
    if given is None:
        seed = int(torch.randint(2**63 - 1, ())) if seed is None else seed
        return [torch.Generator(device).manual_seed(seed)]
    if isinstance(given, torch.Generator):
        return [given]
    generators = list(given) if isinstance(given, Sequence) else []
    if len(generators) not in (1, batch) or not all(isinstance(one, torch.Generator) for one in generators):
        got = f"a list of {len(generators)}" if isinstance(given, Sequence) else quote(given)
        raise InputError(f"generator: got {got}: expected one, or {batch}, one a picture")
    return generators
