"""Denoising one set of tokens with the checkpoint's own diffusers scheduler.

The denoiser is token-wise, so only the set's tokens are computed. Random numbers are still drawn for the full frame and
the set's are picked out: that is what makes a seed give the released implementation's picture.

Legend: B batch, N guidance passes, L tokens of a frame, S tokens of the set, P values of a token.
"""

import copy
import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from nova_video.errors import InputError
from nova_video.model import NOVATransformer3DModel
from nova_video.model.patches import gather_tokens, scatter_tokens
from nova_video.sampling.guidance import Guidance, combine, renorm_ratio
from nova_video.sampling.random import FrameNoise


def request_scheduler(scheduler: Any, flow_shift: float | None) -> Any:
    """A copy of the checkpoint's scheduler for one request, which may count its steps in it."""
    scheduler = copy.deepcopy(scheduler)
    if isinstance(scheduler, DDPMScheduler):
        config = scheduler.config
        if config.variance_type != "fixed_small" or config.thresholding:
            raise InputError(
                f"scheduler: got variance_type {config.variance_type} and thresholding {config.thresholding}: "
                "expected fixed_small and False"
            )
    if scheduler.config.get("use_dynamic_shifting"):
        raise InputError("scheduler: got use_dynamic_shifting True: expected a fixed shift")
    if flow_shift is not None:
        scheduler.set_shift(flow_shift)
    return scheduler


def denoise_set(
    model: NOVATransformer3DModel,
    scheduler: Any,
    features: Tensor,
    ids: Tensor,
    num_steps: int,
    guidance: Guidance,
    noise: FrameNoise,
) -> Tensor:
    """Spatial features (N * B, S, D) of the tokens `ids` (B, S) -> their values (B, S, P), float32."""
    scheduler.set_timesteps(num_steps)
    start = noise.draw().float() * getattr(scheduler, "init_noise_sigma", 1.0)  # (B, L, P)
    tokens = SetOfTokens(model, scheduler, model.project_features(features), ids, guidance, noise)
    if guidance.renorm >= 1:
        return tokens.denoise(gather_tokens(start, ids))
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return tokens.denoise_renormed(start)
    return tokens.denoise_in_frame(start)


@dataclass(frozen=True)
class SetOfTokens:
    """One set while it is denoised: everything but the tokens' values, which the methods pass along."""

    model: NOVATransformer3DModel
    scheduler: Any
    condition: Tensor
    """(N * B, S, width) of the denoiser, projected once: the same at every step."""
    ids: Tensor
    """(B, S)"""
    guidance: Guidance
    noise: FrameNoise

    def denoise(self, x: Tensor) -> Tensor:
        """Noise (B, S, P) -> values (B, S, P)."""
        for t in self.scheduler.timesteps:
            _, output = self.predict(x, t)
            x = self.step(output, t, x, self.ids)
        return x

    def denoise_renormed(self, start: Tensor) -> Tensor:
        """Flow matching with `guidance_renorm`: the frame's noise (B, L, P) -> values (B, S, P).

        The norms are of the full frame, where outside the set the "output" is the noisy input itself. An Euler step
        only scales that part, so its squared norm at the start and one factor k for each sample stand for it.
        """
        x = gather_tokens(start, self.ids)  # (B, S, P)
        outside = (start.square().sum((1, 2), keepdim=True) - x.square().sum((1, 2), keepdim=True)).clamp_min(0)
        k = torch.ones_like(outside)  # (B, 1, 1)
        sigmas = self.scheduler.sigmas.tolist()
        for i, t in enumerate(self.scheduler.timesteps):
            cond, output = self.predict(x, t)
            ratio = renorm_ratio(cond, output, self.guidance.renorm, k.square() * outside)  # (B, 1, 1)
            x = self.step(output * ratio, t, x, self.ids)
            k = k * (1 + (sigmas[i + 1] - sigmas[i]) * ratio)
        return x

    def denoise_in_frame(self, x: Tensor) -> Tensor:
        """`guidance_renorm` with any other scheduler: the full frame (B, L, P) is stepped, since its norm counts."""
        for t in self.scheduler.timesteps:
            cond, output = self.predict(gather_tokens(x, self.ids), t)
            cond, output = (scatter_tokens(x, self.ids, part) for part in (cond, output))  # (B, L, P)
            x = self.step(output * renorm_ratio(cond, output, self.guidance.renorm), t, x, None)
        return gather_tokens(x, self.ids)

    def predict(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, S, P) at timestep t -> the conditional and the guided prediction, both (B, S, P) float32."""
        passes = self.guidance.passes_at(float(t))
        if hasattr(self.scheduler, "scale_model_input"):
            x = self.scheduler.scale_model_input(x, t)
        x = x.to(self.condition.dtype).repeat(passes, 1, 1)  # (n * B, S, P)
        timestep = torch.full((len(x),), float(t), device=x.device)
        return combine(self.model.denoise(x, timestep, self.condition[: len(x)]), passes, self.guidance)

    def step(self, output: Tensor, t: Tensor, x: Tensor, ids: Tensor | None) -> Tensor:
        """One step of the scheduler on the tokens `ids` (B, S) or, for None, on the whole frame."""
        if isinstance(self.scheduler, DDPMScheduler):
            if t == 0:
                return ddpm_step(self.scheduler, output, t, x, None)
            fresh = self.noise.draw().float()  # (B, L, P)
            return ddpm_step(self.scheduler, output, t, x, fresh if ids is None else gather_tokens(fresh, ids))
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            generators = list(self.noise.random.generators)
            stepped: Tensor = self.scheduler.step(output, t, x, generator=generators, return_dict=False)[0]
        else:
            stepped = self.scheduler.step(output, t, x, return_dict=False)[0]
        return stepped


def ddpm_step(scheduler: DDPMScheduler, output: Tensor, t: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
    """`DDPMScheduler.step` with its noise given: the library's own can only draw it for the tokens it is handed.

    Equations 6 and 7 of DDPM (arXiv 2006.11239), from the scheduler's own tables and settings.
    """
    config = scheduler.config
    previous = int(scheduler.previous_timestep(t))
    kept = float(scheduler.alphas_cumprod[t])
    kept_before = float(scheduler.alphas_cumprod[previous]) if previous >= 0 else 1.0
    alpha = kept / kept_before
    if config.prediction_type == "epsilon":
        data = (x - (1 - kept) ** 0.5 * output) / kept**0.5
    elif config.prediction_type == "v_prediction":
        data = kept**0.5 * x - (1 - kept) ** 0.5 * output
    else:
        data = output
    if config.clip_sample:
        data = data.clamp(-config.clip_sample_range, config.clip_sample_range)
    mean: Tensor = (kept_before**0.5 * (1 - alpha) * data + alpha**0.5 * (1 - kept_before) * x) / (1 - kept)
    if noise is None:
        return mean
    deviation = math.sqrt(max((1 - kept_before) / (1 - kept) * (1 - alpha), 1e-20))
    return mean + deviation * noise
