"""The fused denoiser loop: whether it is right, and how long it takes: `python benchmarks/fused.py --help`.

For each shape (blocks, width, rows = passes x tokens) a random denoiser runs a DDPM loop: eagerly, eagerly in a CUDA
graph, as a compiled step in a CUDA graph, and fused: with the cuts of `sampling/fused.py`, its kernels launched early
and not, and with the best cuts that a small search finds. Every result is compared with the float32 loop; the fused one
may be no farther from it than 1.5 times the plain one in low precision. Each way of a shape runs in a process of its
own: one that fails leaves the others alone. Without a GPU:
`TRITON_INTERPRET=1 python benchmarks/fused.py --shapes 2x48x6 --steps 2`.
"""

import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers import DDPMScheduler
from result_file import result_of, write_result
from torch import Tensor

from nova_video.fast.fused import (
    Layout,
    Tile,
    choose_layout,
    denoise_fused,
    launched_early,
    rank_tiles,
)
from nova_video.fast.modulations import modulations, predict
from nova_video.model.denoiser import Denoiser
from nova_video.sampling.diffusion import Schedule, linear_step
from nova_video.sampling.guidance import Guidance, combine, pass_weights
from nova_video.sampling.schedulers import request_scheduler

PASSES, SCALE, CHANNELS, PATCH, CONDITION = 2, 5.0, 4, 2, 1024
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Fused:
    """Check and time the fused denoiser loop."""

    shapes: tuple[str, ...] = ("3x1280x48", "6x1024x32", "6x1024x128", "6x1024x256")
    """Blocks x width x rows, each."""
    ways: tuple[str, ...] = ("plain", "fused")
    dtype: str = "fp16"
    steps: int = 25
    seeds: int = 5
    """Noises that every way is checked on."""
    candidates: int = 4
    """Cuts of each matrix product that the search tries, those first that read least; 0: no search."""
    timeout: int = 200
    """Seconds for a way of a shape."""
    output: Path | None = None
    """JSON file to write."""
    child: bool = False
    """Run one shape and way, and print a line of JSON for each result."""


@dataclass(frozen=True, eq=False)
class Loop:
    """A random denoiser and what a loop of it takes."""

    denoiser: Denoiser
    schedule: Schedule
    start: Tensor
    fresh: Tensor
    u: Tensor
    """What the modulations are made of: (K, N * B, S, width)."""
    modulations: list[Tensor]
    scales: Tensor

    @classmethod
    def random(cls, shape: str, args: Fused, seed: int, device: torch.device) -> "Loop":
        depth, width, rows = (int(part) for part in shape.split("x"))
        torch.manual_seed(seed)
        with device:
            denoiser = Denoiser(depth, width, CONDITION, CHANNELS, PATCH).eval().requires_grad_(False)
        denoiser.to(DTYPES[args.dtype])
        schedule = Schedule.of(
            request_scheduler(DDPMScheduler(beta_schedule="squaredcos_cap_v2"), None), args.steps, device
        )
        size, count = rows // PASSES, CHANNELS * PATCH**2
        features = torch.randn(PASSES, size, CONDITION, device=device).to(DTYPES[args.dtype])
        times = denoiser.time_cond_embed.embed_times(
            torch.tensor(schedule.timesteps, device=device), features.dtype
        )  # (K, W)
        u = times[:, None, None] + denoiser.time_cond_embed.condition_proj(features)
        start = torch.randn(1, size, count, device=device)
        fresh = torch.randn(sum(schedule.noisy), 1, size, count, device=device)
        scales = torch.tensor([SCALE, 0.0], device=device)
        return cls(denoiser, schedule, start, fresh, u, modulations(denoiser, u), scales)

    def plain(self, step: Callable[..., Tensor] | None = None) -> Tensor:
        x, step = self.start, step or one_step
        assert self.schedule.rows is not None
        for i, row in enumerate(self.schedule.rows):
            noise = self.fresh[i] if i < len(self.fresh) else None
            x = step(self.denoiser, x, [m[i] for m in self.modulations], row, self.scales, noise, self.schedule.clip)
        return x

    def fused(self, layout: Layout | None = None) -> Tensor:
        assert self.schedule.rows is not None
        return denoise_fused(
            self.denoiser,
            self.modulations,
            self.start,
            self.fresh,
            self.schedule.rows,
            pass_weights(Guidance(SCALE), self.start.device),
            PASSES,
            self.schedule.clip,
            layout,
        )

    def exact(self) -> Tensor:
        """The plain loop in float32, of the same weights and modulations."""
        denoiser, dtype = self.denoiser, self.denoiser.head.weight.dtype
        tf32 = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        denoiser.float()
        result = replace(self, modulations=[modulation.float() for modulation in self.modulations]).plain()
        denoiser.to(dtype)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        return result


def one_step(
    denoiser: Denoiser,
    x: Tensor,
    modulations: list[Tensor],
    row: Tensor,
    scales: Tensor,
    noise: Tensor | None,
    clip: float | None,
) -> Tensor:
    output = predict(denoiser, x.to(modulations[0].dtype).repeat(PASSES, 1, 1), modulations)
    guided = combine(output, PASSES, scales[0], scales[1]).guided()
    return linear_step(x, guided, row, clip, noise)


# Measuring ------------------------------------------------------------------------------------------------------------


def seconds(function: Callable[[], Any], device: torch.device, graph: bool = True) -> float:
    """Median of five measurements of a call; on a GPU of many replays of it in a CUDA graph."""
    if device.type != "cuda":
        times = []
        for _ in range(2):
            begin = time.perf_counter()
            function()
            times.append(time.perf_counter() - begin)
        return min(times)
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    call, repeats = function, 5
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            function()
        call, repeats = captured.replay, 20
    times = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000 / repeats)
    return statistics.median(times[1:])


def far(result: Tensor, exact: Tensor) -> float:
    """Largest difference, of the largest value; not a number where any is not."""
    difference = (result - exact).abs().max() / exact.abs().max()
    return float(difference) if bool(result.isfinite().all()) else float("nan")


def check(shape: str, args: Fused, device: torch.device, layout: Layout | None) -> dict[str, Any]:
    """Distances to the float32 loop, over the seeds; in a CUDA graph the same again, bit by bit."""
    fused, plain = [], []
    for seed in range(args.seeds):
        loop = Loop.random(shape, args, seed, device)
        exact = loop.exact()
        fused.append(far(loop.fused(layout), exact))
        plain.append(far(loop.plain(), exact))
    worst = max(fused) / max(max(plain), 1e-30)
    good = worst <= 1.5 or max(fused) < 1e-4
    result = {"far": max(fused), "plain_far": max(plain), "ratio": round(min(worst, 1e6), 3), "right": good}
    if device.type == "cuda":
        once, captured = loop.fused(layout), torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            replayed = loop.fused(layout)
        for _ in range(20):
            replayed.fill_(float("nan"))
            captured.replay()
            torch.cuda.synchronize()
            if not torch.equal(once, replayed):
                result["right"] = False
                result["replay_far"] = far(replayed, once)
    return result


# What is run ----------------------------------------------------------------------------------------------------------


def run_plain(shape: str, args: Fused, device: torch.device) -> Iterator[dict[str, Any]]:
    loop = Loop.random(shape, args, 0, device)
    yield attempt("eager", lambda: {"seconds": seconds(loop.plain, device, graph=False)})
    if device.type == "cuda":
        before = "modulations of all steps, before any"
        yield attempt(before, lambda: {"seconds": seconds(lambda: modulations(loop.denoiser, loop.u), device)})
        yield attempt("eager in a graph", lambda: {"seconds": seconds(loop.plain, device)})
        step = torch.compile(one_step)
        yield attempt("compiled in a graph", lambda: {"seconds": seconds(lambda: loop.plain(step), device)})


def run_fused(shape: str, args: Fused, device: torch.device) -> Iterator[dict[str, Any]]:
    """As it lays itself out, launched early and not; then the best of a small search."""
    loop = Loop.random(shape, args, 0, device)
    layouts = {"fused, one after the other": plain_layout(loop, device)}
    early = launched_early(layouts["fused, one after the other"], *sizes(loop))
    if early.early and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        layouts["fused, launched early"] = early
    rows = []
    for name, layout in layouts.items():
        own = " (its own)" if layout == own_layout(loop, device) else ""
        rows.append(measure(name + own, loop, shape, args, device, layout))
        yield rows[-1]
    right = [row for row in rows if row.get("right")]
    if device.type != "cuda" or not right or not args.candidates:
        return
    fastest = min(right, key=lambda row: row["seconds"])
    best, least = layout_of(fastest["layout"]), fastest["seconds"]
    for part in ("fc1", "fc2", "warps"):
        for layout in list(variants(best, part, loop, args)):
            row = attempt(f"fused, tried: {layout}", lambda: {"seconds": seconds(lambda: loop.fused(layout), device)})  # noqa: B023
            if "error" in row:
                yield row
            elif row["seconds"] < least:
                best, least = layout, row["seconds"]
    yield measure("fused, best found", loop, shape, args, device, best)


WAYS = {"plain": run_plain, "fused": run_fused}


def sizes(loop: Loop) -> tuple[int, int]:
    """The denoiser's width, and the bytes of a weight."""
    weight = loop.denoiser.head.weight
    return weight.shape[1], weight.dtype.itemsize


def own_layout(loop: Loop, device: torch.device) -> Layout:
    return choose_layout(PASSES * loop.start.shape[1], sizes(loop)[0], loop.denoiser.head.weight.dtype, device)


def plain_layout(loop: Loop, device: torch.device) -> Layout:
    """The cuts that read least, one kernel after the other."""
    fc1, fc2 = (candidates(loop, part, device)[0] for part in ("fc1", "fc2"))
    return Layout(fc1, fc2)


def candidates(loop: Loop, part: str, device: torch.device) -> list[Tile]:
    """Cuts of a product, those first that read least."""
    programs = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return rank_tiles(PASSES * loop.start.shape[1], *sizes(loop), programs, part == "fc2")


def layout_of(values: dict[str, Any]) -> Layout:
    """From JSON."""
    return Layout(**values | {"fc1": Tile(**values["fc1"]), "fc2": Tile(**values["fc2"])})


def variants(best: Layout, part: str, loop: Loop, args: Fused) -> Iterator[Layout]:
    """The layout with another cut of one product, or other warps."""
    if part == "warps":
        yield from (replace(best, warps=warps) for warps in (4, 16))
        return
    for tile in candidates(loop, part, loop.start.device)[: args.candidates]:
        layout = replace(best, early=False, **{part: tile})
        if best.early:
            layout = launched_early(layout, *sizes(loop))
        if layout.early == best.early:
            cut = getattr(layout, part)
            yield from (replace(layout, **{part: replace(cut, warps=warps)}) for warps in (4, 8))


def measure(name: str, loop: Loop, shape: str, args: Fused, device: torch.device, layout: Layout) -> dict[str, Any]:
    """Whether a layout is right and how long it takes."""

    def both() -> dict[str, Any]:
        checked = check(shape, args, device, layout)
        return {"seconds": seconds(lambda: loop.fused(layout), device), **checked, "layout": asdict(layout)}

    return attempt(name, both)


def attempt(name: str, function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row: what the function measures, or its error."""
    try:
        return {"way": name, **function()}
    except Exception as error:
        traceback.print_exc(limit=-3)
        return {"way": name, "error": f"{type(error).__name__}: {str(error).strip()[:300]}"}


def spawn(shape: str, way: str, args: Fused) -> list[dict[str, Any]]:
    """Run a way of a shape in a process of its own -> its rows; what it cannot say itself is a row with an error."""
    command = [sys.executable, __file__, "--child", "--shapes", shape, "--ways", way]
    for name in ("dtype", "steps", "seeds", "candidates"):
        command += [f"--{name}", str(getattr(args, name))]
    output, error = "", ""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=args.timeout)
        output, error = done.stdout, f"ended with {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout.decode() if isinstance(expired.stdout, bytes) else expired.stdout or ""
        error = f"took more than {args.timeout} s"
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return rows + ([{"way": way, "error": error}] if error else [])


def main(args: Fused) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.child:
        for row in WAYS[args.ways[0]](args.shapes[0], args, device):
            print(json.dumps(row), flush=True)
        return
    rows: list[dict[str, Any]] = []
    result = result_of("fused", device, rows=rows)
    for shape in args.shapes:
        for way in args.ways:
            for row in spawn(shape, way, args):
                rows.append({"shape": shape, "dtype": args.dtype, "steps": args.steps, **row})
                print(line(rows[-1]), flush=True)
            if args.output is not None:
                write_result(args.output, result)


def line(row: dict[str, Any]) -> str:
    """One row of the printed table."""
    head = f"{row['shape']:12} {row['dtype']} {row['way']:36}"
    if "error" in row:
        return f"{head} FAILED {row['error']}"
    text = f"{head} {1000 * row['seconds']:8.3f} ms {1e6 * row['seconds'] / row['steps']:7.1f} us a step"
    if "right" in row:
        text += (
            f"   {'right' if row['right'] else 'WRONG'}: {row['far']:.1e} from float32, plain {row['plain_far']:.1e}"
        )
        tiles = (row["layout"]["fc1"], row["layout"]["fc2"])
        cuts = ("x".join(str(tile[key]) for key in ("rows", "columns", "depth", "splits")) for tile in tiles)
        text += f"   {' '.join(cuts)}"
    return text


if __name__ == "__main__":
    main(tyro.cli(Fused))
