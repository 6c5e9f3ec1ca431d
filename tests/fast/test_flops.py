"""Operations of a training step against what torch counts, and the rates of devices."""

import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nova_video.bench.configs import SIZES, build
from nova_video.fast.arrange import arrange_for_training
from nova_video.model import NOVATransformer3DModel
from nova_video.model.lora import add_lora
from nova_video.training.flops import attention, device_peak, linear, step_flops, step_parts
from nova_video.training.loss import NoiseTable, draw, losses

BATCH, GRID, TOKENS, LATENT, REPEATS, TEXT = 2, (8, 12), 24, 6, 3, 8  # LATENT: temporal tokens of a frame


def block(queries: int, keys: int, width: int) -> float:
    """Operations of a transformer block on one row: 12 D^2 weights a token, and attention."""
    return linear(queries, width, 12 * width) + attention(queries * keys, width)


def tiny(video: bool, **changed: Any) -> NOVATransformer3DModel:
    settings: dict[str, Any] = {
        "image_size": (64, 96),
        "text_token_dim": 48,
        "text_token_len": TEXT,
        "image_base_size": (4, 6),
        "video_base_size": (4 if video else 1, 2, 3),
        "video_mixer_rank": 4 if video else None,
        "arch": ("vit_d2w64", "vit_d4w64", "mlp_d2w96"),
    }
    return NOVATransformer3DModel(**settings | changed)


def counted(model: NOVATransformer3DModel, frames: int, visible: int, repeats: int = REPEATS) -> float:
    """What torch counts of a step, forward and backward, attention as plain products."""
    table = NoiseTable.from_scheduler(FlowMatchEulerDiscreteScheduler(), "cpu")
    draws = draw(table, BATCH * frames, TOKENS, 16, visible, repeats)
    latents = torch.randn(BATCH, 4, frames, *GRID)
    text, lengths, motion = torch.randn(BATCH, TEXT, 48), torch.tensor([3, TEXT]), torch.ones(BATCH)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        condition = model.embed_condition(text, lengths, motion, motion)
        arranged = arrange_for_training(model, table.timestep)
        losses(arranged, latents, latents, condition, table, draws).total.backward()
    return float(counter.get_total_flops())


def wasted(model: NOVATransformer3DModel, frames: int, visible: int, repeats: int = REPEATS) -> float:
    """What the plain step does beyond what is useful, each item written out."""
    width, rows = 64, BATCH * frames
    condition = TEXT + (0 if model.motion_embed is None else 2)
    hidden = sum(LATENT * LATENT * (frames - 1 - f) for f in range(frames))  # later frames, for the tokens of each
    hidden += condition * LATENT * (frames - 1)  # and for the condition
    masked = 2 * attention(BATCH * hidden, width)  # in both temporal blocks
    unread = linear(BATCH * condition, width, 9 * width)  # of the last temporal block: the condition's rows
    unread += attention(BATCH * condition * (condition + LATENT), width)
    unseen = linear(rows * (TOKENS - visible), 16, width)  # embedded, then replaced by the mask token
    spare = max(0, 1000 - repeats * rows * (TOKENS - visible))  # timesteps that nobody drew
    return 3 * (masked + unread + linear(spare, 96, 96)) + 2 * (unseen + linear(spare, 256, 96))


@pytest.mark.parametrize("visible", [0, 7])
@pytest.mark.parametrize(
    ("frames", "changed"),
    [(1, {}), (3, {"rotary_pos_embed": True}), (4, {}), (4, {"video_mixer_rank": -1})],
)
def test_a_step_is_what_torch_counts(frames: int, visible: int, changed: dict[str, Any]) -> None:
    model = tiny(frames > 1, **changed)
    useful = step_flops(model, BATCH, frames, GRID, visible, REPEATS)
    assert useful + wasted(model, frames, visible) == counted(model, frames, visible)


def test_frozen_weights_have_no_gradient() -> None:
    model = tiny(video=True)
    trained = step_flops(model, BATCH, 3, GRID, 5, REPEATS)
    for layer in (*model.video_encoder.blocks[:1], *model.image_encoder.blocks[:2], model.image_decoder.head):
        layer.requires_grad_(False)
    frozen = step_flops(model, BATCH, 3, GRID, 5, REPEATS)
    assert frozen + wasted(model, 3, 5) == counted(model, 3, 5)
    assert 0.7 * trained < frozen < trained


def test_adapters_learn_alone() -> None:
    """Within what the first adapted block and its waste come to: their inputs have no gradient."""
    model = tiny(video=True)
    trained = step_flops(model, BATCH, 4, GRID, 5, 20)
    add_lora(model, rank=4)
    useful = step_flops(model, BATCH, 4, GRID, 5, 20)
    assert useful + wasted(model, 4, 5, 20) == pytest.approx(counted(model, 4, 5, 20), rel=0.02)
    assert 0.6 * trained < useful < 0.75 * trained


def test_a_step_is_three_forward_passes() -> None:
    """Of the released sizes, within a percent: first layers need no gradient of their input, last blocks only some."""
    size = SIZES["t2v-480-0.6b"]
    model = build(size, torch.device("meta"), torch.bfloat16).transformer
    shown, (batch, frames, visible, repeats) = 1440 // 4, (3, 9, 200, 4)
    keys = [258 + shown * (f + 1) for f in range(frames)]
    temporal = 16 * (block(keys[0], keys[0], 1024) + sum(block(shown, count, 1024) for count in keys[1:]))
    spatial = 16 * (block(shown + visible, shown + visible, 1024) + block(shown + 1440, shown + 1440, 1024))
    parts = step_parts(model, batch, frames, (60, 96), visible, repeats)
    assert parts["temporal"] == pytest.approx(3 * batch * temporal, rel=0.03)
    assert parts["spatial"] == pytest.approx(3 * batch * frames * spatial, rel=0.03)


def test_what_a_batch_shares_counts_once() -> None:
    """Time positions, and embeddings of the 1000 timesteps; all else is as much more as the batch is larger."""
    model = tiny(video=True)
    one, three = (step_flops(model, batch, 3, GRID, 6, 100) for batch in (1, 3))  # 5,400 noisy tokens, and 16,200
    times = 2 * linear(1000, 256, 96) + 3 * linear(1000, 96, 96)
    places = 2 * linear(3, 256, 64) + 3 * linear(3, 64, 64)
    assert 3 * one - three == 2 * (times + places)


class OtherHead(nn.Module):
    """A linear map of a noisy token beside its feature; `peeks` makes its course depend on values."""

    def __init__(self, peeks: bool) -> None:
        super().__init__()
        self.layer, self.peeks = nn.Linear(16 + 64, 16), peeks

    def forward(self, noisy: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        if self.peeks and timestep.max().item() > 5:
            return noisy
        return self.layer(torch.cat([noisy, condition], dim=-1))


@pytest.mark.parametrize("peeks", [False, True])
def test_another_head_is_counted_by_torch(peeks: bool) -> None:
    model = tiny(video=False)
    model.image_decoder = OtherHead(peeks)
    counted = step_parts(model, BATCH, 1, GRID, 7, REPEATS)["denoiser"]
    assert math.isnan(counted) if peeks else counted == 3 * linear(REPEATS * BATCH * (TOKENS - 7), 80, 16)
    assert (step_flops(model, BATCH, 1, GRID, 7, REPEATS) == 0) == peeks


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_peaks_are_found_by_name(name: str, teraflops: float) -> None:
    assert device_peak(name, torch.bfloat16) == teraflops * 1e12
    assert device_peak(name, torch.float32) is None


@pytest.mark.parametrize(
    "name", ["cpu (x86_64)", "NVIDIA A10G", "NVIDIA H200 MIG 1g.18gb", "NVIDIA GeForce RTX 4090 Laptop GPU"]
)
def test_other_devices_have_no_peak(name: str) -> None:
    assert device_peak(name, torch.bfloat16) is None
