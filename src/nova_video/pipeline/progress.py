"""Where one request stands: its plan, the sampler's state, and what it was given. All of it can be saved."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nova_video.pipeline.plan import Plan
from nova_video.pipeline.sentences import Sentences
from nova_video.sampling.state import SamplingState


@dataclass(frozen=True, eq=False)
class GivenPixels:
    """Leading frames as they were given, at the size and rate of the plan."""

    frames: Tensor
    """(1 or B, T, H, W, 3), uint8 or float32 in [0, 1]."""
    filled: Tensor | None = None
    """(T, H, W) bool: pixels that are made anew. None: all stay."""

    def over(self, made: Tensor, first: int) -> Tensor:
        """Decoded frames (B, T, 3, H, W) in [0, 1], the first of them number `first`, with given pixels put back."""
        stop = min(self.frames.shape[1], first + made.shape[1])
        if stop <= first:
            return made
        part = self.part(first, stop, made.shape[0]).to(made.device)
        if self.filled is not None:
            filled = self.filled[first:stop, None].to(made.device)  # (T, 1, H, W)
            part = torch.where(filled, made[:, : stop - first], part)
        return torch.cat([part, made[:, stop - first :]], dim=1)

    def part(self, first: int, stop: int, batch: int) -> Tensor:
        """Frames `first` to `stop` as (B, T, 3, H, W) float32 in [0, 1]."""
        frames = self.frames[:, first:stop]
        unit = frames.float() / 255 if frames.dtype == torch.uint8 else frames
        return unit.permute(0, 1, 4, 2, 3).expand(batch, -1, -1, -1, -1)


@dataclass(eq=False)
class RequestProgress:
    """Where one request stands."""

    plan: Plan
    state: SamplingState
    output_type: str
    unbatched: bool
    """One clip of one prompt: streams yield its frames by themselves, not in a list of one."""
    seeds: tuple[int, ...]
    sentences: Sentences
    given: GivenPixels | None = None
    emitted: int = 0
    """Frames handed out by streams: pixel frames or, with output_type "latent", latent frames."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Anything that JSON can hold; saved with the state."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """How each picture or clip is made, for the files that the result is saved to."""

    @property
    def total_steps(self) -> int | None:
        """Sets of the whole request; None for a clip without end."""
        return self.state.total_steps
