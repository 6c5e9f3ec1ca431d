"""The state of one request while it is made: nothing else keeps any, modules hold weights only.

A state is all that has to travel for a generation to go on: frames so far, the frame in progress, the order of
revelation and the random generators; the temporal cache follows from them. It is made by the pipeline, advanced by
`generate.py` and saved by `generation.py`.

Legend: B batch, N guidance passes, C latent channels, h w latent grid, L tokens of a frame, Lc temporal tokens of it,
T condition tokens, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nova_video.model import RANDOM_ORDER, NOVATransformer3DModel, Order, Positions, TemporalCache
from nova_video.model.masking import set_sizes_of
from nova_video.sampling.context import Context, Statistics
from nova_video.sampling.guidance import GuidanceRule
from nova_video.sampling.presets import EXACT, SpeedOptions
from nova_video.sampling.random import FrameNoise, RandomState


@dataclass(frozen=True)
class Segment:
    """Text and guidance of the frames from one of them on; the first segment starts at frame 0."""

    start: int
    text: Tensor
    """(N * B, T, D) condition tokens of every pass."""
    guidance: GuidanceRule
    begin: int = 0
    """First frame that is read: after a change of prompt the past begins a little before it."""


@dataclass(frozen=True)
class GivenFrame:
    """A latent frame that is there from the start, whole or in part."""

    latents: Tensor
    """(B, C, h, w)"""
    mask: Tensor | None = None
    """(L,) bool: tokens that stay. None: none of the tokens is asked to change, or all may (see `redraw`)."""
    redraw: int = 0
    """Tokens made anew, the last ones in the order of revelation; 0: the frame stays as it is."""


@dataclass
class OpenFrame:
    """The frame that is being filled in."""

    condition: Tensor
    """(N * B, Lc, D) the temporal encoder's feature, which the spatial encoder reads."""
    tokens: Tensor
    """(B, L, P) values, zero where not revealed."""
    embedded: Tensor
    """(B, L, D) the revealed tokens as the spatial encoder reads them: each is embedded once."""
    order: Tensor
    """(B, L) in which tokens are revealed, given ones first."""
    num_given: int
    """Tokens given."""
    sizes: list[int]
    """Tokens of each set in which the others are revealed."""
    sets: int = 0
    """Sets revealed."""
    differences: Tensor | None = None
    """((N - 1) * B, S of the next sets, D) the other passes' features less the conditional pass's.

    They are kept where the other passes are not encoded for every set."""

    def revealed(self, sets: int) -> Tensor:
        """Ids (B, V) of the tokens that are there after `sets` sets, in order of revelation."""
        return self.order[:, : self.num_given + sum(self.sizes[:sets])]


@dataclass
class SamplingState:
    """One request. `generate_sets` advances it; between two sets it is whole."""

    num_frames: int | None
    """Latent frames in all, given ones included; None: without end."""
    grid: tuple[int, int]
    """Latent height and width."""
    num_tokens: int
    """L"""
    num_sets: int
    """Sets that a frame is revealed in."""
    num_diffusion_steps: int
    speed: SpeedOptions
    segments: Sequence[Segment]
    context: Context
    positions: Positions
    cache: TemporalCache
    random: RandomState
    noise: FrameNoise
    given: Mapping[int, GivenFrame] = field(default_factory=dict)
    """By frame."""
    order_rule: Order = RANDOM_ORDER
    """Says in which order and in what sets tokens are revealed."""
    order: Tensor | None = None
    """(B, L) in which tokens are revealed, the same for all frames; drawn when first needed."""
    cached: list[int] | None = None
    """Earlier frames in the cache, behind text and BOS; None: the cache is empty."""
    built: int = 0
    """The number of them that entered in one pass; the others came one by one."""
    cached_segment: int = 0
    """Whose text is in the cache."""
    anchor: Tensor | None = None
    """(N * B, Lc, D) the feature c_0 behind that text, which the mixer scales and shifts for later frames."""
    frames: dict[int, Tensor] = field(default_factory=dict)
    """Finished frames (B, C, h, w) by number, given ones included, without those let go by `forget`."""
    noised_history: dict[int, Tensor] = field(default_factory=dict)
    """Frames with the noise that the temporal encoder reads them with, where it does."""
    reference: Statistics | None = None
    """Statistics of the first frames, where later ones are drawn to them."""
    done: int = 0
    """Finished frames."""
    open: OpenFrame | None = None
    step: int = 0
    """Sets made so far, over all frames."""

    @classmethod
    def create(
        cls,
        model: NOVATransformer3DModel,
        segments: Sequence[Segment],
        *,
        num_frames: int | None,
        grid: tuple[int, int],
        num_sets: int,
        num_diffusion_steps: int,
        random: RandomState,
        passes: int,
        context: Context | None = None,
        speed: SpeedOptions = EXACT,
        given: Mapping[int, GivenFrame] | None = None,
        order_rule: Order = RANDOM_ORDER,
    ) -> "SamplingState":
        """A fresh request. Every segment's text has `passes` rows a sample, in the order of `guidance.py`."""
        rows = segments[0].text.shape[0]
        context = context or Context()
        positions = model.positions(context.slots(num_frames), grid)
        return cls(
            num_frames=num_frames,
            grid=grid,
            num_tokens=(grid[0] // model.patch_size) * (grid[1] // model.patch_size),
            num_sets=num_sets,
            num_diffusion_steps=num_diffusion_steps,
            speed=speed,
            segments=segments,
            context=context,
            positions=positions,
            cache=model.new_cache(rows, positions),
            random=random,
            noise=FrameNoise(random, (rows // passes, model.config.image_dim, *grid), model.patch_size),
            given=given or {},
            order_rule=order_rule,
        )

    @property
    def batch(self) -> int:
        return self.noise.shape[0]

    @property
    def passes(self) -> int:
        """Rows a sample in the encoders: enough for every segment's guidance."""
        return self.segments[0].text.shape[0] // self.batch

    @property
    def finished(self) -> bool:
        return self.num_frames is not None and self.done >= self.num_frames

    def segment_at(self, frame: int) -> int:
        """Index of the segment that steers a frame."""
        return max(index for index, segment in enumerate(self.segments) if segment.start <= frame)

    def sizes(self, frame: int) -> list[int]:
        """Tokens of each set of a frame."""
        given = self.given.get(frame)
        return self.sizes_of(self.num_tokens if given is None else given.redraw)

    def sizes_of(self, tokens: int) -> list[int]:
        """Tokens of each set of a frame in which so many are made."""
        return set_sizes_of(self.order_rule, tokens, self.num_sets)

    @property
    def total_steps(self) -> int | None:
        """Sets of the whole request; None: without end."""
        if self.num_frames is None:
            return None
        given = [frame for frame in self.given if frame < self.num_frames]
        return (self.num_frames - len(given)) * len(self.sizes_of(self.num_tokens)) + sum(
            len(self.sizes(frame)) for frame in given
        )

    def forget(self, before: int) -> None:
        """Let go of frames before this one that the temporal encoder will not read again."""
        begin = self.segments[self.segment_at(self.done)].begin
        needed = {*self.context.read(self.done, begin), *range(self.done - self.context.carry, self.done)}
        for kept in (self.frames, self.noised_history):
            for frame in [frame for frame in kept if frame < before and frame not in needed]:
                del kept[frame]

    def latents(self) -> Tensor:
        """(B, C, F', h, w): the finished frames."""
        return torch.stack([self.frames[frame] for frame in sorted(self.frames)], dim=2)
