"""The one counter of operations, two a multiply-add, from the shapes of a model's weights; and devices' peaks.

Counted are useful operations: dense products and attention, forward and backward, of what the loss needs. Not counted
are forward passes done again under checkpointing, pairs of tokens that the block-causal mask hides, scores of revealed
tokens, and rows of the encoders' last blocks that nothing reads. torch's FlopCounterMode counts those too, so it would
flatter the model FLOPs utilisation (MFU); tests hold this counter against it, with each such item written out.

Legend: B batch, F latent frames, L tokens of a frame, Lc temporal tokens of it, V tokens revealed, S = L - V tokens
scored, T condition tokens, D width, R `loss_repeat`.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from nova_video.model import NOVATransformer3DModel
from nova_video.model.denoiser import Denoiser

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


def linear(count: int, inputs: int, outputs: int) -> float:
    """Operations of a matrix product on `count` tokens."""
    return 2.0 * count * inputs * outputs


def attention(pairs: int, width: int) -> float:
    """Operations of both products of an attention of all heads, where `pairs` of a query and a key meet."""
    return 4.0 * pairs * width


def forward_products(module: nn.Module, count: int) -> float:
    """Operations of every product with a weight in `module`, each on `count` tokens, forward alone."""
    return sum(_linear_of(part, count) for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d))


def _linear_of(part: nn.Linear | nn.Conv2d, count: int) -> float:
    outputs, *inputs = part.weight.shape  # of the whole weight, wherever it is sharded
    return linear(count, math.prod(inputs), outputs)


def blocks_forward(layers: Iterable[nn.Module], rows: int, queries: int, keys: int) -> float:
    """Operations of whole transformer blocks, where `queries` tokens of each row look at `keys` tokens."""
    return sum(
        forward_products(layer, rows * queries) + attention(rows * queries * keys, width_of(layer)) for layer in layers
    )


def width_of(layer: Any) -> int:
    """The width of a block's attention, all heads together."""
    return int(layer.attn.proj.weight.shape[0])


def features_forward(head: nn.Module, count: int) -> float:
    """Operations of the head's projection of `count` features, which is done once for all denoising steps."""
    return forward_products(head.time_cond_embed.condition_proj, count) if type(head) is Denoiser else 0.0


def head_forward(head: nn.Module, count: int, values: int, condition: int) -> float:
    """Operations of one denoising step of `count` tokens of `values` numbers; NaN where they are not known.

    The projections of time and features are left out for the package's denoiser, which does not repeat them in each
    step. torch counts all of any other head, on tensors of shapes alone.
    """
    if type(head) is Denoiser:
        return sum(forward_products(part, count) for part in (head.patch_embed, head.blocks, head.norm, head.head))
    shapes = {name: value.to("meta") for name, value in [*head.named_parameters(), *head.named_buffers()]}
    inputs: list[Tensor] = [torch.empty(1, count, *rest, device="meta") for rest in ((values,), (), (condition,))]
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            functional_call(head, shapes, tuple(inputs))
    except (RuntimeError, NotImplementedError):  # a head whose course depends on values
        return math.nan
    return float(counter.get_total_flops())


# A training step ------------------------------------------------------------------------------------------------------


def step_flops(
    model: NOVATransformer3DModel, batch: int, frames: int, grid: tuple[int, int], visible: int, repeats: int
) -> float:
    """Operations of a step on `batch` clips of `frames` latent frames on the grid (h, w), `visible` tokens revealed.

    0: not known, with a head of a user's own that torch cannot count.
    """
    total = sum(step_parts(model, batch, frames, grid, visible, repeats).values())
    return 0.0 if math.isnan(total) else total


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
    if type(head) is not Denoiser:
        denoiser = 3 * head_forward(head, noisy, patch**2 * model.config.image_dim, model.width)
        return {"text": text, "temporal": video, "spatial": image, "denoiser": denoiser}
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
            flops += (1 + learned_before + part.weight.requires_grad) * _linear_of(part, count)
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
    return 3 * attention(pairs, width_of(layer))
