# mypy: ignore-errors
# ruff: noqa: N803
"""The first half of a block's MLP, GELU(x W^T + b) with the exact GELU, in every way: `python benchmarks/gelu.py`.

Three questions, for the shapes of the spatial encoder (rows = passes x tokens, width, four times as many columns). How
far is the compiled GELU by itself from the memory's bandwidth, and why. How long do product and GELU take one after the
other. Does one Triton kernel, or what torch.compile tunes, take less. All ways run on the first shape, the fastest of
each kind on the others, and what torch.compile tunes comes last; all in CUDA graphs. Each is compared with float32, and
one that fails is a row with its error. Rows are printed and written as they come; what would begin after `--seconds` is
left out.
Without a GPU, whether the kernels are right: `TRITON_INTERPRET=1 python benchmarks/gelu.py --size toy`.
"""

import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import triton
import triton.language as tl
import tyro
from torch import Tensor
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

SHAPES = {
    "full": {"t2v, late sets": (3600, 1024), "t2v, early sets": (2400, 1024)}
    | {"t2i-1024-0.6b": (8704, 1024), "t2i-1024-1.4b": (8704, 1536)},
    "toy": {"toy": (70, 32), "more rows": (130, 32)},
}
FAR = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5}  # of the largest value
PROMOTED = 2  # ways of each kind that go on to the other shapes


@dataclass(frozen=True)
class Gelu:
    """Time the first half of an MLP."""

    size: Literal["full", "toy"] = "full"
    kinds: tuple[str, ...] = ("alone", "separate", "triton", "tuned")
    """alone: the GELU by itself. separate: product, then GELU. triton: one kernel. tuned: what torch.compile finds."""
    seconds: float = 55
    """After which no other way begins."""
    output: Path | None = None
    """JSON file to write."""


# Kernels --------------------------------------------------------------------------------------------------------------


@triton.jit
def gelu(x, ERF: tl.constexpr):
    """x Phi(x), float32: by the library's erf, or with Phi of Abramowitz and Stegun (26.2.17), within 7.5e-8.

    For sm_90, `gelu_kernel` is 37 instructions a number with the library's, 25 with the "short" one, and 19 with the
    "lean" one, which divides and raises without care for the smallest numbers. A multiprocessor issues 128 a cycle: the
    library's takes 19 us for 3600 x 4096 numbers, which memory moves in 12.
    """
    if ERF == "library":
        return 0.5 * x * (1.0 + tl.erf(x * 0.707106781))
    size = tl.abs(x)
    exponent = -0.721347520 * x * x
    if ERF == "lean":
        t = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + 0.2316419 * size], dtype=tl.float32, is_pure=True, pack=1
        )
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [exponent], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        t = 1.0 / (1.0 + 0.2316419 * size)
        power = tl.exp2(exponent)
    series = 0.127414796 + t * (-0.142248368 + t * (0.710706871 + t * (-0.726576014 + t * 0.530702715)))
    return tl.maximum(x, 0.0) - size * t * series * power


@triton.jit
def gelu_kernel(x, out, count, BLOCK: tl.constexpr, ERF: tl.constexpr):
    """Of `count` numbers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    result = gelu(tl.load(x + at, mask=inside, other=0.0).to(tl.float32), ERF)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def place(tile, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a tile: GROUP tiles down, then one to the right, so that neighbours read the same."""
    down, right = tl.cdiv(rows, ROWS), columns // COLUMNS
    group = tile // (GROUP * right)
    height = tl.minimum(down - group * GROUP, GROUP)
    within = tile % (GROUP * right)
    return (group * GROUP + within % height) * ROWS, (within // height) * COLUMNS


@triton.jit
def linear_gelu_kernel(
    x, weight, bias, out, rows, columns, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, ERF: tl.constexpr,
):  # fmt: skip
    """A tile of GELU(x (rows, depth) @ weight (columns, depth)^T + bias); it divides columns and depth."""
    first_row, first_column = place(tl.program_id(0), rows, columns, ROWS, COLUMNS, GROUP)
    row, column = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    lefts = x + tl.minimum(row, rows - 1)[:, None] * depth + inner[None, :]  # rows outside repeat the last one
    rights = weight + column[None, :] * depth + inner[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, depth, DEPTH):
        total = tl.dot(tl.load(lefts + start), tl.load(rights + start), total, input_precision="ieee")
    total = gelu(total + tl.load(bias + column).to(tl.float32)[None, :], ERF)
    at = row[:, None] * columns + column[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=row[:, None] < rows)


@triton.jit
def linear_gelu_tma_kernel(
    x, weight, bias, out, rows, columns, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, ERF: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """The same with descriptors x, weight and out, by as many programs as there are: each does every so many tiles."""
    tiles = tl.cdiv(rows, ROWS) * (columns // COLUMNS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        row, column = place(tile, rows, columns, ROWS, COLUMNS, GROUP)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, depth, DEPTH):
            left, right = x.load([row, start]), weight.load([column, start])
            total = tl.dot(left, right.T, total, input_precision="ieee")
        offset = tl.load(bias + column + tl.arange(0, COLUMNS)).to(tl.float32)
        total = gelu(total + offset[None, :], ERF)
        out.store([row, column], total.to(out.dtype))


# Ways -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Of a Triton kernel of product and GELU."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    tma: bool = True
    persistent: int = 0
    """Programs of a multiprocessor, that stay; 0: a program for each tile."""
    erf: Literal["library", "short", "lean"] = "lean"

    def __str__(self) -> str:
        words = [
            f"{self.rows}x{self.columns}x{self.depth}, {self.warps} warps, {self.stages} stages",
            *(["descriptors"] if self.tma else []),
            *([f"{self.persistent} stay"] if self.persistent else []),
            f"{self.erf} erf",
        ]
        return ", ".join(words)


CONFIGS = [
    Config(128, 256, 64, 8, 3, tma=False),
    Config(128, 128, 64, 4, 3, tma=False),
    Config(128, 256, 64, 8, 3),
    Config(256, 128, 64, 8, 3),
    Config(128, 128, 64, 4, 2),
    Config(128, 128, 64, 8, 4),
    Config(128, 128, 64, 4, 2, persistent=2),
    Config(128, 256, 64, 8, 3, persistent=1),
    Config(128, 128, 64, 8, 4, persistent=1),
    Config(128, 128, 128, 8, 3, persistent=1),
    Config(128, 256, 64, 8, 3, erf="short"),
    Config(128, 256, 64, 8, 3, erf="library"),
]
TOY_CONFIGS = [
    Config(16, 32, 16, 4, 2, tma=False, erf="short"),
    Config(16, 32, 16, 4, 2, erf="library"),
    Config(32, 64, 16, 4, 2, persistent=1, erf="short"),
]


@dataclass(frozen=True, eq=False)
class Mlp:
    """What all ways read: x (rows, width), weight (4 width, width), bias (4 width)."""

    x: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def random(cls, rows: int, width: int, device: torch.device, dtype: torch.dtype) -> "Mlp":
        torch.manual_seed(0)
        x = torch.randn(rows, width, device=device)
        weight = torch.randn(4 * width, width, device=device) / width**0.5
        bias = torch.randn(4 * width, device=device)
        return cls(x.to(dtype), weight.to(dtype), bias.to(dtype))

    @property
    def flops(self) -> float:
        return 2.0 * self.x.numel() * len(self.weight)

    def linear(self) -> Tensor:
        return functional.linear(self.x, self.weight, self.bias)  # (rows, 4 width)

    def exact(self) -> Tensor:
        return functional.gelu(functional.linear(self.x.float(), self.weight.float(), self.bias.float()))


def linear_gelu(mlp: Mlp, config: Config) -> Tensor:
    (rows, depth), columns = mlp.x.shape, len(mlp.weight)
    out = mlp.x.new_empty(rows, columns)
    tiles = triton.cdiv(rows, config.rows) * (columns // config.columns)
    cut = (config.rows, config.columns, config.depth, 8, config.erf)
    resources = {"num_warps": config.warps, "num_stages": config.stages}
    if not config.tma:
        linear_gelu_kernel[(tiles,)](mlp.x, mlp.weight, mlp.bias, out, rows, columns, depth, *cut, **resources)
        return out
    x = TensorDescriptor.from_tensor(mlp.x, [config.rows, config.depth])
    weight = TensorDescriptor.from_tensor(mlp.weight, [config.columns, config.depth])
    to = TensorDescriptor.from_tensor(out, [config.rows, config.columns])
    programs = min(tiles, config.persistent * processors(mlp.x.device)) if config.persistent else tiles
    linear_gelu_tma_kernel[(programs,)](
        x, weight, mlp.bias, to, rows, columns, depth, *cut, config.persistent > 0, **resources
    )  # fmt: skip
    return out


def triton_gelu(x: Tensor, block: int, warps: int, erf: str) -> Tensor:
    out = torch.empty_like(x)
    gelu_kernel[(triton.cdiv(x.numel(), block),)](x, out, x.numel(), block, erf, num_warps=warps)
    return out


def short_gelu(x: Tensor) -> Tensor:
    """The short one of the kernels, for torch.compile."""
    y = x.float()
    size = y.abs()
    t = 1.0 / (1.0 + 0.2316419 * size)
    series = 0.127414796 + t * (-0.142248368 + t * (0.710706871 + t * (-0.726576014 + t * 0.530702715)))
    return (y.clamp_min(0.0) - size * t * series * torch.exp2(-0.721347520 * y * y)).to(x.dtype)


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@dataclass(frozen=True)
class Way:
    name: str
    run: Callable[[Mlp], Callable[[], Tensor]]
    """Prepares: what is returned is timed."""
    kind: str
    bytes_only: bool = False
    """A GELU by itself: rated by bytes, not operations."""


def ways(args: Gelu) -> Iterator[Way]:
    toy = args.size == "toy"
    compiled = partial(torch.compile, backend="eager" if toy else "inductor")
    if "alone" in args.kinds:
        yield from gelu_ways(compiled, toy)
    cheap = "short" if toy else "lean"  # the interpreter has no assembler
    if "separate" in args.kinds:
        dynamic, short = compiled(functional.gelu, dynamic=True), compiled(short_gelu, dynamic=True)
        yield Way("product alone, no GELU", lambda mlp: mlp.linear, "product")
        yield Way("product, GELU of torch", lambda mlp: lambda: functional.gelu(mlp.linear()), "separate")
        yield Way("product, compiled GELU", lambda mlp: lambda: dynamic(mlp.linear()), "separate")
        yield Way("product, compiled short GELU", lambda mlp: lambda: short(mlp.linear()), "separate")
        yield Way("product, Triton's GELU", lambda mlp: lambda: triton_gelu(mlp.linear(), 1024, 4, cheap), "separate")
    if "triton" in args.kinds:
        for config in TOY_CONFIGS if toy else CONFIGS:
            yield Way(f"one kernel: {config}", partial(prepare_kernel, config=config), "triton")
    if "tuned" in args.kinds and not toy:
        options = {"max_autotune_gemm": True, "max_autotune_gemm_backends": "ATEN,TRITON", "epilogue_fusion": True}

        def both(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return functional.gelu(functional.linear(x, weight, bias))

        tuned = torch.compile(both, dynamic=False, options=options)
        yield Way("torch.compile, tuned", lambda mlp: partial(tuned, mlp.x, mlp.weight, mlp.bias), "tuned")


def prepare_kernel(mlp: Mlp, config: Config) -> Callable[[], Tensor]:
    return partial(linear_gelu, mlp, config)


def gelu_ways(compiled: Callable[..., Any], toy: bool) -> Iterator[Way]:
    """Of a product that is there: the copy is what the memory allows."""

    def alone(name: str, function: Callable[[Tensor], Tensor]) -> Way:
        def prepare(mlp: Mlp) -> Callable[[], Tensor]:
            product = mlp.linear()
            return lambda: function(product)

        return Way(f"GELU alone: {name}", prepare, "alone", bytes_only=True)

    yield alone("a copy instead", torch.clone)
    yield alone("torch's", functional.gelu)
    for name, dynamic in (("dynamic", True), ("static", False)):
        yield alone(f"compiled, {name}", compiled(lambda x: functional.gelu(x), dynamic=dynamic))
        yield alone(f"compiled short, {name}", compiled(lambda x: short_gelu(x), dynamic=dynamic))
    sizes = ((64, 1),) if toy else ((1024, 4), (4096, 8))
    for block, warps in sizes:
        for erf in ("library", "short") if toy else ("library", "short", "lean"):
            run = partial(triton_gelu, block=block, warps=warps, erf=erf)
            yield alone(f"Triton, {block} by {warps} warps, {erf} erf", run)


# Measuring ------------------------------------------------------------------------------------------------------------


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Median of five measurements of a call in a CUDA graph; elsewhere of one."""
    if device.type != "cuda":
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    graph, repeats = torch.cuda.CUDAGraph(), 20
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            function()
    times = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000 / repeats)
    return statistics.median(times[1:])


def measure(way: Way, mlp: Mlp, dtype: torch.dtype) -> dict[str, Any]:
    """A row: how long, and how far from float32; or the error."""
    try:
        call = way.run(mlp)
        result, exact = call().float(), mlp.exact()
        distance = float((result - exact).abs().max() / exact.abs().max())
        row: dict[str, Any] = {"seconds": seconds(call, mlp.x.device), "far": distance}
        if way.kind != "product" and "copy" not in way.name:
            row["right"] = distance <= FAR[dtype]
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    if way.bytes_only:
        row["terabytes_per_second"] = 2 * result.numel() * dtype.itemsize / row["seconds"] / 1e12
    else:
        row["teraflops"] = mlp.flops / row["seconds"] / 1e12
    return row


def line(row: dict[str, Any]) -> str:
    head = f"{row['shape']:16} {row['rows']:5} x {row['width']:4} {row['dtype']:8} {row['way']:64}"
    if "error" in row:
        return f"{head} FAILED {row['error']}"
    rate = f"{row['teraflops']:6.0f} TFLOP/s" if "teraflops" in row else f"{row['terabytes_per_second']:6.2f} TB/s   "
    right = "" if "right" not in row else "  right" if row["right"] else "  WRONG"
    return f"{head} {1e6 * row['seconds']:8.1f} us {rate}{right} {row['far']:.1e}"


def fastest(rows: list[dict[str, Any]]) -> set[str]:
    """Names of the ways that go on to the other shapes: the best of each kind, and what they are compared with."""
    chosen = set()
    for kind in {row["kind"] for row in rows}:
        done = sorted((row for row in rows if row["kind"] == kind and "error" not in row), key=lambda r: r["seconds"])
        count = len(done) if kind in ("separate", "product") else PROMOTED
        chosen |= {row["way"] for row in done[:count]}
    return chosen


def main(args: Gelu) -> None:
    begin = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    halves = [torch.float16, torch.bfloat16] if device.type == "cuda" else [torch.float32]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
    command = shlex.join(["python", "benchmarks/gelu.py", *sys.argv[1:]])
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    rows: list[dict[str, Any]] = []

    def take(way: Way, shape: str, dtype: torch.dtype) -> None:
        if time.perf_counter() - begin > args.seconds:
            return
        count, width = SHAPES[args.size][shape]
        row = measure(way, Mlp.random(count, width, device, dtype), dtype)
        about = {"shape": shape, "rows": count, "width": width, "dtype": str(dtype).removeprefix("torch.")}
        rows.append({**about, "way": way.name, "kind": way.kind, **row})
        print(line(rows[-1]), flush=True)
        if args.output is not None:
            result = {"benchmark": "gelu", "rows": rows, "device": name, **versions, "command": command}
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    first, *others = SHAPES[args.size]
    torch.set_grad_enabled(False)
    every = list(ways(args))
    tuned = [way for way in every if way.kind == "tuned"]  # which takes its time to find what is best
    quick = [way for way in every if way.kind != "tuned"]
    for way in quick:
        for dtype in halves if way.kind == "alone" else halves[:1]:
            take(way, first, dtype)
    chosen = fastest(rows)
    for shape in others:
        for way in quick:
            if way.name in chosen:
                take(way, shape, halves[0])
    for way in tuned:
        take(way, first, halves[0])
    if args.size == "toy" and not all(row.get("right", True) and "error" not in row for row in rows):
        raise SystemExit("not all ways are right")


if __name__ == "__main__":
    main(tyro.cli(Gelu))
