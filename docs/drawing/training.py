"""What training draws at random: how many tokens are revealed, and how noisy the scored ones are."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from drawing.style import CHOSEN, INK, SPACE, TIME
from nova_video.model import mask_ratios
from nova_video.training.loss import NoiseTable

DRAWS = 200_000


def revealed_shares(num_tokens: int) -> np.ndarray:
    """(L + 1,) share of the training frames in which that many tokens are revealed, as the paper draws them."""
    ratios = mask_ratios(DRAWS, torch.Generator().manual_seed(0))
    revealed = ((1 - ratios) * num_tokens).round().long()
    return np.bincount(revealed.numpy(), minlength=num_tokens + 1) / DRAWS


def noise_amounts(scheduler: Any) -> np.ndarray:
    """(DRAWS,) noise_scale of noisy = data_scale * data + noise_scale * noise, at timesteps as training draws them."""
    table = NoiseTable.from_scheduler(scheduler, "cpu")
    index = table.draw_index((DRAWS,), torch.Generator().manual_seed(0))
    return table.noise_scale[index].numpy()


def draw_training(num_tokens: int, visible: Sequence[int], probability: Sequence[float]) -> Figure:
    """Left: revealed tokens, as in the paper and by a recipe's `visible`; right: the noise on the scored ones."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 2.9))
    shares = revealed_shares(num_tokens)
    left.bar(np.arange(num_tokens + 1), shares, width=1.0, color=SPACE, label="the paper's truncated normal")
    left.bar(visible, probability, width=0.55, color=CHOSEN, edgecolor=INK, linewidth=0.5, label="the emoji recipes")
    left.set(xlabel=f"revealed tokens, of {num_tokens}", ylabel="share of the frames")
    left.set_xlim(-1.5, max([*visible, int(0.35 * num_tokens)]) + 2)
    left.set_title("How much of a frame is given")

    bins = np.linspace(0, 1, 41) + 5e-4  # between the thousandths that timesteps are on
    for scheduler, color, label in (
        (FlowMatchEulerDiscreteScheduler(), TIME, "flow matching, logit-normal"),
        (DDPMScheduler(beta_schedule="squaredcos_cap_v2"), CHOSEN, "DDPM, uniform timesteps"),
    ):
        amounts = noise_amounts(scheduler)
        right.hist(amounts, bins, density=True, histtype="step", color=color, linewidth=1.8, label=label)
    right.set(xlabel="factor of the noise", ylabel="density", xlim=(0, 1))
    right.set_title("How noisy the other tokens are")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.tight_layout(w_pad=2.5)
    return figure
