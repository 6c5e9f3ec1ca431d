"""How the pieces of one set are computed: the `Engine` protocol, and `PlainEngine`, which calls the model step by step.

`generate.py` is the one loop over every engine. `fast/fast_engine.py` has one that gives the same numbers faster.

Legend: B batch, N guidance passes, L tokens of a frame, V of them revealed, S tokens of the set, Lc temporal tokens of
the frame, D width, P values of a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nova_video.model import NOVATransformer3DModel, Positions
from nova_video.model.patches import gather_tokens
from nova_video.sampling.diffusion import Schedule, SetNoise, denoise_set
from nova_video.sampling.guidance import GuidanceRule, Prediction


class Engine(Protocol):
    """The two pieces of a set."""

    @property
    def model(self) -> NOVATransformer3DModel: ...

    def context(self, condition: Tensor, tokens: Tensor, positions: Positions) -> Tensor:
        """Condition (N * B, T, D), tokens of slot 0 (N * B, Lc, D) -> c_0 (N * B, Lc, D)."""
        ...

    def features(
        self, condition: Tensor, embedded: Tensor, visible: Tensor, ids: Tensor, positions: Positions
    ) -> Tensor:
        """The spatial features z (N * B, S, D) of the tokens `ids` (B, S).

        From condition (N * B, Lc, D), embedded tokens (B, L, D) and the ids of the visible ones (B, V)."""
        ...

    def denoise(
        self,
        features: Tensor,
        ids: Tensor,
        schedule: Schedule,
        guidance: GuidanceRule,
        noise: SetNoise,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Features (N * B, S, D) of the tokens `ids` (B, S) -> their values (B, S, P), float32."""
        ...


@dataclass(frozen=True, eq=False)
class PlainEngine:
    """The engine that calls the model step by step, as the paper has it."""

    model: NOVATransformer3DModel

    def context(self, condition: Tensor, tokens: Tensor, positions: Positions) -> Tensor:
        return self.model.encode_context(condition, tokens.unsqueeze(1), positions)[:, 0]

    def features(
        self, condition: Tensor, embedded: Tensor, visible: Tensor, ids: Tensor, positions: Positions
    ) -> Tensor:
        passes = len(condition) // len(embedded)
        z = self.model.encode_tokens(
            condition, embedded.repeat(passes, 1, 1), visible.repeat(passes, 1), positions
        )  # (N * B, L, D)
        return gather_tokens(z, ids.repeat(passes, 1))

    def denoise(
        self,
        features: Tensor,
        ids: Tensor,
        schedule: Schedule,
        guidance: GuidanceRule,
        noise: SetNoise,
        generators: Sequence[torch.Generator],
    ) -> Tensor:

        def predict(i: int, x: Tensor) -> Prediction:
            passes = guidance.passes_at(schedule.timesteps[i])
            noisy = schedule.scaled(i, x).to(features.dtype).repeat(passes, 1, 1)  # (n * B, S, P)
            timestep = torch.full((len(noisy),), schedule.timesteps[i], device=x.device)
            output = self.model.image_decoder(noisy, timestep, features[: len(noisy)])
            return guidance.combine(output, passes)

        return denoise_set(schedule, guidance, noise, ids, predict, list(generators))
