"""Guidance: how several passes of the network become one prediction. Plain functions.

Passes are batched in one order everywhere: conditional c, unconditional u and, with image guidance, i: the null prompt
with the history that u does without. Legend: B batch, N passes, S tokens of a set, P values of a token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """What is asked of guidance in one request."""

    scale: float = 5.0
    """Of the prompt; off at 1 and below."""
    trunc: float = 0.0
    """Below this timestep only the conditional pass runs."""
    renorm: float = 1.0
    """Below 1: least factor by which the prediction is scaled towards the conditional one's norm."""
    image_scale: float = 0.0
    """Of the history; above 0 there are three passes."""

    @property
    def passes(self) -> int:
        return 3 if self.image_scale > 0 else 2 if self.scale > 1 else 1

    def passes_at(self, timestep: float) -> int:
        """Passes that the denoiser runs at this timestep."""
        return 1 if timestep < self.trunc else self.passes


def combine(
    outputs: Tensor, passes: int, scale: float | Tensor, image_scale: float | Tensor = 0.0
) -> tuple[Tensor, Tensor]:
    """Outputs (N * B, S, P) of `passes` passes -> the conditional one c and the guided e, both (B, S, P) float32.

    Two passes: e = u + scale (c - u). Three: e = u + scale (c - i) + image_scale (i - u).
    """
    cond, *others = outputs.float().chunk(passes)
    if not others:
        return cond, cond
    if len(others) == 1:
        return cond, others[0] + scale * (cond - others[0])
    null, image = others
    return cond, null + scale * (cond - image) + image_scale * (image - null)


def renorm_ratio(cond: Tensor, guided: Tensor, least: float, outside: Tensor | float = 0.0) -> Tensor:
    """clamp(||c|| / ||e||, least, 1) of each sample, (B, S, P) -> (B, 1, 1).

    `outside` (B, 1, 1) is the squared norm of what lies outside the set, the same in both: norms are of the full frame.
    """
    c, e = (x.square().sum((1, 2), keepdim=True) + outside for x in (cond, guided))
    return (c / e.clamp_min(torch.finfo(e.dtype).tiny)).sqrt().clamp(least, 1.0)
