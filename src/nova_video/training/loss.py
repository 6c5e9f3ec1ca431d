"""The training loss (section 3.3): denoising of every token that is not revealed, given what is.

Plain functions of recorded draws, so that a loss can be reproduced to the last digit. Used by `trainer.py`.
Legend as in `model/transformer.py`; R is `loss_repeat`, V the number of revealed tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from nova_video.common.errors import InputError
from nova_video.model import RANDOM_ORDER, NOVATransformer3DModel, Order, mask_ratios, masking, patchify
from nova_video.model.patches import gather_tokens

VideoLoss = Literal["mean", "released"]
"""How the frames of a clip are weighed: alike, or as the released trainer does."""
TIME_BINS = 10
"""Parts of the noise table whose losses are told apart."""


@dataclass(frozen=True)
class NoiseTable:
    """A diffusers scheduler's training schedule as lookup tables: noisy = data_scale * data + noise_scale * noise."""

    data_scale: Tensor  # (1000,)
    noise_scale: Tensor  # (1000,)
    timestep: Tensor  # (1000,) what the network is given
    prediction: Literal["flow", "epsilon", "v_prediction", "sample"]
    """The target of the network, by the scheduler's own name."""

    @classmethod
    def from_scheduler(cls, scheduler: Any, device: torch.device | str) -> "NoiseTable":
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            fresh = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
            sigma = fresh.sigmas[: fresh.config.num_train_timesteps].float()
            return cls((1 - sigma).to(device), sigma.to(device), fresh.timesteps.float().to(device), "flow")
        if isinstance(scheduler, DDPMScheduler):
            kept = scheduler.alphas_cumprod.float()
            steps = torch.arange(len(kept), dtype=torch.float32)
            found = scheduler.config.prediction_type
            if found not in ("epsilon", "v_prediction", "sample"):
                raise InputError(
                    f"the scheduler's prediction_type is {found!r}: expected epsilon, v_prediction or sample"
                )
            return cls(kept.sqrt().to(device), (1 - kept).sqrt().to(device), steps.to(device), found)
        raise InputError(
            f"scheduler {type(scheduler).__name__}: training knows DDPM and FlowMatchEulerDiscrete schedulers"
        )

    def draw_index(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """Indices into the tables: uniform for DDPM, floor(1000 sigmoid(normal)) for flow matching (logit-normal)."""
        count, device = len(self.timestep), self.timestep.device
        if self.prediction == "flow":
            normal = torch.randn(shape, generator=generator, device=device)
            return (count * normal.sigmoid()).long().clamp(max=count - 1)
        return torch.randint(count, shape, generator=generator, device=device)

    def noisy_and_target(self, data: Tensor, noise: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """data, noise (..., P), index (...) -> a point on the path and what the network has to predict there."""
        scale, sigma = self.data_scale[index].unsqueeze(-1), self.noise_scale[index].unsqueeze(-1)
        noisy = scale * data + sigma * noise
        if self.prediction == "flow":
            return noisy, noise - data
        if self.prediction == "v_prediction":
            return noisy, scale * noise - sigma * data
        return noisy, noise if self.prediction == "epsilon" else data


@dataclass(frozen=True)
class LossDraws:
    """Every random number of one loss. Rows run repeats outermost, then batch, then frame."""

    visible_ids: Tensor  # (B * F, V) revealed tokens, in order of revelation
    hidden_ids: Tensor  # (B * F, S) the others: the scored ones
    index: Tensor  # (R * B * F, S) into the noise table, one for each scored token
    noise: Tensor  # (R * B * F, S, P)
    revealed: Tensor | None = None
    """(B * F, V) bool: which of `visible_ids` count, where samples differ in how many are revealed. None: all."""
    scored: Tensor | None = None
    """(B * F, S) bool: which of `hidden_ids` count. None: all."""


def draw(
    table: NoiseTable,
    frames: int,
    tokens: int,
    values: int,
    visible: int,
    repeats: int,
    generator: torch.Generator | None = None,
    order: Order = RANDOM_ORDER,
    grid: tuple[int, int] | None = None,
) -> LossDraws:
    """Fresh draws for `frames` = B * F frames of `tokens` tokens of `values` numbers, `visible` of them revealed."""
    return draw_per_sample(table, [visible] * frames, tokens, values, repeats, 1, generator, order, grid)


def draw_per_sample(
    table: NoiseTable,
    visible: Sequence[int],
    tokens: int,
    values: int,
    repeats: int,
    multiple: int = 1,
    generator: torch.Generator | None = None,
    order: Order = RANDOM_ORDER,
    grid: tuple[int, int] | None = None,
) -> LossDraws:
    """Fresh draws for frames of `tokens` tokens of `values` numbers; `visible` tells how many of each are revealed.

    `order` says which are revealed first, on a token grid (rows, columns); None: the tokens are one row.

    Frames with fewer are padded, with the tokens that would come next, up to the most of any; those with more denoise
    some tokens in vain. Rounding both to a `multiple` leaves fewer different shapes to compile for.
    """
    device, frames = table.timestep.device, len(visible)
    most = min(tokens, -(-max(visible) // multiple) * multiple)
    least = min(visible) // multiple * multiple
    uniform = torch.rand(frames, tokens, 1, generator=generator, device=device)
    ids = masking.draw_order(order, uniform, grid or (1, tokens))
    revealed = scored = None
    if most > least:
        counts = torch.tensor(visible, pin_memory=device.type == "cuda").to(device, non_blocking=True)
        mask = torch.arange(tokens, device=device) < counts.unsqueeze(-1)  # (B * F, L)
        revealed, scored = mask[:, :most], ~mask[:, least:]
    return LossDraws(
        ids[:, :most],
        ids[:, least:],
        table.draw_index((repeats * frames, tokens - least), generator),
        torch.randn(repeats * frames, tokens - least, values, generator=generator, device=device),
        revealed,
        scored,
    )


def visible_tokens(count: int, tokens: int, generator: torch.Generator | None = None) -> list[int]:
    """How many of `tokens` tokens are revealed, by `count` of the paper's mask ratios; `generator` on the CPU."""
    return ((1 - mask_ratios(count, generator)) * tokens).round().long().tolist()


@dataclass(frozen=True)
class Losses:
    """A batch's loss, and where it comes from."""

    total: Tensor
    """() mean squared error over all scored tokens."""
    by_frame: Tensor
    """(F,) each frame's share: they sum to the total."""
    bin_sum: Tensor
    """(10,) squared errors of the scored tokens by noise level, in tenths of the noise table; detached."""
    bin_count: Tensor
    """(10,) and how many tokens those were."""


def losses(
    model: NOVATransformer3DModel,
    latents: Tensor,
    history: Tensor,
    condition: Tensor,
    table: NoiseTable,
    draws: LossDraws,
) -> Losses:
    """The network predicts latents (B, C, F, h, w) from condition (B, T, D) and history, which is like latents.

    The temporal encoder reads the history: the latents themselves, or with noise on them.
    """
    num_frames = latents.shape[2]
    clean = patchify(latents.transpose(1, 2).flatten(0, 1), model.patch_size)  # (B * F, L, P)
    repeats = draws.noise.shape[0] // clean.shape[0]
    data = gather_tokens(clean, draws.hidden_ids).repeat(repeats, 1, 1)  # (R * B * F, S, P)
    noisy, target = table.noisy_and_target(data, draws.noise, draws.index)
    predicted = model(
        condition,
        latents,
        draws.visible_ids,
        draws.hidden_ids,
        noisy,
        table.timestep[draws.index],
        history,
        draws.revealed,
    )
    error = (predicted.float() - target.float()).square().mean(-1)  # (R * B * F, S)
    scored = torch.ones_like(draws.index, dtype=torch.bool)
    if draws.scored is not None:
        scored = draws.scored.repeat(repeats, 1)
        error = torch.where(scored, error, 0.0)
    count = error.numel() if draws.scored is None else scored.sum()
    by_frame = error.sum(-1).view(repeats, -1, num_frames).sum((0, 1)) / (count + 1e-5)  # (F,)
    bins = torch.arange(TIME_BINS, device=error.device)[:, None, None]
    in_bin = (draws.index * TIME_BINS // len(table.timestep) == bins) & scored  # (10, R * B * F, S)
    bin_sum = torch.where(in_bin, error.detach(), 0.0).sum((1, 2))
    return Losses(by_frame.sum(), by_frame, bin_sum, in_bin.sum((1, 2)))


def total_loss(found: Losses, video_loss: VideoLoss) -> Tensor:
    """The number that training goes down, of the loss's frames."""
    return found.total if video_loss == "mean" else torch.stack([*loss_parts(found.by_frame).values()]).sum()


def loss_parts(per_frame: Tensor) -> dict[str, Tensor]:
    """The numbers the paper's training logs: `loss` for images, `loss_t2i` and `loss_i2i` for videos. The released
    trainer minimises the sum of the latter two."""
    frames = len(per_frame)
    if frames == 1:
        return {"loss": per_frame[0]}
    return {"loss_t2i": frames * per_frame[0], "loss_i2i": frames / (frames - 1) * per_frame[1:].sum()}
