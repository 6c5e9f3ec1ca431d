"""Denoising one set of tokens with the checkpoint's own diffusers scheduler.

The denoiser is token-wise, so only the set's tokens are computed. Random numbers are still drawn for the full frame and
the set's are picked out: that is what makes a seed give the released implementation's picture. All of a set's are drawn
before it is denoised, in the order in which the steps use them; what is left is a function of tensors, which an engine
(`fast/fast_engine.py`) may call or capture.

Legend: B batch, N guidance passes, L tokens of a frame, S tokens of the set, P values of a token, K steps.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from nova_video.model.patches import gather_tokens, scatter_tokens
from nova_video.sampling.guidance import GuidanceRule, Prediction, least_ratio, renorm_ratio
from nova_video.sampling.random import FrameNoise

Predict = Callable[[int, Tensor], Prediction]
"""At step k, noisy tokens (B, S, P) -> their prediction."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """The steps in which every set of a request is denoised."""

    scheduler: Any
    """The request's own copy, standing at its first step."""
    num_steps: int
    """Steps in the scheduler's own counting: those of second order evaluate the model twice in a step."""
    timesteps: tuple[float, ...]
    rows: Tensor | None
    """(K, 8) float32: the steps of `linear_step`. None: the scheduler steps itself."""
    clip: float | None
    """Bound of the data that a step predicts."""
    noisy: tuple[bool, ...]
    """Steps that add a frame of noise."""
    start_scale: float = 1.0
    """Standard deviation of the noise that the first step begins with."""
    multistep: bool = False
    """The steps of `linear_step` take the data that the step before predicted."""

    @classmethod
    def of(cls, scheduler: Any, num_steps: int, device: torch.device) -> "Schedule":
        scheduler.set_timesteps(num_steps)
        timesteps = tuple(float(t) for t in scheduler.timesteps)
        rows, clip, noisy = None, None, (False,) * len(timesteps)
        if type(scheduler) is DDPMScheduler:
            rows = torch.tensor([ddpm_row(scheduler, t) for t in scheduler.timesteps], dtype=torch.float32)
            clip = scheduler.config.clip_sample_range if scheduler.config.clip_sample else None
            noisy = tuple(t > 0 for t in timesteps)
        elif type(scheduler) is FlowMatchEulerDiscreteScheduler and not scheduler.config.stochastic_sampling:
            steps = scheduler.sigmas.double().diff().tolist()
            rows = torch.tensor([row(0.0, dt, 0.0, 1.0, 1.0) for dt in steps], dtype=torch.float32)
        elif is_linear_solver(scheduler):
            rows = solver_rows(scheduler)
        scale = float(getattr(scheduler, "init_noise_sigma", 1.0))
        multistep = rows is not None and isinstance(scheduler, DPMSolverMultistepScheduler)
        return cls(
            scheduler, num_steps, timesteps, None if rows is None else rows.to(device), clip, noisy, scale, multistep
        )

    @cached_property
    def key(self) -> tuple[object, ...]:
        """Equal for schedules that step alike."""
        config = tuple(sorted((name, str(value)) for name, value in self.scheduler.config.items()))
        return (type(self.scheduler).__name__, self.timesteps, config)

    @property
    def is_flow(self) -> bool:
        return isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler)

    @property
    def draws(self) -> bool:
        """The scheduler draws random numbers of its own as it steps."""
        return self.rows is None and "generator" in inspect.signature(self.scheduler.step).parameters

    def scaled(self, i: int, x: Tensor) -> Tensor:
        """Noisy values as the model reads them at step `i`."""
        if self.rows is None and hasattr(self.scheduler, "scale_model_input"):
            scaled: Tensor = self.scheduler.scale_model_input(x, self.scheduler.timesteps[i])
            return scaled
        return x

    def begin(self) -> None:
        """Back to the first step, for the next set."""
        if self.rows is None:
            self.scheduler.set_timesteps(self.num_steps)


def ddpm_row(scheduler: DDPMScheduler, t: Tensor) -> tuple[float, ...]:
    """The row of `linear_step` at timestep `t`: equations 6 and 7 of DDPM (arXiv 2006.11239).

    From the library's tables and settings; its own step can only draw noise for the tokens that it is handed.
    """
    config = scheduler.config
    previous = int(scheduler.previous_timestep(t))
    kept = float(scheduler.alphas_cumprod[t])
    kept_before = float(scheduler.alphas_cumprod[previous]) if previous >= 0 else 1.0
    alpha = kept / kept_before
    if config.prediction_type == "epsilon":
        data = (1 / kept**0.5, -((1 - kept) ** 0.5) / kept**0.5)
    elif config.prediction_type == "v_prediction":
        data = (kept**0.5, -((1 - kept) ** 0.5))
    else:
        data = (0.0, 1.0)
    own = alpha**0.5 * (1 - kept_before) / (1 - kept)
    share = kept_before**0.5 * (1 - alpha) / (1 - kept)
    deviation = math.sqrt(max((1 - kept_before) / (1 - kept) * (1 - alpha), 1e-20)) if t > 0 else 0.0
    return row(*data, deviation, own, share)


def is_linear_solver(scheduler: Any) -> bool:
    """DPM-Solver++ (arXiv 2211.01095) of first or second order, as an ordinary differential equation's solver."""
    if type(scheduler) is not DPMSolverMultistepScheduler:  # a subclass may step otherwise: it does so itself
        return False
    config = scheduler.config
    return config.algorithm_type == "dpmsolver++" and config.solver_order <= 2 and not config.thresholding


def solver_rows(scheduler: DPMSolverMultistepScheduler) -> Tensor:
    """The rows of `linear_step` (K, 8): what the library's own steps make of x, the output and the data before."""
    rows = []
    x, output, before = torch.eye(3)
    for t in scheduler.timesteps:
        scheduler.model_outputs[-1] = before
        shares = scheduler.step(output, t, x, return_dict=False)[0].tolist()
        a, b, _ = scheduler.model_outputs[-1].tolist()
        rows.append(row(a, b, 0.0, shares[0] - shares[1] / b * a, shares[1] / b, shares[2]))
    return torch.tensor(rows, dtype=torch.float32)


def row(a: float, b: float, deviation: float, own: float, share: float, before: float = 0.0) -> tuple[float, ...]:
    """The numbers of `linear_step`, with and without its clamp."""
    return (own + share * a, share * b, deviation, own, share, a, b, before)


def linear_step(
    x: Tensor, output: Tensor, row: Tensor, clip: float | None, noise: Tensor | None, before: Tensor | None = None
) -> Tensor:
    """One step, all (..., P) float32: x' = own x + share clamp(a x + b output) + deviation noise + row[7] before.

    `row` (8,) holds the numbers; `before` is the data that a multistep schedule's step before predicted.
    """
    x_share, output_share, deviation, own, share, _, _, before_share = row.unbind()
    if clip is None:
        stepped = x_share * x + output_share * output
    else:
        stepped = own * x + share * predicted_data(x, output, row).clamp(-clip, clip)
    if before is not None:
        stepped = stepped + before_share * before
    return stepped if noise is None else stepped + deviation * noise


def predicted_data(x: Tensor, output: Tensor, row: Tensor) -> Tensor:
    """a x + b output: the clean values that a step predicts, before any clamp."""
    return row[5] * x + row[6] * output


class SetNoise(NamedTuple):
    """The random numbers of one set, float32."""

    start: Tensor
    """(B, S, P), or (B, L, P) where the whole frame is stepped."""
    fresh: Tensor
    """(noisy steps, B, S or L, P)"""
    outside: Tensor
    """(B, 1, 1) squared norm of the start outside the set, which guidance_renorm of flow matching counts."""

    @classmethod
    def draw(cls, schedule: Schedule, guidance: GuidanceRule, noise: FrameNoise, ids: Tensor) -> "SetNoise":
        """For the tokens `ids` (B, S)."""
        frames = noise.draw(1 + sum(schedule.noisy))  # (1 + noisy steps, B, L, P)
        start = frames[0] * schedule.start_scale
        norm = start.square().sum((1, 2), keepdim=True)
        if in_frame(schedule, guidance):
            return cls(start, frames[1:], torch.zeros_like(norm))
        drawn = gather_tokens(frames[1:].flatten(0, 1), ids.repeat(len(frames) - 1, 1))  # (noisy steps * B, S, P)
        fresh = drawn.unflatten(0, (len(frames) - 1, len(ids)))
        start = gather_tokens(start, ids)
        return cls(start, fresh, (norm - start.square().sum((1, 2), keepdim=True)).clamp_min(0))


def in_frame(schedule: Schedule, guidance: GuidanceRule) -> bool:
    """The full frame is stepped, since its norm counts and no factor stands for what lies outside the set."""
    return least_ratio(guidance) < 1 and not (schedule.is_flow and schedule.rows is not None)


def denoise_set(
    schedule: Schedule,
    guidance: GuidanceRule,
    noise: SetNoise,
    ids: Tensor,
    predict: Predict,
    generators: list[torch.Generator] | None = None,
) -> Tensor:
    """The steps, from noise to the values (B, S, P) of the tokens `ids` (B, S), float32.

    `generators` are for schedulers that draw as they step. With `guidance_renorm` the norms are of the full frame. With
    flow matching the "output" outside the set is the noisy input itself, which an Euler step only scales: its squared
    norm at the start and one factor k for each sample stand for it. With any other scheduler the full frame is stepped.
    """
    schedule.begin()
    whole, least = in_frame(schedule, guidance), least_ratio(guidance)
    x, k = noise.start, torch.ones_like(noise.outside)
    before = torch.zeros_like(x) if schedule.multistep else None
    for i in range(len(schedule.timesteps)):
        prediction = predict(i, gather_tokens(x, ids) if whole else x)
        if whole:
            prediction = in_whole_frame(prediction, x, ids)
        ratio = None  # (B, 1, 1)
        if least < 1:
            outside = k.square() * noise.outside  # 0 for a whole frame
            ratio = renorm_ratio(prediction.cond, prediction.prompted, least, outside)
        if ratio is not None and not whole:
            assert schedule.rows is not None
            k = k * (1 + schedule.rows[i, 1] * ratio)
        output = prediction.guided(ratio)
        data = None
        if before is not None:
            assert schedule.rows is not None
            data = predicted_data(x, output, schedule.rows[i])
        x, before = take_step(schedule, i, x, output, noise, generators, before), data
    return gather_tokens(x, ids) if whole else x


def in_whole_frame(prediction: Prediction, x: Tensor, ids: Tensor) -> Prediction:
    """The prediction of the tokens `ids` (B, S), in the frame x (B, L, P): elsewhere it is x itself."""
    cond, prompted = (scatter_tokens(x, ids, part) for part in (prediction.cond, prediction.prompted))
    history = prediction.history
    return Prediction(cond, prompted, None if history is None else scatter_tokens(torch.zeros_like(x), ids, history))


def take_step(
    schedule: Schedule,
    i: int,
    x: Tensor,
    output: Tensor,
    noise: SetNoise,
    generators: list[torch.Generator] | None,
    before: Tensor | None,
) -> Tensor:
    """Step `i` of the tokens or frames that x and the prediction hold; `before` as in `linear_step`."""
    if schedule.rows is not None:
        fresh = noise.fresh[sum(schedule.noisy[:i])] if schedule.noisy[i] else None
        return linear_step(x, output, schedule.rows[i], schedule.clip, fresh, before)
    t = schedule.scheduler.timesteps[i]
    if schedule.draws:
        stepped: Tensor = schedule.scheduler.step(output, t, x, generator=generators, return_dict=False)[0]
    else:
        stepped = schedule.scheduler.step(output, t, x, return_dict=False)[0]
    return stepped
