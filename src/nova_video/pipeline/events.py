"""The events of a stream with `preview`: final frames, previews of latent frames, and partial frames."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class FrameReady:
    """A pixel frame that is final."""

    index: int
    frame: Any
    """In the form of `output_type`. With output_type "latent" it is a latent frame, and `index` counts those."""


@dataclass(frozen=True, eq=False)
class LatentPreview:
    """The newest latent frame, before its pixels are final."""

    latent_frame: int
    latents: Tensor
    """(B, C, h, w)"""
    decode: Callable[[Tensor], Any] = field(repr=False)

    @property
    def frame(self) -> Any:
        """The latent frame as a picture by itself. Reading it decodes it."""
        return self.decode(self.latents)


@dataclass(frozen=True, eq=False)
class PartialFrame:
    """The present latent frame with one more set of it revealed."""

    latent_frame: int
    step: int
    """Counts the sets of the whole request."""
    latents: Tensor
    """(B, C, h, w), zero where nothing is revealed."""
    revealed: Tensor
    """(B, h / 2, w / 2) bool."""
    decode: Callable[[Tensor], Any] = field(repr=False)

    @property
    def frame(self) -> Any:
        """A picture of the frame so far. Reading it decodes it."""
        return self.decode(self.latents)


Event = FrameReady | LatentPreview | PartialFrame
