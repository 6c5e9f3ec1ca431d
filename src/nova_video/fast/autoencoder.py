"""The released video autoencoder's decoder, arranged for speed and memory: the same numbers to rounding.

Beside the plain modules of `opensora.py`, whose weights it reads; their attention is called as it is. A tile of the
clip is held with its channels last and as a list of parts of a few frames. A layer takes the parts one by one and lets
go of each as soon as it is read, so that no more than one activation at full size exists, and a window of it:

    part --(normalise, silu)--> window, with a zero border and the two frames before --(convolve)--> part, and its sums

What is normalised is never kept but for the window. Every convolution also sums its output and its squares over the
part, from which the next normalisation has the statistics of the whole tile. Twice the rows and columns are never made
either: a nearest-neighbour doubling before a 3x3 convolution is four 2x2 convolutions of what was to be doubled.

The three pieces in that line are plain torch in `autoencoder_pieces.py`, with cuDNN's convolutions on a GPU, and Triton
kernels in `autoencoder_kernels.py`.
Legend: T frames of the tile, k of a part, H W rows and columns, C channels; all of one clip.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nova_video.autoencoders.opensora import (
    AutoencoderKLOpenSora,
    CausalConv3d,
    FrameAttention,
    Level,
    MidBlock,
    OpenSoraDecoder,
    ResnetBlock3D,
    Upsample2D,
    Upsample3D,
)
from nova_video.fast.arrange import over
from nova_video.fast.autoencoder_pieces import PLAIN, Pieces, channel_sums
from nova_video.fast.known import has_hook

log = logging.getLogger(__name__)

BEFORE = 2  # frames that a convolution over time sees besides its own
EXACT_TYPES = (
    *(OpenSoraDecoder, MidBlock, Level, ResnetBlock3D, FrameAttention, CausalConv3d, Upsample2D, Upsample3D),
    *(nn.ModuleList, nn.GroupNorm, nn.Linear),
)
"""Classes of the parts of a decoder that this file was written for."""
PART_VALUES = 300_000_000  # of a part, about: three frames of 480x768 with 256 channels


@dataclass(eq=False)
class TileParts:
    """A tile between two layers. Whoever reads it takes its parts away."""

    parts: list[Tensor]
    """(k, H, W, C) each, contiguous."""
    sums: Tensor
    """(2, C) float64: of the values and of their squares, over the whole tile."""
    frames: int


# The autoencoder ------------------------------------------------------------------------------------------------------


class FastOpenSora(AutoencoderKLOpenSora):
    """The released video autoencoder with this decoder. Where gradients are wanted, the plain modules decode."""

    def decode_tile(self, z: Tensor) -> Tensor:
        if z.shape[2] == 1 or torch.is_grad_enabled():  # one frame has a short way already
            return super().decode_tile(z)
        return torch.cat([decode_tile(self.decoder, clip) for clip in z.split(1)])


def arrange_autoencoder(vae: nn.Module) -> nn.Module:
    """A copy of a known autoencoder over the same weights, with the fast decoder; others come back as they are.

    It reads weights where they are: not where hooks bring them for the `forward` of a module.
    """
    if type(vae) is not AutoencoderKLOpenSora or any(hasattr(module, "_diffusers_hook") for module in vae.modules()):
        return vae
    decoder: Any = vae.decoder
    unknown = any(type(part) not in EXACT_TYPES or has_hook(part) for part in decoder.modules())
    return vae if unknown else over(FastOpenSora, vae)


# Layers ---------------------------------------------------------------------------------------------------------------


def decode_tile(decoder: OpenSoraDecoder, z: Tensor, pieces: Pieces | None = None, values: int = PART_VALUES) -> Tensor:
    """Computes `decoder(z)` for one tile (1, C, F, h, w), F > 1: pixels (1, 3, T, H, W). `values` limits a part."""
    pieces = pieces or choose_pieces(z)
    start = decoder.conv_in(z)[0].permute(1, 2, 3, 0).contiguous()  # (F, h, w, C)
    clip = whole(start)
    del start
    before, after = decoder.mid_block.resnets
    clip = resnet(_resnet(before), clip, pieces)
    middle = clip.parts.pop().permute(3, 0, 1, 2)[None]  # (1, C, F, h, w)
    middle = decoder.mid_block.attentions[0](middle)[0].permute(1, 2, 3, 0).contiguous()
    clip = resnet(_resnet(after), whole(middle), pieces)
    del middle
    for level in decoder.up_blocks:
        for block in level.resnets:  # type: ignore[union-attr]
            clip = resnet(_resnet(block), clip, pieces)
        for upsampler in level.upsamplers or ():  # type: ignore[union-attr]
            conv = upsampler.conv
            clip = (double_clip if conv.kernel_size[0] > 1 else double_frames)(conv, clip, pieces, values)
    out, weight = decoder.conv_out, laid_out(decoder.conv_out)
    scale, shift = affine(decoder.conv_norm_out, clip)
    window = Window(clip, clip.parts[0].shape)
    pixels = []
    for part in pop_parts(clip):
        window.push(part, scale, shift, pieces)
        pixels.append(pieces.convolve(window.frames, weight, _bias(out), None, False, (0, 0))[0])
    return torch.cat(pixels).permute(3, 0, 1, 2)[None]  # (1, 3, T, H, W)


def resnet(block: ResnetBlock3D, x: TileParts, pieces: Pieces) -> TileParts:
    """A residual block; x is used up, part by part, and its parts become the output's where their shape allows."""
    scale, shift = affine(block.norm1, x)
    weight = laid_out(block.conv1)
    hidden = TileParts([], x.sums.new_zeros(()), x.frames)
    kept: list[Tensor] = []
    window = Window(x, x.parts[0].shape)
    for part in pop_parts(x):
        window.push(part, scale, shift, pieces)
        made, sums = pieces.convolve(window.frames, weight, _bias(block.conv1), None, False, (0, 0))
        hidden.parts.append(made)
        hidden.sums = hidden.sums + sums
        short = block.conv_shortcut
        kept.append(part if short is None else F.linear(part, short.weight.flatten(1), short.bias))
        del part, made
    del window
    scale, shift = affine(block.norm2, hidden)
    weight = laid_out(block.conv2)
    out = TileParts([], x.sums.new_zeros(()), x.frames)
    window = Window(hidden, hidden.parts[0].shape)
    for part in pop_parts(hidden):
        window.push(part, scale, shift, pieces)
        del part
        made, sums = pieces.convolve(window.frames, weight, _bias(block.conv2), kept[len(out.parts)], True, (0, 0))
        out.parts.append(made)
        out.sums = out.sums + sums
    return out


def double_frames(conv: nn.Conv3d, x: TileParts, pieces: Pieces, values: int) -> TileParts:
    """Doubles rows and columns and convolves 3x3, as four 2x2 convolutions of x.

    There is one for each of the four places in a doubled cell.
    """
    weight, bias = conv.weight, _bias(conv)  # (D, C, 1, 3, 3)
    _, H, W, C = x.parts[0].shape
    out = TileParts([], x.sums.new_zeros(()), x.frames)
    frames = [frame for part in pop_parts(x) for frame in part.split(1)]  # views: a part goes when its last frame went
    for length in parts_of(x.frames, 4 * H * W * weight.shape[0], values):
        window = frames[0].new_zeros(length, H + 2, W + 2, C)
        for index in range(length):
            window[index, 1:-1, 1:-1] = frames.pop(0)[0]
        part = window.new_empty(length, 2 * H, 2 * W, weight.shape[0])
        for row in (0, 1):
            for column in (0, 1):
                taps = halve_taps(halve_taps(weight, 3, row), 4, column)  # (D, C, 1, 2, 2)
                place = part[:, row::2, column::2]
                out.sums = out.sums + pieces.convolve(window, taps, bias, place, False, (row, column))[1]
        out.parts.append(part)
    return out


def halve_taps(weight: Tensor, axis: int, place: int) -> Tensor:
    """Turns three taps on doubled values into two taps on the values before doubling.

    `place` is the first or the second one of a pair.
    """
    first, middle, last = weight.float().unbind(axis)
    pair = (first, middle + last) if place == 0 else (first + middle, last)
    memory = torch.channels_last_3d if weight.ndim == 5 else torch.preserve_format
    return torch.stack(pair, dim=axis).to(weight.dtype).contiguous(memory_format=memory)


def double_clip(conv: nn.Conv3d, x: TileParts, pieces: Pieces, values: int) -> TileParts:
    """Twice the rows, the columns and, but for the first, the frames; then a convolution over all three."""
    _, H, W, C = x.parts[0].shape
    frames, weight, bias = 2 * x.frames - 1, laid_out(conv), _bias(conv)
    write = pieces.double(torch.cat(list(pop_parts(x))))
    out = TileParts([], x.sums.new_zeros(()), frames)
    lengths = parts_of(frames, 4 * H * W * max(C, conv.out_channels), values)
    window = weight.new_zeros(lengths[0] + BEFORE, 2 * H + 2, 2 * W + 2, C)
    start = 0
    for length in lengths:
        known = min(start, BEFORE)
        write(start - known, window[BEFORE - known : BEFORE + length, 1:-1, 1:-1])
        window[: BEFORE - known] = window[BEFORE]
        made, sums = pieces.convolve(window[: BEFORE + length], weight, bias, None, False, (0, 0))
        out.parts.append(made)
        out.sums = out.sums + sums
        start += length
    return out


class Window:
    """The input of a causal convolution: a normalised part with a border of zeros, behind its two earlier frames."""

    def __init__(self, clip: TileParts, shape: torch.Size) -> None:
        _, H, W, C = shape
        longest = max(len(part) for part in clip.parts)
        self._buffer = clip.parts[0].new_zeros(longest + BEFORE, H + 2, W + 2, C)
        self._length = 0

    @property
    def frames(self) -> Tensor:
        """(k + 2, H + 2, W + 2, C)."""
        return self._buffer[: self._length + BEFORE]

    def push(self, part: Tensor, scale: Tensor, shift: Tensor, pieces: Pieces) -> None:
        """The next part; the first frame of all stands for those before it."""
        began = self._length > 0
        if began:  # parts but the last have two frames at least, so these do not overlap
            self._buffer[:BEFORE] = self._buffer[self._length : self._length + BEFORE]
        self._length = len(part)
        pieces.normalise(part, scale, shift, self._buffer[BEFORE : BEFORE + len(part), 1:-1, 1:-1])
        if not began:
            self._buffer[:BEFORE] = self._buffer[BEFORE]


# Parts and statistics -------------------------------------------------------------------------------------------------


def whole(x: Tensor) -> TileParts:
    """x (T, H, W, C) as a clip of one part."""
    return TileParts([x], channel_sums(x).double(), len(x))


def pop_parts(clip: TileParts) -> Iterator[Tensor]:
    """The parts, each gone from the clip when it is handed out."""
    while clip.parts:
        yield clip.parts.pop(0)


def parts_of(frames: int, values: int, most: int) -> list[int]:
    """Lengths of parts of about `most` values, frames of `values` each: none shorter than two, longest first."""
    count = min(-(-frames // max(most // values, BEFORE)), max(frames // BEFORE, 1))
    return [frames // count + (index < frames % count) for index in range(count)]


def affine(norm: nn.GroupNorm, clip: TileParts) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) float32 that normalise the clip: statistics of the whole tile, in groups of channels."""
    _, H, W, C = clip.parts[0].shape
    count = clip.frames * H * W * C // norm.num_groups
    mean, square = clip.sums.double().unflatten(1, (norm.num_groups, -1)).sum(2) / count  # (groups,) each
    spread = torch.rsqrt((square - mean.square()).clamp(min=0) + norm.eps)
    scale = norm.weight.double().unflatten(0, (norm.num_groups, -1)) * spread[:, None]  # (groups, C / groups)
    shift = norm.bias.double() - (mean[:, None] * scale).flatten()
    return scale.flatten().float(), shift.float()


def _resnet(block: Any) -> ResnetBlock3D:
    return block


def laid_out(conv: nn.Conv3d) -> Tensor:
    """The weight with its channels last, as the convolutions read it: a copy for one layer of one tile.

    The module keeps its own, which another thread may be decoding with plainly.
    """
    return conv.weight.contiguous(memory_format=torch.channels_last_3d)


def _bias(conv: nn.Conv3d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


# Which pieces ---------------------------------------------------------------------------------------------------------


def choose_pieces(z: Tensor) -> Pieces:
    """Triton kernels on a GPU, in half precision, where they work; plain torch elsewhere."""
    if z.device.type != "cuda" or z.dtype not in (torch.float16, torch.bfloat16):
        return PLAIN
    return _kernels(z.device, z.dtype) or PLAIN


@cache
def _kernels(device: torch.device, dtype: torch.dtype) -> Pieces | None:
    """The kernels, if they are there and give what the plain pieces give on something small; asked once a device."""
    try:
        from nova_video.fast.autoencoder_kernels import PIECES, agree

        error = agree(device, dtype)
        if error is None:
            return PIECES
    except Exception as failure:  # Triton has many ways not to work on a machine: the plain pieces always do
        error = f"{type(failure).__name__}: {failure}".splitlines()[0]
    log.warning("video decoding goes without its Triton kernels, which do not work here: %s", error)
    return None
