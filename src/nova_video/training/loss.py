"""The training loss (section 3.3): denoising of every token that is not revealed, given what is.

Plain functions of recorded draws, so that a loss can be reproduced to the last digit. Used by `trainer.py`.
Legend as in `model/transformer.py`; R is `loss_repeat`, V the number of revealed tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from nova_video.errors import InputError
from nova_video.model import NOVATransformer3DModel, Positions, patchify
from nova_video.model.patches import gather_tokens


@dataclass(frozen=True)
class NoiseTable:
    """A diffusers scheduler's training schedule as lookup tables: noisy = data_scale * data + noise_scale * noise."""

    data_scale: Tensor  # (1000,)
    noise_scale: Tensor  # (1000,)
    timestep: Tensor  # (1000,) what the network is given
    flow: bool

    @classmethod
    def from_scheduler(cls, scheduler: Any, device: torch.device | str) -> "NoiseTable":
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            fresh = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
            sigma = fresh.sigmas[: fresh.config.num_train_timesteps].float()
            return cls((1 - sigma).to(device), sigma.to(device), fresh.timesteps.float().to(device), flow=True)
        if isinstance(scheduler, DDPMScheduler):
            kept = scheduler.alphas_cumprod.float()
            steps = torch.arange(len(kept), dtype=torch.float32)
            return cls(kept.sqrt().to(device), (1 - kept).sqrt().to(device), steps.to(device), flow=False)
        raise InputError(
            f"scheduler {type(scheduler).__name__}: training knows DDPM and FlowMatchEulerDiscrete schedulers"
        )

    def draw_index(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """Indices into the tables: uniform for DDPM, floor(1000 sigmoid(normal)) for flow matching (logit-normal)."""
        count, device = len(self.timestep), self.timestep.device
        if self.flow:
            normal = torch.randn(shape, generator=generator, device=device)
            return (count * normal.sigmoid()).long().clamp(max=count - 1)
        return torch.randint(count, shape, generator=generator, device=device)

    def noisy_and_target(self, data: Tensor, noise: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """data, noise (..., P), index (...) -> a point on the path and what the network has to predict there."""
        scale, sigma = self.data_scale[index].unsqueeze(-1), self.noise_scale[index].unsqueeze(-1)
        noisy = scale * data + sigma * noise
        return noisy, (noise - data if self.flow else noise)


@dataclass(frozen=True)
class LossDraws:
    """Every random number of one loss. Rows run repeats outermost, then batch, then frame."""

    visible_ids: Tensor  # (B * F, V) revealed tokens, in order of revelation
    hidden_ids: Tensor  # (B * F, L - V) the others: the scored ones
    index: Tensor  # (R * B * F, L - V) into the noise table, one for each scored token
    noise: Tensor  # (R * B * F, L - V, P)


def draw(
    table: NoiseTable,
    frames: int,
    tokens: int,
    values: int,
    visible: int,
    repeats: int,
    generator: torch.Generator | None = None,
) -> LossDraws:
    """Fresh draws for `frames` = B * F frames of `tokens` tokens of `values` numbers, `visible` of them revealed."""
    device = table.timestep.device
    order = torch.rand(frames, tokens, generator=generator, device=device).argsort(dim=-1)
    hidden = tokens - visible
    return LossDraws(
        order[:, :visible],
        order[:, visible:],
        table.draw_index((repeats * frames, hidden), generator),
        torch.randn(repeats * frames, hidden, values, generator=generator, device=device),
    )


def frame_losses(
    model: NOVATransformer3DModel,
    latents: Tensor,
    history: Tensor,
    condition: Tensor,
    positions: Positions,
    table: NoiseTable,
    draws: LossDraws,
) -> Tensor:
    """l_f of each frame (F,): its share of the mean squared error over all scored tokens, so that they sum to the loss.

    latents (B, C, F, h, w) are what is predicted; history, of the same shape, is what the temporal encoder reads (the
    latents themselves, or with noise on them); condition (B, T, D).
    """
    num_frames = latents.shape[2]
    features = model.encode_frames(condition, history, positions).flatten(0, 1)  # (B * F, Lc, D)
    clean = patchify(latents.transpose(1, 2).flatten(0, 1), model.patch_size)  # (B * F, L, P)
    z = model.encode_tokens(features, model.embed_tokens(clean), draws.visible_ids, positions)  # (B * F, L, D)
    repeats = draws.noise.shape[0] // clean.shape[0]
    z = model.project_features(gather_tokens(z, draws.hidden_ids)).repeat(repeats, 1, 1)  # (R * B * F, S, width)
    data = gather_tokens(clean, draws.hidden_ids).repeat(repeats, 1, 1)  # (R * B * F, S, P)
    noisy, target = table.noisy_and_target(data, draws.noise, draws.index)
    predicted = model.denoise(noisy, table.timestep[draws.index], z)
    error = (predicted.float() - target.float()).square().mean(-1)  # (R * B * F, S)
    per_frame = error.sum(-1).view(repeats, -1, num_frames).sum((0, 1))  # (F,)
    return per_frame / (error.numel() + 1e-5)


def loss_parts(per_frame: Tensor) -> dict[str, Tensor]:
    """The numbers the paper's training logs: `loss` for images, `loss_t2i` and `loss_i2i` for videos."""
    frames = len(per_frame)
    if frames == 1:
        return {"loss": per_frame[0]}
    return {"loss_t2i": frames * per_frame[0], "loss_i2i": frames / (frames - 1) * per_frame[1:].sum()}
