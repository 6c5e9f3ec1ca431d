"""Is the fast engine's result the plain loop's? `python benchmarks/exact.py --help`.

For every configuration and seed the same random numbers go through the plain loop in float32, and through both engines
in each precision. In float32 they must agree within 1e-4 of the largest value; in a lower one the fast engine must
be no farther from the float32 loop than 1.5 times the plain one is, in the mean over all seeds. Results are written as
JSON, with device, versions and command; the exit code is 1 where a bound does not hold.

Of checkpoints, whole results are compared. A model of random weights is chaotic: with guidance, a prompt that differs
by 1e-7 ends in another picture, in the plain float32 loop as in any. There the denoiser's head is scaled down, so that
what it predicts with guidance is as large as noise is, every set is compared by itself, and all go on from what the
plain float32 loop made of it.
"""

import copy
import itertools
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from result_file import result_of, write_result
from torch import Tensor

from nova_video.bench.configs import SIZES, build
from nova_video.common.devices import choose_device
from nova_video.model import NOVATransformer3DModel
from nova_video.model.patches import gather_tokens
from nova_video.pipeline.pipeline import NovaPipeline
from nova_video.pipeline.request import GenerateRequest
from nova_video.sampling.generate import SetDone, generate_sets, reveal
from nova_video.sampling.state import SamplingState

FLOAT32_BOUND = 1e-4
RATIO_BOUND = 1.5
HEAD_SCALE = 0.25  # of a random head: 0.64 by guidance 5, the square root of 5^2 + 4^2, is 4

Precision = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Exact:
    """Compare the engines."""

    output: Path = Path("benchmarks/measured/exact.json")
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
    ratio: float | None
    """Of these two."""
    fast_max: float
    """Largest difference of the fast engine from the plain one in the same precision, relative to the largest value."""
    holds: bool


def main(args: Exact) -> None:
    device = choose_device(args.device)
    rows: list[Row] = []
    for config in args.config:
        rows += compare(config, args, device)
        write_result(args.output, result_of("exact", device, rows=[asdict(row) for row in rows]))
    print(f"{'config':16}{'dtype':10}{'seeds':>6}{'plain':>12}{'fast':>12}{'ratio':>8}{'max':>12}  holds")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        print(
            f"{row.config:16}{row.dtype:10}{row.seeds:6}{row.plain:12.3e}{row.fast:12.3e}{ratio:>8}"
            f"{row.fast_max:12.3e}  {row.holds}"
        )
    sys.exit(0 if all(row.holds for row in rows) else 1)


def compare(config: str, args: Exact, device: torch.device) -> list[Row]:
    """A row for each precision."""
    size = SIZES.get(config)
    together = size is not None
    exact = NovaPipeline.from_pretrained(config) if size is None else build(size, device, torch.float32)
    if together:
        for parameter in exact.transformer.image_decoder.head.parameters():
            parameter.data.mul_(HEAD_SCALE)
    exact.set_progress_bar_config(disable=True)
    exact.to(device)
    dtypes: dict[str, torch.dtype] = {name: getattr(torch, name) for name in args.dtype}
    pipes = {
        name: exact if dtype == torch.float32 else copy.deepcopy(exact).to(dtype) for name, dtype in dtypes.items()
    }
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in dtypes}
    for seed in range(args.seeds):
        request = request_of(exact, args, seed)
        walks = {("float32", False): Walk.start(exact, request, torch.float32, False)}  # the reference, first
        for name, way in itertools.product(dtypes, (False, True)):
            if (name, way) not in walks:
                walks[name, way] = Walk.start(pipes[name], request, dtypes[name], way)
        made = walk_together(list(walks.values())) if together else [walk.alone() for walk in walks.values()]
        results = dict(zip(walks, made, strict=True))
        for name in dtypes:
            plain, fast = results[name, False], results[name, True]
            far = [distance(result, results["float32", False]) for result in (plain, fast)]
            found[name].append((far[0], far[1], float((fast - plain).abs().max() / plain.abs().max())))
            print(f"{config} {name} seed {seed}: plain {far[0]:.3e}, fast {far[1]:.3e}", flush=True)
    for pipe in pipes.values():
        pipe.release()
    return [row_of(config, name, rows) for name, rows in found.items()]


def row_of(config: str, name: str, found: list[tuple[float, float, float]]) -> Row:
    """Of each seed's distance of the plain and the fast engine, and theirs from each other."""
    plain, fast, apart = zip(*found, strict=True)
    means = sum(plain) / len(found), sum(fast) / len(found)
    ratio = means[1] / means[0] if means[0] else None  # in float32 the plain loop is the reference itself
    holds = max(apart) < FLOAT32_BOUND if name == "float32" else ratio is not None and ratio < RATIO_BOUND
    return Row(config, name, len(found), *means, ratio, max(apart), holds)


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


@dataclass(frozen=True, eq=False)
class Walk:
    """A loop over the sets of a request."""

    model: NOVATransformer3DModel
    state: SamplingState
    sets: Iterator[SetDone]

    @classmethod
    def start(cls, pipe: NovaPipeline, request: GenerateRequest, dtype: torch.dtype, compile: bool) -> "Walk":
        """With random numbers in `dtype`, whatever the model's own."""
        generation = pipe.start(replace(request, compile=compile))
        state = generation.state
        random = replace(state.random, dtype=dtype)
        state = replace(state, random=random, noise=replace(state.noise, random=random))
        sets = generate_sets(
            pipe.transformer, generation.scheduler, state, pipe.engines.engine(pipe.transformer, compile)
        )
        return cls(pipe.transformer, state, sets)

    @torch.no_grad()
    def alone(self) -> Tensor:
        """Latents (1, C, F, h, w), float32."""
        for _ in self.sets:
            pass
        return self.state.latents().float()

    def take_over(self, other: "Walk", done: SetDone, ids: Tensor) -> None:
        """Go on from what another made of the set `ids` (1, S)."""
        if self.state.open is None:
            self.state.frames[done.frame] = other.state.frames[done.frame].to(self.state.frames[done.frame].dtype)
        else:
            values = gather_tokens(done.tokens, ids).to(self.state.open.tokens.dtype)
            reveal(self.model, self.state.open, ids, values)


@torch.no_grad()
def walk_together(walks: list[Walk]) -> list[Tensor]:
    """What each makes of every set, going on from what the first made of those before: (all tokens, P), float32."""
    made: list[list[Tensor]] = [[] for _ in walks]
    known = 0
    for results in zip(*(walk.sets for walk in walks), strict=True):
        ids = results[0].ids[:, known:]  # (1, S)
        known = 0 if results[0].frame_done else results[0].ids.shape[1]
        for values, done in zip(made, results, strict=True):
            values.append(gather_tokens(done.tokens, ids)[0].float())
        for walk in walks[1:]:
            walk.take_over(walks[0], results[0], ids)
    return [torch.cat(values) for values in made]


def distance(got: Tensor, reference: Tensor) -> float:
    """Relative root mean square."""
    return float((got - reference).square().mean().sqrt() / reference.square().mean().sqrt())


if __name__ == "__main__":
    main(tyro.cli(Exact, description=__doc__))
