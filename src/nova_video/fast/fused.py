"""The denoiser loop of one set in a handful of Triton kernels a step: the plain loop's numbers to rounding.

At batch 1 the loop's matrix products are so small that launches, not arithmetic, take the time. Here everything between
two products is one kernel, and so is each product with what follows it: 3 * depth kernels a step (`fused_kernels.py`),
meant to be captured in a CUDA graph. What does not depend on the noisy values, the modulations of all steps, is
computed before. Triton comes with CUDA builds of torch; nothing here needs it until a loop is run.

Legend: K steps, N passes, B batch, S tokens of a set, P values of a token, R = N * B * S rows.
"""

import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nova_video.fast.known import known_denoiser_parts
from nova_video.fast.modulations import modulations
from nova_video.model.denoiser import Denoiser, DenoiserBlock
from nova_video.sampling.diffusion import Schedule
from nova_video.sampling.guidance import Guidance

MAX_ROWS = 512  # beyond, the products are large enough for the library's own
ROWS_AT_ONCE = 1 << 16  # rows times steps whose modulations are computed together: bounds their memory
SHARED_MEMORY = 112 * 1024  # bytes of a program's pieces in flight: two programs fit on a multiprocessor of 227 KB

EARLY_WIDTH = 1280  # of products that last long enough for the next kernel to read its weights meanwhile
EARLY_MEMORY = 128 * 1024  # bytes of a program launched early: one of the kernel before still fits beside it

BlockWeights = tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]
"""fc1's weight and bias, fc2's weight, and what comes behind: its bias, norm2's weight and bias."""


@dataclass(frozen=True)
class Tile:
    """How one matrix product (R, W) @ (W, W) is cut into programs."""

    rows: int
    columns: int
    depth: int
    """Part of the sum that is read at once."""
    splits: int = 1
    """Parts of the sum, computed by different programs."""
    stages: int = 3
    """One more than pieces of `depth` in flight."""
    warps: int = 4

    def programs(self, rows: int, width: int) -> int:
        return -(-rows // self.rows) * (width // self.columns) * self.splits


@dataclass(frozen=True)
class Layout:
    """How a loop is run; the result is the same."""

    fc1: Tile
    fc2: Tile
    early: bool = False
    """Each kernel is launched while the one before still runs, and reads its weights while it waits for its input
    (compute capability 9.0)."""
    warps: int = 8
    """Warps of a token's program between two steps."""


def supports(denoiser: Denoiser, rows: int, passes: int) -> bool:
    """True if `denoise_fused` can run these weights on their device, on `rows` = N * B * S rows.

    The kernels read a denoiser's weights and call nothing of it, so that every part has to be of the very class they
    were written for.
    """
    if any(type(part) is not known for _, part, known in known_denoiser_parts(denoiser)):
        return False
    if type(denoiser.head) is not nn.Linear:
        return False
    weight = denoiser.head.weight
    if importlib.util.find_spec("triton") is None or not weight.is_cuda or torch.version.hip is not None:
        return False
    linears = [denoiser.head, *(linear for block in blocks_of(denoiser) for linear in (block.proj.fc1, block.proj.fc2))]
    return (
        torch.cuda.get_device_capability(weight.device) >= (8, 0)
        and weight.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and all(type(linear) is nn.Linear and linear.weight.dtype == weight.dtype for linear in linears)
        and all(linear.bias is not None and linear.weight.is_contiguous() for linear in linears)
        and denoiser.head.in_features % 16 == 0
        and 1 <= passes <= 3
        and rows <= MAX_ROWS
    )


def run_fused(
    denoiser: Denoiser,
    schedule: Schedule,
    guidance: Guidance,
    *,
    features: Tensor,
    start: Tensor,
    fresh: Tensor,
    rows: Tensor,
    times: Tensor,
    weights: Tensor,
) -> Tensor:
    """Takes all steps of a set: start (B, S, P) -> values (B, S, P).

    It needs features (N * B, S, D), `rows` of `linear_step`, the noise `fresh` of the steps that draw any, embedded
    `times` (K, width) and the passes' `weights` (N,).
    """
    condition = denoiser.time_cond_embed.condition_proj(features)  # (N * B, S, width)
    passes = [guidance.passes_at(t) for t in schedule.timesteps]
    most = max(1, ROWS_AT_ONCE // condition[..., 0].numel())
    x, first, drawn = start, 0, 0
    before = torch.zeros_like(start) if schedule.multistep else None
    while first < len(passes):  # steps with equal passes, as many as their modulations allow
        last = first + 1
        while last < len(passes) and passes[last] == passes[first] and last - first < most:
            last += 1
        u = times[first:last, None, None] + condition[: passes[first] * len(start)]  # (K', n * B, S, width)
        draws = sum(schedule.noisy[first:last])
        x = denoise_fused(
            denoiser,
            modulations(denoiser, u),
            x,
            fresh[drawn : drawn + draws],
            rows[first:last],
            weights,
            passes[first],
            schedule.clip,
            before=before,
        )
        first, drawn = last, drawn + draws
    return x


def denoise_fused(
    denoiser: Denoiser,
    modulations: Sequence[Tensor],
    start: Tensor,
    fresh: Tensor,
    steps: Tensor,
    weights: Tensor,
    passes: int,
    clip: float | None = None,
    layout: Layout | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """Noise `start` (B, S, P) -> values (B, S, P), both float32, in K steps of `linear_step` on the guided prediction.

    `steps` (K, 8) are its rows, `clip` its bound, `fresh` (K', B, S, P) the noise of the first K' steps (none: K' = 0).
    `modulations`: of each block (K, N * B, S, 3 width), of the last norm (K, N * B, S, 2 width). `weights` (N,) are the
    passes' in the guided prediction (`pass_weights`), and unused for one pass. `before` (B, S, P), of a multistep
    schedule, is the data that the step before the first predicted, and becomes that of the last. All but weights of
    layers and modulations are float32.
    """
    from nova_video.fast import fused_kernels as kernels

    batch, size, count = start.shape
    tokens, width, dtype = batch * size, denoiser.head.in_features, denoiser.head.weight.dtype
    rows = passes * tokens
    layout = layout or choose_layout(rows, width, dtype, start.device)
    fc1, fc2 = layout.fc1, layout.fc2

    values = start.detach().float().clone(memory_format=torch.contiguous_format)  # (B, S, P), updated in place
    x = values.new_empty(rows, width)  # the residual stream
    y, g = (values.new_empty(rows, width, dtype=dtype) for _ in range(2))  # what fc1 and fc2 read
    h = values.new_empty(fc2.splits, rows, width)  # the sums of fc2
    state = (values, x, y, h, values if before is None else before)
    multistep = before is not None
    update = (steps.contiguous(), weights.contiguous(), fresh.contiguous() if len(fresh) else values, len(fresh))
    modulations = tuple(modulation.contiguous() for modulation in modulations)
    blocks, ends = weights_of(denoiser)
    bound, clipped = (0.0, False) if clip is None else (float(clip), True)
    row_sizes = (width, power_of_two(width))
    token_sizes = (*row_sizes, count, power_of_two(count), passes)

    programs1, programs2 = (tile.programs(rows, width) for tile in (fc1, fc2))
    between = (blocks[-1][3], ends, modulations[-2], modulations[-1], modulations[0])
    kernels.turn_kernel[(tokens,)](
        tokens, 0, 0, state, update, bound, *between, *token_sizes, fc2.splits, False, clipped, multistep, False,
        **resources(layout.warps),
    )  # fmt: skip
    early = {"launch_pdl": True} if layout.early else {}
    for step in range(len(steps)):
        for index, (weight1, bias1, weight2, _) in enumerate(blocks):
            if index > 0:
                kernels.enter_kernel[(rows,)](
                    rows, step, state, blocks[index - 1][3], modulations[index - 1], modulations[index],
                    *row_sizes, fc2.splits, layout.early, **resources(4), **early,
                )  # fmt: skip
            kernels.linear_kernel[(programs1,)](
                y, weight1, bias1, g, rows, width, fc1.rows, fc1.columns, fc1.depth, 1, fc1.stages,
                True, layout.early, **resources(fc1.warps), **early,
            )  # fmt: skip
            kernels.linear_kernel[(programs2,)](
                g, weight2, bias1, h, rows, width, fc2.rows, fc2.columns, fc2.depth, fc2.splits, fc2.stages,
                False, layout.early, **resources(fc2.warps), **early,
            )  # fmt: skip
        kernels.turn_kernel[(tokens,)](
            tokens, step, min(step + 1, len(steps) - 1), state, update, bound, *between,
            *token_sizes, fc2.splits, True, clipped, multistep, layout.early, **resources(layout.warps), **early,
        )  # fmt: skip
    return values


def resources(warps: int) -> dict[str, int]:
    """Resources of a program: warps, and registers for its reads at once, which ptxas would save."""
    return {"num_warps": warps, "maxnreg": min(255, (1 << 16) // (32 * warps))}


def weights_of(denoiser: Denoiser) -> tuple[tuple[BlockWeights, ...], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Every block's, and those of the head and the embedding (in the order of a token's values)."""
    blocks = tuple(
        (
            block.proj.fc1.weight,
            block.proj.fc1.bias,
            block.proj.fc2.weight,
            (block.proj.fc2.bias, block.norm2.weight, block.norm2.bias),
        )
        for block in blocks_of(denoiser)
    )
    embed = denoiser.patch_embed.proj
    by_value = embed.weight.detach().permute(0, 2, 3, 1).flatten(1).contiguous()  # (width, P)
    assert embed.bias is not None
    return blocks, (denoiser.head.weight, denoiser.head.bias, by_value, embed.bias)


def blocks_of(denoiser: Denoiser) -> list[DenoiserBlock]:
    """All blocks, typed. Raises TypeError for one of another class, which the kernels would not call."""
    blocks = []
    for block in denoiser.blocks:
        if type(block) is not DenoiserBlock:
            raise TypeError(f"a block is a {type(block).__name__}: expected DenoiserBlock, the kernels know no other")
        blocks.append(block)
    return blocks


# How products are cut -------------------------------------------------------------------------------------------------


def choose_layout(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Layout:
    """The cuts that read least; launched early where the GPU can and that has paid."""
    programs, early = 1, False
    if device.type == "cuda":
        programs = torch.cuda.get_device_properties(device).multi_processor_count
        early = torch.cuda.get_device_capability(device) >= (9, 0) and width >= EARLY_WIDTH
    fc1, fc2 = (rank_tiles(rows, width, dtype.itemsize, programs, split)[0] for split in (False, True))
    layout = Layout(fc1, fc2)
    return launched_early(layout, width, dtype.itemsize) if early else layout


def rank_tiles(rows: int, width: int, itemsize: int, programs: int, split: bool) -> list[Tile]:
    """Cuts of a product, those first whose busiest multiprocessor reads the fewest bytes; `programs` run at once."""
    depth = next(depth for depth in (128 if itemsize == 2 else 32, 64, 32, 16) if width % depth == 0)
    return sorted(
        tiles(rows, width, itemsize, depth, split), key=lambda tile: bytes_read(tile, rows, width, itemsize, programs)
    )


def tiles(rows: int, width: int, itemsize: int, depth: int, split: bool) -> Iterator[Tile]:
    """All cuts that divide the product evenly, but for its rows."""
    most = max(16, power_of_two(rows))
    chunks = width // depth
    splits = [parts for parts in range(1, 9) if chunks % parts == 0 and chunks > parts] if split and chunks > 1 else [1]
    for height, columns, parts in itertools.product((16, 32, 64, 128), (16, 32, 64, 128), splits):
        if height <= most and width % columns == 0:
            fitting = SHARED_MEMORY // ((height + columns) * depth * itemsize)
            stages = max(2, min(fitting, chunks // parts + 1))
            yield Tile(height, columns, depth, parts, stages, warps=8 if height * columns > 4096 else 4)


def launched_early(layout: Layout, width: int, itemsize: int) -> Layout:
    """The layout with its kernels launched early, if what they read fits beside the kernel before; else as it is."""
    tiles = (layout.fc1, layout.fc2)
    most = max((tile.rows + tile.columns) * (width // tile.splits) * itemsize for tile in tiles)
    if itemsize > 2 or most > EARLY_MEMORY:
        return layout
    fc1, fc2 = (hold_weights(tile, width) for tile in tiles)
    return replace(layout, fc1=fc1, fc2=fc2, early=True)


def hold_weights(tile: Tile, width: int) -> Tile:
    """The cut as a program reads it all at once."""
    length = width // tile.splits
    depth = min(length & -length, 256 if tile.rows >= 64 else 128)
    return replace(tile, depth=depth, stages=1, warps=8 if tile.rows >= 64 else 4)


def bytes_read(tile: Tile, rows: int, width: int, itemsize: int, programs: int) -> int:
    """By the busiest multiprocessor for its tiles; and, by a row's program afterwards, the sums of the splits."""
    own = (min(tile.rows, rows) + tile.columns) * (width // tile.splits) * itemsize
    return -(-tile.programs(rows, width) // programs) * own + 4 * width * tile.splits


def power_of_two(count: int) -> int:
    """The least one not below."""
    return 1 << (count - 1).bit_length()
