"""Is the fast engine's result the plain loop's? `python benchmarks/exact.py --help`.

For every configuration and seed the same random numbers go through the plain loop in float32, and through both engines
in each precision. In float32 they must agree within 1e-4 of the largest value; in a lower one the fast engine must
be no farther from the float32 loop than 1.5 times the plain one is, in the mean over all seeds. Results are written as
JSON, with device, versions and command; the exit code is 1 where a bound does not hold.
"""

import copy
import json
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

from nova_video.benchmarks.configs import SIZES, build
from nova_video.benchmarks.sample import device_name, versions
from nova_video.devices import choose_device
from nova_video.pipeline import NovaPipeline
from nova_video.request import GenerateRequest
from nova_video.sampling.generate import generate_sets

FLOAT32_BOUND = 1e-4
RATIO_BOUND = 1.5

Precision = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Exact:
    """Compare the engines."""

    output: Path
    """JSON file to write."""
    config: tuple[str, ...] = ("emoji", "t2i-512-0.6b", "t2v-480-0.6b")
    """Released sizes with random weights, or checkpoints."""
    dtype: tuple[Precision, ...] = ("float32", "float16", "bfloat16")
    seeds: int = 20
    frames: int = 5
    """Pixel frames of models of video."""
    sets: int = 16
    diffusion_steps: int = 25
    device: str = "auto"


@dataclass(frozen=True)
class Row:
    """One configuration in one precision; distances are from the plain loop in float32."""

    config: str
    dtype: str
    seeds: int
    plain: float
    """Relative root mean square, the mean over the seeds."""
    fast: float
    ratio: float
    """Of these two."""
    fast_max: float
    """Largest difference of the fast engine from the plain one in the same precision, relative to the largest value."""
    holds: bool


def main(args: Exact) -> None:
    device = choose_device(args.device)
    rows = [row for config in args.config for row in compare(config, args, device)]
    print(f"{'config':16}{'dtype':10}{'seeds':>6}{'plain':>12}{'fast':>12}{'ratio':>8}{'max':>12}  holds")
    for row in rows:
        print(
            f"{row.config:16}{row.dtype:10}{row.seeds:6}{row.plain:12.3e}{row.fast:12.3e}{row.ratio:8.3f}"
            f"{row.fast_max:12.3e}  {row.holds}"
        )
    result = {
        "benchmark": "exact",
        "rows": [asdict(row) for row in rows],
        "device": device_name(device),
        "versions": versions(),
        "command": shlex.join(["python", "benchmarks/exact.py", *sys.argv[1:]]),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.exit(0 if all(row.holds for row in rows) else 1)


def compare(config: str, args: Exact, device: torch.device) -> list[Row]:
    """A row for each precision."""
    size = SIZES.get(config)
    exact = NovaPipeline.from_pretrained(config) if size is None else build(size, device, torch.float32)
    exact.set_progress_bar_config(disable=True)
    exact.to(device)
    rows = []
    for name in args.dtype:
        dtype: torch.dtype = getattr(torch, name)
        low = exact if dtype == torch.float32 else copy.deepcopy(exact).to(dtype)
        plain, fast, largest = [], [], 0.0
        for seed in range(args.seeds):
            request = request_of(exact, args, seed)
            reference = made(exact, request, dtype, compile=False)
            results = [made(low, request, dtype, compile=compile) for compile in (False, True)]
            plain.append(distance(results[0], reference))
            fast.append(distance(results[1], reference))
            largest = max(largest, float((results[1] - results[0]).abs().max() / results[0].abs().max()))
            print(f"{config} {name} seed {seed}: plain {plain[-1]:.3e}, fast {fast[-1]:.3e}", flush=True)
        means = sum(plain) / args.seeds, sum(fast) / args.seeds
        ratio = means[1] / means[0] if means[0] else float("nan")  # in float32 the plain loop is the reference itself
        holds = largest < FLOAT32_BOUND if dtype == torch.float32 else ratio < RATIO_BOUND
        rows.append(Row(config, name, args.seeds, *means, ratio, largest, holds))
        low.release()
    return rows


def request_of(pipe: NovaPipeline, args: Exact, seed: int) -> GenerateRequest:
    """With random prompt features, another for every seed."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(20, pipe.transformer.config.text_token_dim, generator=generator)
    return GenerateRequest(
        prompt_embeds=[features],
        num_frames=args.frames if pipe.transformer.has_motion else 1,
        num_inference_steps=args.sets,
        num_diffusion_steps=args.diffusion_steps,
        output_type="latent",
        seed=seed,
    )


def made(pipe: NovaPipeline, request: GenerateRequest, dtype: torch.dtype, compile: bool) -> Tensor:
    """Latents (1, C, F, h, w) in float32 from random numbers in `dtype`, whatever the model's own."""
    with torch.no_grad():
        generation = pipe.start(replace(request, compile=compile))
        state = generation.state
        random = replace(state.random, dtype=dtype)
        state = replace(state, random=random, noise=replace(state.noise, random=random))
        for _ in generate_sets(pipe.transformer, generation.scheduler, state, pipe.engine(compile)):
            pass
        return state.latents().float()


def distance(got: Tensor, reference: Tensor) -> float:
    """Relative root mean square."""
    return float((got - reference).square().mean().sqrt() / reference.square().mean().sqrt())


if __name__ == "__main__":
    main(tyro.cli(Exact, description=__doc__))
