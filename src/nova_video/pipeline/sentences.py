"""The sentences of a request as features: what they are at every moment, and in place of guidance's empty prompt.

Legend: B pictures or clips of the call, T text tokens of a sentence, W width of the text encoder's features.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from nova_video.common.timeline import Timeline

Texts = tuple[Tensor, ...]
"""Features (T, W) of one sentence a prompt."""


@dataclass(frozen=True, eq=False)
class Sentences:
    """The features of a request's sentences. Equal sentences are one tensor."""

    moments: Timeline[Texts]
    """The sentences of every moment. The first moment is later than 0 once earlier ones are of no use."""
    negatives: Texts
    """The sentences that guidance pushes away from, one a prompt; none, if the request is not guided."""
    pictures: int
    """Pictures or clips of each prompt."""

    @property
    def prompts(self) -> int:
        """Prompts of the request."""
        return len(self.moments.values[0])

    def since(self, seconds: float) -> "Sentences":
        """The sentences without what holds before this time alone."""
        first = self.moments.index_at(seconds)
        times = (max(seconds, self.moments.times[first]), *self.moments.times[first + 1 :])
        return replace(self, moments=Timeline(times, self.moments.values[first:]))
