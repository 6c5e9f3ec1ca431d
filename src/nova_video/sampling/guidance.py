"""Guidance: how several passes of the network become one prediction (section 4.1 and classifier-free guidance).

`Guidance` is the paper's rule, in plain functions. `GuidanceRule` is what a user's own has to have. Passes are batched
in one order everywhere: conditional c, unconditional u and, in a third pass, i: the null prompt with the history that u
does without. Legend: B batch, N passes, S tokens of a set, P values of a token.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nova_video.common.errors import InputError
from nova_video.common.extensions import check_members


class Prediction(NamedTuple):
    """One step's prediction, in the parts that `guidance_renorm` treats differently: all (B, S, P) float32."""

    cond: Tensor
    """The conditional pass's own: c."""
    prompted: Tensor
    """The prompt's part of the guided one, which is rescaled to the norm of c."""
    history: Tensor | None = None
    """The history's part, which is added as it is; None without image guidance."""

    def guided(self, ratio: Tensor | None = None) -> Tensor:
        """The guided prediction e; `ratio` (B, 1, 1) is that of `renorm_ratio`, None for 1."""
        prompted = self.prompted if ratio is None else self.prompted * ratio
        return prompted if self.history is None else prompted + self.history


class GuidanceRule(Protocol):
    """A rule of guidance for one request. It keeps nothing between calls."""

    @property
    def passes(self) -> int:
        """Passes that the encoders run: 1 (c), 2 (c, u) or 3 (c, u, i)."""
        ...

    def passes_at(self, timestep: float) -> int:
        """Passes that the denoiser runs at this timestep (0 to 1000): the first ones, at most `passes`."""
        ...

    def combine(self, outputs: Tensor, passes: int) -> Prediction:
        """Outputs (N * B, S, P) of `passes` passes -> `Prediction(c, e)`: the step follows e (B, S, P)."""
        ...


@dataclass(frozen=True)
class Guidance:
    """The rule of the paper and of the released implementation, with its settings."""

    scale: float = 5.0
    """The prompt's weight; off at 1 and below."""
    trunc: float = 0.0
    """Below this timestep only the conditional pass runs."""
    renorm: float = 1.0
    """Below 1: least factor by which the prompt's part is scaled towards the conditional prediction's norm."""
    image_scale: float = 0.0
    """The history's weight; above 0 there are three passes."""

    @property
    def passes(self) -> int:
        return 3 if self.image_scale > 0 else 2 if self.scale > 1 else 1

    def passes_at(self, timestep: float) -> int:
        """Passes that the denoiser runs at this timestep."""
        return 1 if timestep < self.trunc else self.passes

    def combine(self, outputs: Tensor, passes: int) -> Prediction:
        """Outputs (N * B, S, P) of `passes` passes -> the prediction of a step."""
        return combine(outputs, passes, self.scale, self.image_scale)


CONDITIONAL = Guidance(scale=1.0)


def check_rule(rule: Any) -> None:
    """Raises InputError for an object that is no `GuidanceRule`."""
    check_members(rule, "guidance_rule", GuidanceRule)
    if rule.passes not in (1, 2, 3):
        raise InputError(f"guidance_rule is {type(rule).__name__} with {rule.passes} passes: expected 1, 2 or 3")


def least_ratio(rule: GuidanceRule) -> float:
    """The least factor of `renorm_ratio`, 1 for a rule that does not rescale."""
    return rule.renorm if isinstance(rule, Guidance) else 1.0


def combine(outputs: Tensor, passes: int, scale: float | Tensor, image_scale: float | Tensor = 0.0) -> Prediction:
    """Outputs (N * B, S, P) of `passes` passes -> the prediction of a step.

    Two passes: e = u + scale (c - u). Three: e = renorm(u + scale (c - i)) + image_scale (i - u), where renorm is the
    factor of `renorm_ratio`.
    """
    cond, *others = outputs.float().chunk(passes)
    if not others:
        return Prediction(cond, cond)
    if len(others) == 1:
        return Prediction(cond, others[0] + scale * (cond - others[0]))
    null, image = others
    return Prediction(cond, null + scale * (cond - image), image_scale * (image - null))


def pass_weights(guidance: Guidance, device: torch.device) -> Tensor:
    """(N,) weights of the passes in the guided prediction: without renorm, `combine` is linear in its outputs."""
    units = torch.eye(guidance.passes, device=device).unsqueeze(1)  # (N, 1, N): each pass gives its own unit vector
    return guidance.combine(units, guidance.passes).guided().flatten()


def renorm_ratio(cond: Tensor, prompted: Tensor, least: float, outside: Tensor | float = 0.0) -> Tensor:
    """clamp(||c|| / ||prompted||, least, 1) of each sample, (B, S, P) -> (B, 1, 1).

    `outside` (B, 1, 1) is the squared norm of what lies outside the set, the same in both: norms are of the full frame.
    """
    c, e = (x.square().sum((1, 2), keepdim=True) + outside for x in (cond, prompted))
    return (c / e.clamp_min(torch.finfo(e.dtype).tiny)).sqrt().clamp(least, 1.0)
