# mypy: ignore-errors
# ruff: noqa: N803
"""The pieces of `autoencoder.py` as Triton kernels: one pass over memory each. Needs a GPU.

A convolution over a window with a border is a sum over its taps of matrix products of shifted rows: with the window's
frames, rows and columns as rows of one matrix (R, C), tap (t, h, w) of output row p reads row p + (t H' + h) W' + w, so
a tile of every tap is one block of that matrix, which the copy engine fetches. Output rows that lie on the border are
computed and not stored, at most a percent of them. Bias, what is added, and the sums of values and squares that the
next normalisation needs are part of the same kernel; sums are written by tile and added up in order, so that the same
input gives the same bits. All arithmetic but the products' inputs is float32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nova_video.fast import autoencoder_pieces as plain


@triton.jit
def _normalise(
    part, scale, shift, out, rows, height, width, out_frame, out_row, out_column,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """silu(part * scale + shift), rows of `part` (rows, C) into a strided (k, height, width, C)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < C)[None, :]
    x = tl.load(part + row[:, None] * C + column[None, :], mask=inside, other=0.0).to(tl.float32)
    a = tl.load(scale + column, mask=column < C, other=0.0)
    b = tl.load(shift + column, mask=column < C, other=0.0)
    y = x * a[None, :] + b[None, :]
    y = y / (1.0 + tl.exp(-y))
    place = row // (height * width) * out_frame + row // width % height * out_row + row % width * out_column
    tl.store(out + place[:, None] + column[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _double(
    x, out, start, rows, frames, height, width, out_frame, out_row, out_column,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Frames from `start` on of x (frames, height, width, C) doubled, into a strided (k, 2 height, 2 width, C)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < C)[None, :]
    f = row // (4 * height * width)
    h = row // (2 * width) % (2 * height)
    w = row % (2 * width)
    after = f + start - 1  # which frame of those after the first, -1 for the first, which is not blended in time
    near_f = 1 + after // 2
    far_f = tl.where(after % 2 == 0, near_f - 1, near_f + 1)
    near_f = tl.where(after < 0, 0, near_f)
    far_f = tl.where(after < 0, 0, tl.minimum(tl.maximum(far_f, 1), frames - 1))
    near_h, near_w = h // 2, w // 2
    far_h = tl.minimum(tl.maximum(tl.where(h % 2 == 0, near_h - 1, near_h + 1), 0), height - 1)
    far_w = tl.minimum(tl.maximum(tl.where(w % 2 == 0, near_w - 1, near_w + 1), 0), width - 1)
    y = tl.zeros((ROWS, COLUMNS), tl.float32)
    for corner in tl.static_range(8):
        source_f = far_f if corner // 4 == 1 else near_f
        source_h = far_h if corner // 2 % 2 == 1 else near_h
        source_w = far_w if corner % 2 == 1 else near_w
        weight = (
            (0.25 if corner // 4 == 1 else 0.75)
            * (0.25 if corner // 2 % 2 == 1 else 0.75)
            * (0.25 if corner % 2 == 1 else 0.75)
        )
        source = ((source_f * height + source_h) * width + source_w) * C
        y += weight * tl.load(x + source[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    place = f * out_frame + h * out_row + w * out_column
    tl.store(out + place[:, None] + column[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _convolve(
    window, weight, bias, out, sums, first, frames, height, width, padded, plane, out_frame, out_row, out_column,
    C: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, ADD: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A tile (M rows, N channels) of a convolution, and its sums. `padded` and `plane`: rows of the matrix that a row
    and a frame of the window are."""
    tiles = tl.cdiv(D, N)
    tile = tl.program_id(0) // tiles
    column0 = tl.program_id(0) % tiles * N
    row0 = tile * M
    made = tl.zeros((M, N), tl.float32)
    for step in range(TAPS * (C // K)):
        tap = step // (C // K)
        channel = step % (C // K) * K
        shifted = row0 + first + tap // (KH * KW) * plane + tap // KW % KH * padded + tap % KW
        a = window.load([shifted, channel])  # (M, K)
        b = weight.load([column0, tap * C + channel])  # (N, K)
        made = tl.dot(a, b.T, made)
    row = row0 + tl.arange(0, M)
    column = column0 + tl.arange(0, N)
    f, h, w = row // plane, row % plane // padded, row % padded
    inside = ((f < frames) & (h < height) & (w < width))[:, None] & (column < D)[None, :]
    made += tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    place = f.to(tl.int64) * out_frame + h * out_row + w * out_column
    target = out + place[:, None] + column[None, :]
    if ADD:
        made += tl.load(target, mask=inside, other=0.0).to(tl.float32)
    made = made.to(out.dtype.element_ty)
    tl.store(target, made, mask=inside)
    kept = tl.where(inside, made.to(tl.float32), 0.0)
    total = sums + tile.to(tl.int64) * 2 * D + column
    tl.store(total, tl.sum(kept, 0), mask=column < D)
    tl.store(total + D, tl.sum(kept * kept, 0), mask=column < D)


@triton.jit
def _sums(x, onto, sums, rows, C: tl.constexpr, ADD: tl.constexpr, LOOPS: tl.constexpr, ROWS: tl.constexpr,
          COLUMNS: tl.constexpr):  # fmt: skip
    """Sums of LOOPS blocks of x (rows, C), added onto `onto` first if asked, which is then what is summed."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.zeros((COLUMNS,), tl.float32)
    second = tl.zeros((COLUMNS,), tl.float32)
    for loop in range(LOOPS):
        row = (tl.program_id(0).to(tl.int64) * LOOPS + loop) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < C)[None, :]
        place = row[:, None] * C + column[None, :]
        y = tl.load(x + place, mask=inside, other=0.0)
        if ADD:
            y = (y.to(tl.float32) + tl.load(onto + place, mask=inside, other=0.0).to(tl.float32)).to(y.dtype)
            tl.store(onto + place, y, mask=inside)
        value = y.to(tl.float32)
        first += tl.sum(value, 0)
        second += tl.sum(value * value, 0)
    total = sums + tl.program_id(0).to(tl.int64) * 2 * C + column
    tl.store(total, first, mask=column < C)
    tl.store(total + C, second, mask=column < C)


# Launches -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvolutionTile:
    """How a convolution is cut up."""

    rows: int
    columns: int
    channels: int
    warps: int
    stages: int


def choose_tile(inputs: int, outputs: int) -> ConvolutionTile:
    """By channels; `benchmarks/vae.py` measures others."""
    channels = min(64, inputs & -inputs)  # a power of two that divides the inputs
    if outputs > 64:
        return ConvolutionTile(256, 128, channels, 8, 4)
    return ConvolutionTile(128, max(16, triton.next_power_of_2(outputs)), channels, 4, 3)


def normalise(part: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """The kernel for `plain.normalise`."""
    _, H, W, C = part.shape
    rows = part.numel() // C
    grid, sizes = _blocks(rows, C)
    _normalise[grid](part, scale, shift, out, rows, H, W, *out.stride()[:3], C=C, **sizes, num_warps=4)


def double(x: Tensor) -> Callable[[int, Tensor], None]:
    """The kernel for `plain.double`."""
    T, H, W, C = x.shape

    def write(start: int, out: Tensor) -> None:
        rows = out.numel() // C
        grid, sizes = _blocks(rows, C)
        _double[grid](x, out, start, rows, T, H, W, *out.stride()[:3], C=C, **sizes, num_warps=4)

    return write


def convolve(
    window: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor | None,
    add: bool,
    first: tuple[int, int],
    tile: ConvolutionTile | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernel for `plain.convolve`."""
    k, H, W, C = window.shape
    if C % 16:  # narrower than the matrix units' blocks
        return convolve_by_library(window, weight, bias, out, add, first)
    D, _, KT, KH, KW = weight.shape
    if out is None:
        out = window.new_empty(k - KT + 1, H - KH + 1, W - KW + 1, D)
    frames, height, width, _ = out.shape
    tile = tile or choose_tile(C, D)
    tiles = triton.cdiv(frames * H * W, tile.rows)
    sums = torch.empty(tiles, 2, D, dtype=torch.float32, device=window.device)
    matrix = weight.permute(0, 2, 3, 4, 1).reshape(D, -1)  # (D, taps * C): no copy, for weights with channels last
    _convolve[(tiles * triton.cdiv(D, tile.columns),)](
        TensorDescriptor.from_tensor(window.view(-1, C), [tile.rows, tile.channels]),
        TensorDescriptor.from_tensor(matrix, [tile.columns, tile.channels]),
        bias, out, sums, first[0] * W + first[1], frames, height, width, W, H * W, *out.stride()[:3],
        C=C, D=D, TAPS=KT * KH * KW, KH=KH, KW=KW, ADD=add, M=tile.rows, N=tile.columns, K=tile.channels,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, sums.sum(0, dtype=torch.float64)


def convolve_by_library(
    window: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None, add: bool, first: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Computes `plain.convolve` by the library's convolution, then addition and sums in one pass."""
    made = plain.cudnn_convolve(window, weight, bias, out, first)
    C, loops = made.shape[-1], 16
    rows = made.numel() // C
    (blocks, columns), sizes = _blocks(rows, C)
    programs = triton.cdiv(blocks, loops)
    sums = torch.empty(programs, 2, C, dtype=torch.float32, device=made.device)
    here = add and out is not None and out.is_contiguous()
    onto = out if here else made
    _sums[(programs, columns)](made, onto, sums, rows, C=C, ADD=here, LOOPS=loops, **sizes, num_warps=4)
    if out is not None and not here:
        made = out.add_(made) if add else out.copy_(made)
    return (onto if here else made), sums.sum(0, dtype=torch.float64)


def _blocks(rows: int, channels: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and block sizes over (rows, channels): 4096 values a block."""
    columns = min(128, triton.next_power_of_2(channels))
    size = max(1, 4096 // columns)
    return (triton.cdiv(rows, size), triton.cdiv(channels, columns)), {"ROWS": size, "COLUMNS": columns}


PIECES = plain.Pieces(normalise, convolve, double)
LIBRARY_PIECES = plain.Pieces(normalise, convolve_by_library, double)


def agree(device: torch.device, dtype: torch.dtype) -> str | None:
    """Compares the kernels with the plain pieces on small tensors: None, or the difference in words."""
    generator = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    tolerance = 16 * torch.finfo(dtype).eps
    part, window, scale = noise(3, 9, 20, 64), noise(5, 11, 22, 64), noise(64).float()
    weight = (noise(128, 64, 3, 3, 3) / 40).contiguous(memory_format=torch.channels_last_3d)
    made, expected = window.clone(), window.clone()
    normalise(part, scale, scale, made[2:, 1:-1, 1:-1])
    plain.normalise(part, scale, scale, expected[2:, 1:-1, 1:-1])
    checks = [("normalise", made, expected)]
    made, expected = noise(5, 18, 40, 64), torch.empty(5, 18, 40, 64, device=device, dtype=dtype)
    double(part)(0, made)
    plain.double(part)(0, expected)
    checks.append(("double", made, expected))
    onto = noise(3, 9, 20, 128)
    (made, sums), (expected, expected_sums) = (
        piece(window, weight, noise(128) * 0, onto.clone(), True, (0, 0)) for piece in (convolve, plain.convolve)
    )
    checks += [("convolve", made, expected), ("sums", sums, expected_sums.to(sums.dtype))]
    for name, made, expected in checks:
        error = ((made - expected).abs().max() / expected.abs().max()).item()
        if not error <= tolerance:
            return f"{name} is off by {error:.1e} of the largest value"
    return None
