"""What one request holds while it is made, and nothing else does: modules keep weights only.

A state is all that has to travel for a generation to go on: frames so far, the frame in progress, the temporal cache,
the order of revelation and the random generators. It is made by the pipeline and advanced by `generate.py`.

Legend: B batch, N guidance passes, C latent channels, h w latent grid, L tokens of a frame, Lc temporal tokens of it,
T condition tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nova_video.model import NOVATransformer3DModel, Positions, TemporalCache, set_sizes
from nova_video.sampling.guidance import Guidance
from nova_video.sampling.random import FrameNoise, RandomState


@dataclass
class OpenFrame:
    """The frame that is being filled in."""

    condition: Tensor
    """(N * B, Lc, D) what the spatial encoder is told of it."""
    tokens: Tensor
    """(B, L, P) values, zero where not revealed."""
    embedded: Tensor
    """(B, L, D) the revealed tokens as the spatial encoder reads them: each is embedded once."""
    sets: int = 0
    """Sets revealed."""


@dataclass
class SamplingState:
    """One request. `generate_sets` advances it; between two sets it is whole."""

    num_frames: int
    """Latent frames in all, given ones included."""
    grid: tuple[int, int]
    """Latent height and width."""
    sizes: list[int]
    """Tokens of each set of a frame."""
    num_diffusion_steps: int
    guidance: Guidance
    text: Tensor
    """(N * B, T, D) condition tokens of every pass."""
    positions: Positions
    cache: TemporalCache
    random: RandomState
    noise: FrameNoise
    given: Sequence[Tensor] = ()
    """Leading frames that are given, each (B, C, h, w): the temporal encoder reads them, no sets are made."""
    order: Tensor | None = None
    """(B, L) in which tokens are revealed, the same for all frames; drawn when first needed."""
    first: Tensor | None = None
    """(N * B, Lc, D) the first frame's feature c_0, which the mixer scales and shifts for later frames."""
    frames: list[Tensor] = field(default_factory=list)
    """Finished frames, given ones included, each (B, C, h, w)."""
    open: OpenFrame | None = None
    step: int = 0
    """Sets made so far, over all frames."""

    @classmethod
    def create(
        cls,
        model: NOVATransformer3DModel,
        text: Tensor,
        *,
        num_frames: int,
        grid: tuple[int, int],
        num_sets: int,
        num_diffusion_steps: int,
        guidance: Guidance,
        random: RandomState,
        given: Sequence[Tensor] = (),
    ) -> "SamplingState":
        """A fresh request. text (N * B, T, D): condition tokens of every pass, in the order of `guidance.py`."""
        batch = text.shape[0] // guidance.passes
        positions = model.positions(num_frames, grid)
        tokens = (grid[0] // model.patch_size) * (grid[1] // model.patch_size)
        return cls(
            num_frames=num_frames,
            grid=grid,
            sizes=set_sizes(tokens, num_sets),
            num_diffusion_steps=num_diffusion_steps,
            guidance=guidance,
            text=text,
            positions=positions,
            cache=model.new_cache(text.shape[0], positions),
            random=random,
            noise=FrameNoise(random, (batch, model.config.image_dim, *grid), model.patch_size),
            given=given,
        )

    @property
    def batch(self) -> int:
        return self.noise.shape[0]

    @property
    def total_steps(self) -> int:
        """Sets of the whole request."""
        return (self.num_frames - len(self.given)) * len(self.sizes)

    def revealed(self, sets: int) -> Tensor:
        """Ids (B, V) of the tokens that the first `sets` sets reveal, in that order."""
        assert self.order is not None
        return self.order[:, : sum(self.sizes[:sets])]

    def latents(self) -> Tensor:
        """(B, C, F', h, w): the finished frames."""
        return torch.stack(self.frames, dim=2)
