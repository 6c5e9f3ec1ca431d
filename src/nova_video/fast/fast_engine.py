"""The sampler's engine for speed: the numbers of `PlainEngine` to rounding.

Everything that does not depend on the noisy values is computed for all denoising steps at once, and the spatial
encoder's last block for the set's tokens alone. What is left are functions of tensors, which a runner calls or, on
CUDA, captures and replays (`graphs.py`), with compiled blocks. An engine is made for each request; runners belong to a
pipeline and outlive it.

Legend: B batch, N guidance passes, L tokens of a frame, V of them revealed, S tokens of the set, Lc temporal tokens of
the frame, D width, P values of a token, K denoising steps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor

from nova_video.common.notices import warn_once
from nova_video.fast.arrange import arrange_for_sampling
from nova_video.fast.blocks import compile_function
from nova_video.fast.fused import run_fused, supports
from nova_video.fast.known import unknown_part
from nova_video.fast.modulations import modulations, predict
from nova_video.model import NOVATransformer3DModel, Positions
from nova_video.model.denoiser import Denoiser
from nova_video.model.embeddings import Rotary
from nova_video.sampling import guidance as formulas
from nova_video.sampling.diffusion import Schedule, SetNoise, denoise_set, linear_step, predicted_data
from nova_video.sampling.engine import PlainEngine
from nova_video.sampling.guidance import Guidance, GuidanceRule, Prediction, pass_weights

ROWS_AT_ONCE = 1 << 16  # tokens times steps whose modulations are computed together: bounds their memory

Inputs = Mapping[str, Tensor | None]


class Runner(Protocol):
    """Runs functions of tensors. Equal keys and shapes mean the same function."""

    compiled: bool
    """Blocks are compiled first."""
    fused: bool
    """The denoiser's steps run in kernels of their own where they can (`fused.py`)."""
    set_multiple: int
    """Sets are padded to a multiple of it, so that a few captured functions serve sets of all sizes."""

    def arranged(self, model: NOVATransformer3DModel) -> NOVATransformer3DModel:
        """The model over the same weights, with compiled blocks where the runner compiles."""
        ...

    def unknown(self, model: NOVATransformer3DModel) -> str | None:
        """The first thing about a model that the engine would not follow, as `unknown_part` says it, or None."""
        ...

    def __call__(self, key: tuple[object, ...], function: Callable[..., Tensor], inputs: Inputs) -> Tensor: ...


class DirectRunner:
    """Calls each function at once."""

    fused = False

    def __init__(self, compiled: bool = False, set_multiple: int = 1) -> None:
        self.compiled, self.set_multiple = compiled, set_multiple

    def arranged(self, model: NOVATransformer3DModel) -> NOVATransformer3DModel:
        return arrange_for_sampling(model) if self.compiled else model

    def unknown(self, model: NOVATransformer3DModel) -> str | None:
        return unknown_part(model)

    def __call__(self, key: tuple[object, ...], function: Callable[..., Tensor], inputs: Inputs) -> Tensor:
        return function(**inputs)


@dataclass(frozen=True, eq=False)
class FastEngine:
    """The fast engine: equal numbers up to rounding, for exactly the classes that it was written for.

    A subclass may compute otherwise. A model with one, and a set under a guidance of another class, go the plain way.
    """

    model: NOVATransformer3DModel
    runner: Runner
    _once: dict[object, Tensor] = field(default_factory=dict)

    @cached_property
    def plain(self) -> PlainEngine | None:
        """The engine for a model that the fast way does not know in every part; else None."""
        reason = self.runner.unknown(self.model)
        if reason is None:
            return None
        warn_once(f"{reason}: the plain loop computes it, which is slower")
        return PlainEngine(self.model)

    def context(self, condition: Tensor, tokens: Tensor, positions: Positions) -> Tensor:
        if self.plain is not None:
            return self.plain.context(condition, tokens, positions)
        rotary = positions.video_rotary
        inputs = {
            "text": condition,
            "tokens": tokens,
            "cos": None if rotary is None else rotary.cos,
            "sin": None if rotary is None else rotary.sin,
        }
        return self.runner(("context",), partial(encode_first, self._arranged, positions), inputs)

    @cached_property
    def _arranged(self) -> NOVATransformer3DModel:
        return self.runner.arranged(self.model)

    def features(
        self, condition: Tensor, embedded: Tensor, visible: Tensor, ids: Tensor, positions: Positions
    ) -> Tensor:
        if self.plain is not None:
            return self.plain.features(condition, embedded, visible, ids, positions)
        rotary = positions.image_rotary
        inputs = {
            "condition": condition,
            "embedded": embedded,
            "visible": visible,
            "ids": pad_set(ids, self.runner.set_multiple, -1),
            "space": positions.image_space,
            "cos": None if rotary is None else rotary.cos,
            "sin": None if rotary is None else rotary.sin,
        }
        encode = partial(encode_set, self._arranged, positions)
        return self.runner(("features",), encode, inputs)[:, : ids.shape[1]]

    def denoise(
        self,
        features: Tensor,
        ids: Tensor,
        schedule: Schedule,
        guidance: GuidanceRule,
        noise: SetNoise,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        if (slower := self._why_plain(schedule, guidance)) is not None:
            if slower:
                warn_once(slower)
            return PlainEngine(self.model).denoise(features, ids, schedule, guidance, noise, generators)
        assert isinstance(guidance, Guidance)
        plain = guidance.renorm >= 1 and schedule.rows is not None
        size = ids.shape[1]
        if plain:  # norms would count what is padded
            multiple = self.runner.set_multiple
            features, start, fresh = (pad_set(x, multiple, -2) for x in (features, noise.start, noise.fresh))
            noise = SetNoise(start, fresh, noise.outside)
        inputs = {
            "features": features,
            "start": noise.start,
            "fresh": noise.fresh,
            "rows": schedule.rows,
            "times": self._times(schedule, features),
        }
        denoiser, compile = self.model.image_decoder, self.runner.compiled
        fused = plain and self.runner.fused and supports(denoiser, features[..., 0].numel(), guidance.passes)
        if fused:
            inputs["weights"] = self._weights(guidance, features.device)
        else:
            inputs["scales"] = self._scales(guidance, features.device)
        denoise: Callable[..., Tensor]
        if not plain:
            inputs |= {"ids": ids, "outside": noise.outside}
            predict = compile_function(guided_prediction) if compile else guided_prediction
            denoise = partial(run_any, denoiser, schedule, guidance, predict)
        elif fused:
            denoise = partial(run_fused, denoiser, schedule, guidance)
        else:
            denoise = partial(
                run_steps, denoiser, schedule, guidance, compile_function(guided_step) if compile else guided_step
            )
        passes = tuple(guidance.passes_at(t) for t in schedule.timesteps)
        key = ("denoise", schedule.key, passes, guidance.renorm)  # scales are inputs: one graph serves them all
        return self.runner(key, denoise, inputs)[:, :size]

    def _why_plain(self, schedule: Schedule, guidance: GuidanceRule) -> str | None:
        """The reason why only the plain loop can compute a set; None if the engine can."""
        if self.plain is not None:
            return ""  # said already
        if schedule.rows is None:
            name = type(schedule.scheduler).__name__
            return f"{name} takes its steps itself: they are those of the plain loop, which are slower"
        if type(guidance) is not Guidance:
            return (
                f"{type(guidance).__name__} is a guidance of its own: the plain loop takes its steps, which are slower"
            )
        return None

    def _times(self, schedule: Schedule, like: Tensor) -> Tensor:
        """(K, width) embedded timesteps, once a request."""
        if schedule.key not in self._once:
            steps = torch.tensor(schedule.timesteps, device=like.device)
            self._once[schedule.key] = self.model.image_decoder.time_cond_embed.embed_times(steps, like.dtype)
        return self._once[schedule.key]

    def _scales(self, guidance: Guidance, device: torch.device) -> Tensor:
        """(2,) of the prompt and of the history, once a request."""
        if guidance not in self._once:
            self._once[guidance] = torch.tensor([guidance.scale, guidance.image_scale], device=device)
        return self._once[guidance]

    def _weights(self, guidance: Guidance, device: torch.device) -> Tensor:
        """(N,) of the passes, once a request."""
        key = ("weights", guidance)
        if key not in self._once:
            self._once[key] = pass_weights(guidance, device)
        return self._once[key]


def pad_set(tokens: Tensor, multiple: int, dim: int) -> Tensor:
    """Pads a set's tokens along `dim` with copies of the first one, up to a multiple."""
    more = -tokens.shape[dim] % multiple
    return torch.cat([tokens, *[tokens.narrow(dim, 0, 1)] * more], dim=dim) if more else tokens


# Functions of tensors -------------------------------------------------------------------------------------------------


def encode_first(
    model: NOVATransformer3DModel,
    positions: Positions,
    *,
    text: Tensor,
    tokens: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
) -> Tensor:
    """The temporal encoder on a frame that is the only one: (N * B, Lc, D)."""
    rotary = None if cos is None or sin is None else Rotary(cos, sin)
    positions = replace(positions, video_rotary=rotary)
    return model.encode_context(text, tokens.unsqueeze(1), positions)[:, 0]


def encode_set(
    model: NOVATransformer3DModel,
    positions: Positions,
    *,
    condition: Tensor,
    embedded: Tensor,
    visible: Tensor,
    ids: Tensor,
    space: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> Tensor:
    """The spatial encoder, for the tokens `ids` alone: (N * B, S, D)."""
    passes = len(condition) // len(embedded)
    rotary = None if cos is None or sin is None else Rotary(cos, sin)
    return model.encode_tokens(
        condition,
        in_passes(embedded, passes),
        in_passes(visible, passes),
        replace(positions, image_space=space, image_rotary=rotary),
        in_passes(ids, passes),
    )


def in_passes(x: Tensor, passes: int) -> Tensor:
    """x (B, ...) for each of N passes: (N * B, ...), without a copy of a batch of one."""
    return x.expand(passes, *x.shape).flatten(0, 1)


def run_steps(
    denoiser: Denoiser,
    schedule: Schedule,
    guidance: Guidance,
    step: Callable[..., tuple[Tensor, Tensor | None]],
    *,
    features: Tensor,
    start: Tensor,
    fresh: Tensor,
    rows: Tensor,
    times: Tensor,
    scales: Tensor,
) -> Tensor:
    """All steps of a set whose tokens are stepped by themselves: start (B, S, P) -> values (B, S, P)."""
    x, drawn = start, 0
    before = torch.zeros_like(start) if schedule.multistep else None
    modulations = Modulations(denoiser, denoiser.time_cond_embed.condition_proj(features), times)
    for i, t in enumerate(schedule.timesteps):
        noise = fresh[drawn] if schedule.noisy[i] else None
        drawn += schedule.noisy[i]
        passes = guidance.passes_at(t)
        known = modulations.at(i, passes * len(x))
        x, before = step(denoiser, x, known, rows[i], scales, noise, passes, schedule.clip, before)
    return x


def guided_step(
    denoiser: Denoiser,
    x: Tensor,
    modulations: list[Tensor],
    row: Tensor,
    scales: Tensor,
    noise: Tensor | None,
    passes: int,
    clip: float | None,
    before: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Takes one step: x (B, S, P) float32 under the modulations of n passes -> the next x.

    If the data predicted by the step `before` are given, the data that this step predicts come too.
    """
    guided = guided_prediction(denoiser, x, modulations, scales, passes).guided()
    data = None if before is None else predicted_data(x, guided, row)
    return linear_step(x, guided, row, clip, noise, before), data


def guided_prediction(
    denoiser: Denoiser, x: Tensor, modulations: list[Tensor], scales: Tensor, passes: int
) -> Prediction:
    """x (B, S, P) float32 under the modulations of n passes -> their prediction."""
    output = predict(denoiser, torch.cat([x.to(modulations[0].dtype)] * passes), modulations)
    return formulas.combine(output, passes, scales[0], scales[1])


def run_any(
    denoiser: Denoiser,
    schedule: Schedule,
    guidance: Guidance,
    prediction: Callable[..., Prediction],
    *,
    features: Tensor,
    ids: Tensor,
    start: Tensor,
    fresh: Tensor,
    outside: Tensor,
    rows: Tensor | None,
    times: Tensor,
    scales: Tensor,
) -> Tensor:
    """All steps of a set in any other way: `denoise_set` with the modulations computed beforehand."""
    modulations = Modulations(denoiser, denoiser.time_cond_embed.condition_proj(features), times)

    def predict(i: int, x: Tensor) -> Prediction:
        passes = guidance.passes_at(schedule.timesteps[i])
        return prediction(denoiser, schedule.scaled(i, x), modulations.at(i, passes * len(x)), scales, passes)

    given = replace(schedule, rows=rows)
    return denoise_set(given, guidance, SetNoise(start, fresh, outside), ids, predict)


class Modulations:
    """The modulations of all steps: nothing of them depends on the noisy values."""

    def __init__(self, denoiser: Denoiser, condition: Tensor, times: Tensor) -> None:
        """condition (N * B, S, width) projected, times (K, width)."""
        self.denoiser, self.condition, self.times = denoiser, condition, times
        self.chunk = max(1, ROWS_AT_ONCE // condition[..., 0].numel())
        self.first = 0
        self.computed: list[Tensor] = []

    def at(self, step: int, rows: int) -> list[Tensor]:
        """Modulations of a step for `rows` rows: (rows, S, 3 width) a block, and (rows, S, 2 width) of the head."""
        if not self.computed or step >= self.first + len(self.computed[0]):
            self.first = step
            u = self.times[step : step + self.chunk, None, None] + self.condition  # (K', N * B, S, width)
            self.computed = modulations(self.denoiser, u)
        return [modulation[step - self.first, :rows] for modulation in self.computed]
