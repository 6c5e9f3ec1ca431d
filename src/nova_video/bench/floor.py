"""The least time a device could take: what has to be multiplied and read, over its measured rates. Plain functions.

Multiplications are those of the sampling loop, counted from the shapes of every set: dense products and attention, two
operations a multiply-add, the denoiser on the set's tokens alone. What is read: every weight once for each time its
part runs (the denoiser's once a set, since they could stay on the chip between its steps), and the temporal cache.
Norms, activations and positions count for nothing.

Legend: B batch, N guidance passes, R = N * B rows, L tokens of a frame, Lc temporal tokens of it, V tokens revealed,
S tokens of a set, T condition tokens, D width, P values of a token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nova_video.common.errors import InputError
from nova_video.model import NOVATransformer3DModel, set_sizes
from nova_video.pipeline.plan import Plan
from nova_video.training.flops import HALVES, blocks_forward, features_forward, forward_products, head_forward


@dataclass(frozen=True)
class Rates:
    """The measured rates of a device."""

    flops: float
    """A second, of large products in float16 and bfloat16."""
    bytes: float
    """A second, read from its memory."""


RATES = {"H200": Rates(flops=790e12, bytes=4.3e12)}  # part of the device's name -> rates


@dataclass(frozen=True)
class Work:
    """The operations of a call by part: text, temporal, spatial, denoiser."""

    flops: dict[str, float]
    bytes: dict[str, float]


@dataclass(frozen=True)
class Floor:
    """Seconds that a device needs at least."""

    by_flops: float
    by_bytes: float

    @property
    def seconds(self) -> float:
        return max(self.by_flops, self.by_bytes)


def device_rates(name: str, dtype: torch.dtype) -> Rates | None:
    """Rates of a device by its name; None if they were not measured."""
    found = [rates for part, rates in RATES.items() if part in name]
    return found[0] if found and dtype in HALVES else None


def floor_of(work: Work, rates: Rates) -> Floor:
    return Floor(sum(work.flops.values()) / rates.flops, sum(work.bytes.values()) / rates.bytes)


def count_work(model: NOVATransformer3DModel, plan: Plan) -> Work:
    """The work of sampling a plan, from prompt features to latents."""
    if plan.latent_frames is None:
        raise InputError("num_frames is inf: expected a whole number, work without end has no floor")
    config, patch, width = model.config, model.patch_size, model.width
    channels, rows, batch = config.image_dim, plan.passes * plan.batch, plan.batch
    tokens = (plan.grid[0] // patch) * (plan.grid[1] // patch)  # L
    temporal, values = tokens // 4, patch**2 * channels  # Lc, P
    item = model.dtype.itemsize
    weights = {
        "temporal": _bytes(model.video_encoder),
        "spatial": _bytes(model.image_encoder),
        "denoiser": _bytes(model.image_decoder),
    }
    flops = {"text": forward_products(model.text_embed.proj, rows * config.text_token_len)}
    moved = {"text": float(_bytes(model.text_embed))}
    condition = config.text_token_len  # T
    if model.motion_embed is not None:
        condition += 2
        flops["text"] += forward_products(model.motion_embed, rows)
        moved["text"] += _bytes(model.motion_embed)

    encoder: Any = model.video_encoder
    depth = len(encoder.blocks)
    flops["temporal"] = moved["temporal"] = 0.0
    for frame, (queries, keys) in enumerate(temporal_steps(plan, temporal, condition)):
        flops["temporal"] += blocks_forward(encoder.blocks, rows, queries, keys)
        moved["temporal"] += weights["temporal"] + item * rows * depth * 2 * (keys - queries) * width
        if frame:
            flops["temporal"] += forward_products(encoder.patch_embed, batch * temporal)
            flops["temporal"] += 0.0 if encoder.mixer is None else forward_products(encoder.mixer, rows * temporal)

    encoder, head = model.image_encoder, model.image_decoder
    half = len(encoder.blocks) // 2
    flops["spatial"] = flops["denoiser"] = 0.0
    sizes = set_sizes(tokens, plan.sets)
    visible = 0  # V
    for size in sizes:
        first, second = temporal + visible, temporal + tokens
        flops["spatial"] += blocks_forward(encoder.blocks[:half], rows, first, first)
        flops["spatial"] += blocks_forward(encoder.blocks[half:], rows, second, second)
        flops["spatial"] += forward_products(encoder.patch_embed, batch * size)  # once revealed, for the encoder
        flops["denoiser"] += features_forward(head, rows * size)
        flops["denoiser"] += plan.diffusion_steps * head_forward(head, rows * size, values, width)
        visible += size
    flops["spatial"] *= plan.latent_frames
    flops["denoiser"] *= plan.latent_frames
    count = plan.latent_frames * len(sizes)
    moved |= {part: float(count * weights[part]) for part in ("spatial", "denoiser")}
    return Work(flops, moved)


def temporal_steps(plan: Plan, tokens: int, condition: int) -> Iterator[tuple[int, int]]:
    """For every latent frame, the tokens that pass through the temporal encoder and those they look at.

    As the sampler goes: one frame more, or the whole context anew where that does not just grow by a frame.
    """
    assert plan.latent_frames is not None
    cached: list[int] | None = None
    for frame in range(plan.latent_frames):
        read = plan.context.read(frame, 0)
        keys = condition + tokens * (1 + len(read))  # text, motion, BOS and the frames read
        grows = cached is not None and read[:-1] == cached
        yield (tokens if grows else keys), keys
        cached = read


def _bytes(module: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())
