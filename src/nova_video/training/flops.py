"""Counts the useful operations of a training step. Over the peak rate of a device they give the MFU.

Useful operations only, two a multiply-add: dense products and attention, forward and backward, of what the loss needs.
Not counted: forward passes done again under checkpointing, pairs of tokens that the block-causal mask hides, scores of
revealed tokens, and rows of the encoders' last blocks that nothing reads. Plain functions of shapes; the trainer logs
them and `nova bench train` reports them.

Legend: B batch, F latent frames, L tokens of a frame, Lc temporal tokens of it, V tokens revealed, S = L - V tokens
scored, T condition tokens, D width, R `loss_repeat`.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from nova_video.model import NOVATransformer3DModel
from nova_video.model.denoiser import Denoiser
from nova_video.model.operations import attention, linear

TIMESTEPS = 1000  # of the noise table: no more of them have to be embedded, however many tokens there are

# Operations a second of bfloat16 products with sums in float32, dense: half of what makers print "with sparsity". Words
# of the device's name -> rate; longer names stand before those that they contain. Sources, with the printed teraflops:
# datasheets of NVIDIA's H100 (SXM 1,979, PCIe 1,513, NVL 1,671), H200 (SXM 1,979, NVL 1,671), GH200 (1,979), HGX B200
# (8 x 4,500), GB200 NVL72 (72 x 5,000), A100 (624), A30 (330), A40 (299.4), A10 (250), L4 (242), L40 (362), L40S (733);
# whitepapers of GeForce GA102 (RTX 3090: 142), Ada (RTX 4090: 330.4) and Blackwell (RTX 5090: 419); AMD's MI300X
# (2,614.9).
PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165.2e12,
    "RTX 5090": 209.5e12,
    "MI300X": 1307.4e12,
}
SLOWER = ("Laptop", "MIG")  # words of devices that have the name of a larger one
HALVES = (torch.float16, torch.bfloat16)


def device_peak(name: str, dtype: torch.dtype) -> float | None:
    """Operations a second that a device of this name could do in `dtype`; None where that is not known."""
    words = f" {name.replace('-', ' ')} "
    found = [rate for part, rate in PEAKS.items() if f" {part} " in words]
    return found[0] if found and dtype in HALVES and not any(f" {part} " in words for part in SLOWER) else None


def step_flops(
    model: NOVATransformer3DModel, batch: int, frames: int, grid: tuple[int, int], visible: int, repeats: int
) -> float:
    """Operations of a step on `batch` clips of `frames` latent frames on the grid (h, w), `visible` tokens revealed."""
    return sum(step_parts(model, batch, frames, grid, visible, repeats).values())


def step_parts(
    model: NOVATransformer3DModel, batch: int, frames: int, grid: tuple[int, int], visible: int, repeats: int
) -> dict[str, float]:
    """Operations of a step by part: text (with motion and time), temporal, spatial, denoiser."""
    patch, rows = model.patch_size, batch * frames
    tokens = (grid[0] // patch) * (grid[1] // patch)  # L
    temporal, scored = tokens // 4, tokens - visible  # Lc, S
    condition = model.text_embed.token_len  # T
    text = products(model.text_embed.proj, batch * condition, learned_before=False)
    if model.motion_embed is not None:
        condition += 2
        text += embedding(model.motion_embed.flow_proj, batch) + embedding(model.motion_embed.fps_proj, batch)
    if model.video_pos_embed is not None:
        text += embedding(model.video_pos_embed.time_proj, frames)

    encoder: Any = model.video_encoder
    count, first = condition + frames * temporal, condition + temporal  # all tokens; the first block of the mask
    pairs = first * first + sum(temporal * (first + f * temporal) for f in range(1, frames))
    video = products(encoder.patch_embed, (rows - batch) * temporal, learned_before=False)
    video += blocks(encoder.blocks[:-1], batch, count, pairs)
    video += last_block(encoder.blocks[-1], batch, count, frames * temporal, pairs - condition * first)
    if encoder.mixer is not None:
        video += products(encoder.mixer, (rows - batch) * temporal)

    encoder = model.image_encoder
    half, seen, every = len(encoder.blocks) // 2, temporal + visible, temporal + tokens
    image = products(encoder.patch_embed, rows * visible, learned_before=False)
    image += blocks(encoder.blocks[:half], rows, seen, seen * seen)
    image += blocks(encoder.blocks[half:-1], rows, every, every * every)
    image += last_block(encoder.blocks[-1], rows, every, scored, scored * every)

    head, noisy = model.image_decoder, repeats * rows * scored
    if not isinstance(head, Denoiser):  # of the user's own: every product is on a noisy token
        return {"text": text, "temporal": video, "spatial": image, "denoiser": products(head, noisy)}
    denoiser = products(head.time_cond_embed.condition_proj, rows * scored)
    denoiser += embedding(head.time_cond_embed.timestep_proj, min(TIMESTEPS, noisy))
    denoiser += products(head.patch_embed, noisy, learned_before=False)
    denoiser += sum(products(part, noisy) for part in (head.blocks, head.norm, head.head))
    return {"text": text, "temporal": video, "spatial": image, "denoiser": denoiser}


def products(module: nn.Module, count: int, learned_before: bool = True) -> float:
    """Operations of every product with a weight in `module`, each on `count` tokens.

    The same number forward, for the gradient of what comes in, if what it comes from learns (data do not), and for the
    weight's, if that learns.
    """
    flops = 0.0
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            times = 1 + learned_before + part.weight.requires_grad
            outputs, *inputs = part.weight.shape  # of the whole weight, wherever it is sharded
            flops += times * linear(count, math.prod(inputs), outputs)
    return flops


def embedding(layers: nn.Module, count: int) -> float:
    """Operations of layers in a row, the first of which reads data: a sinusoid."""
    flops, learned = 0.0, False
    for part in layers.modules():
        if isinstance(part, nn.Linear):
            flops += products(part, count, learned)
            learned |= part.weight.requires_grad
    return flops


def blocks(layers: Iterable[nn.Module], rows: int, count: int, pairs: int) -> float:
    """Operations of whole blocks on `count` tokens a row, of which `pairs` of query and key meet."""
    return sum(products(layer, rows * count) + attention_step(layer, rows * pairs) for layer in layers)


def last_block(layer: Any, rows: int, count: int, read: int, pairs: int) -> float:
    """Operations of a block of which only `read` tokens a row are read; all tokens are keys and values."""
    others = products(layer, rows * read) - products(layer.attn.qkv, rows * read)
    return products(layer.attn.qkv, rows * count) + others + attention_step(layer, rows * pairs)


def attention_step(layer: Any, pairs: int) -> float:
    """Operations of a block's attention: two products forward, and twice as many for gradients."""
    return 3 * attention(pairs, layer.attn.proj.weight.shape[0])
