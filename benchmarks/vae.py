"""How long decoding a clip takes, and what it holds: `python benchmarks/vae.py --help`.

Times the released video autoencoder with random weights, decoded by its plain modules and in the arrangements of
`fast/autoencoder.py`, and compares every result with that of the plain modules in float32. With `--convolutions` the
convolutions of its levels too, by the library and by the kernel in tiles of several sizes. Prints a line for each as
soon as it is there, also for one that fails, and writes those so far as JSON.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from result_file import result_of, write_result
from torch import Tensor

from nova_video.autoencoders import AutoencoderKLOpenSora
from nova_video.common.devices import choose_device, choose_dtype
from nova_video.fast import autoencoder as fast

REPEATS = 5
# Convolutions of the released decoder with the most work: frames of a part, rows, columns, inputs, outputs, kernel.
SHAPES = {
    "quarter": (9, 120, 192, 512, 512, (3, 3, 3)),
    "half, from 512": (6, 240, 384, 512, 256, (3, 3, 3)),
    "half": (6, 240, 384, 256, 256, (3, 3, 3)),
    "doubling, 2x2": (3, 240, 384, 256, 256, (1, 2, 2)),
    "whole, from 256": (3, 480, 768, 256, 128, (3, 3, 3)),
    "whole": (3, 480, 768, 128, 128, (3, 3, 3)),
    "last": (3, 480, 768, 128, 3, (3, 3, 3)),
}
TILES = [  # rows, columns, channels, warps, stages
    (256, 128, 64, 8, 3),
    (256, 128, 64, 8, 4),
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (128, 128, 64, 8, 4),
    (128, 128, 64, 4, 3),
    (128, 128, 64, 4, 4),
    (128, 128, 128, 8, 3),
    (128, 16, 64, 4, 4),
    (256, 16, 64, 4, 3),
    (256, 16, 64, 8, 3),
]


@dataclass(frozen=True)
class Vae:
    """Time the released video autoencoder."""

    output: Path = Path("benchmarks/measured/vae.json")
    """JSON file to write."""
    size: Literal["released", "toy"] = "released"
    """33 frames of 480x768, or a few pixels for a CPU."""
    convolutions: bool = False
    """Time the convolutions of its levels one by one, too."""
    values: tuple[int, ...] = (300_000_000,)
    """Lengths of parts to try, in values."""
    device: str = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"


def main(args: Vae) -> None:
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    rows: dict[str, list[dict[str, Any]]] = {"decodes": []} | ({"convolutions": []} if args.convolutions else {})
    result = result_of("vae", device, size=args.size, dtype=str(dtype).removeprefix("torch."), **rows)
    for measure, found in zip((decodes, convolutions), rows.values(), strict=False):
        for row in measure(args, device, dtype):
            found.append(row)
            write_result(args.output, result)


# Whole decodes --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def decodes(args: Vae, device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """A row for each way to decode the clip."""
    torch.manual_seed(0)
    with device:
        if args.size == "released":
            vae, grid = AutoencoderKLOpenSora(), (60, 96)
        else:
            vae, grid = AutoencoderKLOpenSora(block_out_channels=(16, 16, 32, 32), norm_num_groups=8), (2, 3)
    latents = torch.randn(1, 4, 9, *grid, generator=torch.Generator().manual_seed(0)).to(device)
    print(f"{'decode':52}{'seconds':>9}{'least':>9}{'most':>9}{'GB':>8}{'held':>8}{'off':>10}", flush=True)
    exact = reference(vae.eval(), latents)
    vae = vae.to(dtype)
    latents = latents.to(dtype)
    for name, last, pieces in ways():
        for values in args.values if pieces is not None else [0]:
            label = f"{name}, parts of {values:.1e}" if values else name
            vae._lay_out(torch.channels_last_3d if last else torch.contiguous_format)
            yield attempt(label, lambda pieces=pieces, values=values: decoded(vae, latents, pieces, values), exact)


def ways() -> list[tuple[str, bool, Callable[[], fast.Pieces] | None]]:
    """Name, whether weights have their channels last, and the pieces; None for the plain modules."""

    def kernels(name: str) -> fast.Pieces:
        from nova_video.fast import autoencoder_kernels as kernels

        pieces: fast.Pieces = getattr(kernels, name)
        return pieces

    return [
        ("plain", False, None),
        ("plain, channels last", True, None),
        ("in parts, torch", True, lambda: fast.PLAIN),
        ("in parts, kernels around the library", True, lambda: kernels("LIBRARY_PIECES")),
        ("in parts, kernels", True, lambda: kernels("PIECES")),
    ]


def reference(vae: AutoencoderKLOpenSora, latents: Tensor) -> Tensor | None:
    """The plain modules' pixels in float32, on the CPU; None where they do not fit."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        pixels: Tensor = vae.decode(latents).sample.cpu()
        return pixels
    except torch.OutOfMemoryError as error:
        print(f"no float32 result to compare with: {error}", flush=True)
        return None
    finally:
        torch.backends.cudnn.allow_tf32 = before


def decoded(
    vae: AutoencoderKLOpenSora, latents: Tensor, pieces: Callable[[], fast.Pieces] | None, values: int
) -> Tensor:
    """The clip, in its tiles in time."""
    if pieces is None:
        return vae.decode(latents).sample
    found = pieces()
    tiles = [
        fast.decode_tile(vae.decoder, vae.post_quant_conv(latents[:, :, start : start + 5]), found, values)
        for start in (0, 4)
    ]
    return torch.cat([tiles[0], tiles[1][:, :, 1:]], dim=2)


def attempt(label: str, work: Callable[[], Tensor], exact: Tensor | None) -> dict[str, Any]:
    """Time, memory and error of one way, printed; or what went wrong with it."""
    try:
        first = timed(work)[0]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        pixels = timed(work)[1]
        seconds = [timed(work)[0] for _ in range(REPEATS)]
        off = None
        if exact is not None:
            off = float(((pixels.float().cpu() - exact).square().mean() / exact.square().mean()).sqrt())
        row = {
            "way": label,
            "seconds": round(statistics.median(seconds), 4),
            "spread": [round(min(seconds), 4), round(max(seconds), 4)],
            "first_call_seconds": round(first, 2),
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if torch.cuda.is_available() else None,
            "held_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2) if torch.cuda.is_available() else None,
            "off": off,
        }
        shown = [f"{row['seconds']:9.4f}", *(f"{value:9.4f}" for value in row["spread"])]
        shown += [f"{row['peak_gb'] or 0:8.2f}{row['held_gb'] or 0:8.2f}", f"{off or 0:10.2e}"]
        print(f"{label:52}{''.join(shown)}", flush=True)
    except Exception as error:
        row = {"way": label, "error": f"{type(error).__name__}: {error}"[:400]}
        print(f"{label:52} FAILED: {row['error']}", flush=True)
    return row


def timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    made = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, made


# Convolutions ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def convolutions(args: Vae, device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """A row for each shape and way: milliseconds and TFLOP/s."""
    generator = torch.Generator(device).manual_seed(0)
    print(f"\n{'convolution':20}{'way':44}{'ms':>9}{'TFLOP/s':>9}{'off':>10}", flush=True)
    for name, (frames, height, width, inputs, outputs, kernel) in SHAPES.items():
        if args.size == "toy":
            frames, height, width, inputs, outputs = 2, 6, 10, inputs // 8, max(outputs // 8, 3)
        rest = [size - 1 for size in kernel]
        shape = (frames + rest[0], height + 2, width + 2, inputs)
        window = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        weight = torch.randn((outputs, inputs, *kernel), generator=generator, device=device, dtype=dtype) / 50
        weight, bias = weight.contiguous(memory_format=torch.channels_last_3d), weight.new_zeros(outputs)
        flops = 2 * frames * height * width * inputs * outputs * kernel[0] * kernel[1] * kernel[2]
        out = window.new_empty(frames, height, width, outputs)
        expected = None
        for way, work in convolution_ways(window, weight, bias, out, dtype):
            try:
                made = work()
                expected = made.float() if expected is None else expected
                off = float((made - expected).abs().max() / expected.abs().max())
                milliseconds = 1e3 * fastest(work)
                rate = flops / milliseconds / 1e9
                row = {"shape": name, "way": way, "ms": round(milliseconds, 4), "tflops": round(rate, 1)}
                print(f"{name:20}{way:44}{milliseconds:9.3f}{rate:9.1f}{off:10.2e}", flush=True)
                del made
            except Exception as error:
                row = {"shape": name, "way": way, "error": f"{type(error).__name__}: {error}"[:400]}
                print(f"{name:20}{way:44} FAILED: {row['error']}", flush=True)
            yield row


def convolution_ways(
    window: Tensor, weight: Tensor, bias: Tensor, out: Tensor, dtype: torch.dtype
) -> list[tuple[str, Callable[[], Tensor]]]:
    """Name and function of each way to do a convolution, (k, H, W, D) each; the first is what others are compared to.

    The library is given the window whole, with the border that a 2x2 convolution does not need cut off.
    """
    rows, columns = (out.shape[1] + weight.shape[3] - 1, out.shape[2] + weight.shape[4] - 1)
    cut = window[:, :rows, :columns].contiguous()
    clip, plain = cut.permute(3, 0, 1, 2)[None], cut.permute(3, 0, 1, 2)[None].contiguous()
    frames = cut.permute(0, 3, 1, 2)  # (T, C, H, W), channels last

    def by_tap() -> Tensor:
        total = F.conv2d(frames[: len(out)], weight[:, :, 0], bias)
        for tap in range(1, weight.shape[2]):
            total += F.conv2d(frames[tap : tap + len(out)], weight[:, :, tap])
        return total.permute(0, 2, 3, 1)

    def library(x: Tensor, kernel: Tensor) -> Callable[[], Tensor]:
        return lambda: F.conv3d(x, kernel, bias)[0].permute(1, 2, 3, 0)

    def kernel(tile: tuple[int, ...] | None) -> Callable[[], Tensor]:
        def work() -> Tensor:
            from nova_video.fast import autoencoder_kernels as kernels

            return kernels.convolve(
                window, weight, bias, out, False, (0, 0), None if not tile else kernels.Tile(*tile)
            )[0]

        return work

    ways = [
        ("conv3d, channels last", library(clip, weight)),
        ("conv3d, channels first", library(plain, weight.contiguous())),
        ("conv2d for each tap in time", by_tap),
        ("kernel", kernel(None)),
    ]
    fitting = [tile for tile in TILES if (tile[1] <= 16) == (weight.shape[0] <= 16) and weight.shape[1] >= tile[2]]
    return ways + [("kernel " + " ".join(map(str, tile)), kernel(tile)) for tile in fitting]


def fastest(work: Callable[[], Tensor]) -> float:
    """Seconds of one call: the median of five runs of calls back to back."""
    calls = 10 if torch.cuda.is_available() else 1
    runs = []
    for _ in range(REPEATS):
        runs.append(timed(lambda: [work() for _ in range(calls)][-1])[0] / calls)
    return statistics.median(runs)


if __name__ == "__main__":
    main(tyro.cli(Vae))
