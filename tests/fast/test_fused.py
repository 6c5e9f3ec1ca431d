"""The fused denoiser loop against the plain one: on a GPU as it is, elsewhere in Triton's interpreter, step by step.

The interpreter is chosen before Triton is imported, so these tests run in a process of their own (`test_interpreted`).
"""

import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from nova_video.fast import fused
from nova_video.fast.fused import (
    Layout,
    Tile,
    blocks_of,
    bytes_read,
    denoise_fused,
    launched_early,
    rank_tiles,
    run_fused,
    supports,
)
from nova_video.fast.known import known_denoiser_parts
from nova_video.fast.modulations import modulations, predict
from nova_video.model.denoiser import Denoiser, DenoiserBlock
from nova_video.sampling.diffusion import Schedule, linear_step, predicted_data
from nova_video.sampling.guidance import Guidance, pass_weights
from nova_video.sampling.schedulers import request_scheduler

WIDTH, CHANNELS, PATCH, DEPTH, STEPS = 48, 3, 2, 2, 3
ROUNDING = 1e-4  # of the largest value, in float32
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or (DEVICE.type == "cpu" and not INTERPRETED),
    reason="needs Triton, and a GPU or its interpreter",
)
LAYOUT = Layout(Tile(16, 16, 16), Tile(16, 16, 16, splits=3))


def test_interpreted() -> None:
    """Runs the tests below in the interpreter."""
    if INTERPRETED or DEVICE.type == "cuda" or importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton and no GPU")
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


class Loop:
    """A random denoiser and all that one loop of it takes."""

    def __init__(
        self, passes: int, batch: int = 2, size: int = 3, dtype: torch.dtype = torch.float32, width: int = WIDTH
    ) -> None:
        torch.manual_seed(passes)
        self.passes, self.dtype = passes, dtype
        self.denoiser = Denoiser(DEPTH, width, 16, CHANNELS, PATCH).eval().requires_grad_(False)
        for parameter in self.denoiser.parameters():
            parameter.normal_(std=0.2)
        self.denoiser.to(DEVICE, dtype)
        values = CHANNELS * PATCH**2
        self.start = torch.randn(batch, size, values, device=DEVICE)
        self.fresh = torch.randn(STEPS, batch, size, values, device=DEVICE)
        self.rows = torch.randn(STEPS, 8, device=DEVICE)
        self.guidance = Guidance(2.5 if passes > 1 else 1.0, image_scale=1.5 if passes == 3 else 0.0)
        self.times = torch.tensor([900.0, 500.0, 100.0], device=DEVICE)
        self.features = torch.randn(passes * batch, size, 16, device=DEVICE).to(dtype)

    def modulations(self) -> list[Tensor]:
        embed = self.denoiser.time_cond_embed
        times = embed.embed_times(self.times, self.dtype)  # (K, W)
        return modulations(self.denoiser, times[:, None, None] + embed.condition_proj(self.features))

    def fused(self, layout: Layout | None = LAYOUT, clip: float | None = None, before: Tensor | None = None) -> Tensor:
        return denoise_fused(
            self.denoiser,
            self.modulations(),
            self.start,
            self.fresh,
            self.rows,
            pass_weights(self.guidance, DEVICE),
            self.passes,
            clip,
            layout,
            before,
        )

    def plain(
        self, clip: float | None = None, passes: Sequence[int] | None = None, before: Tensor | None = None
    ) -> Tensor:
        x, made = self.start, self.modulations()
        for step, row in enumerate(self.rows):
            count = passes[step] if passes else self.passes
            noisy = x.to(self.dtype).repeat(count, 1, 1)
            output = predict(self.denoiser, noisy, [modulation[step][: len(noisy)] for modulation in made])
            guided = self.guidance.combine(output, count).guided()
            data = None if before is None else predicted_data(x, guided, row)
            x = linear_step(x, guided, row, clip, self.fresh[step] if step < len(self.fresh) else None, before)
            before = data
        return x


def far(result: Tensor, expected: Tensor) -> float:
    """Largest difference, of the largest value."""
    return float((result.cpu() - expected.cpu()).abs().max() / expected.abs().max())


@needs_triton
@pytest.mark.parametrize(("passes", "clip"), [(1, 0.5), (2, 0.5), (3, None)])
def test_is_the_plain_loop(passes: int, clip: float | None) -> None:
    loop = Loop(passes)
    assert far(loop.fused(clip=clip), loop.plain(clip)) < ROUNDING


@needs_triton
@pytest.mark.parametrize("drawn", [0, STEPS - 1])
def test_the_last_steps_need_no_noise(drawn: int) -> None:
    loop = Loop(2)
    loop.fresh = loop.fresh[:drawn]
    assert far(loop.fused(), loop.plain()) < ROUNDING


@needs_triton
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_multistep(passes: int) -> None:
    """Every step takes the data that the one before predicted, the first what is given, and the last leaves its own."""
    loop = Loop(passes)
    before = torch.randn_like(loop.start)
    kept = before.clone()
    assert far(loop.fused(before=kept), loop.plain(before=before)) < ROUNDING
    assert not torch.equal(kept, before)
    assert far(loop.fused(), loop.plain(before=before)) > 1e-2


@needs_triton
@pytest.mark.parametrize("cls", [DDPMScheduler, DPMSolverMultistepScheduler])
def test_guidance_can_end_early(cls: Any) -> None:
    """At the last two steps only the conditional pass runs: the loop is run in two parts."""
    loop = Loop(2)
    scheduler = request_scheduler(cls(beta_schedule="squaredcos_cap_v2"), None)
    schedule = Schedule.of(scheduler, STEPS, DEVICE)
    assert schedule.rows is not None
    loop.rows, loop.fresh = schedule.rows, loop.fresh[: sum(schedule.noisy)]
    loop.times = torch.tensor(schedule.timesteps, device=DEVICE)
    result = run_fused(
        loop.denoiser,
        schedule,
        Guidance(scale=2.5, trunc=schedule.timesteps[0]),
        features=loop.features,
        start=loop.start,
        fresh=loop.fresh,
        rows=schedule.rows,
        times=loop.denoiser.time_cond_embed.embed_times(loop.times, torch.float32),
        weights=pass_weights(loop.guidance, DEVICE),
    )
    before = torch.zeros_like(loop.start) if schedule.multistep else None
    assert far(result, loop.plain(schedule.clip, (2, 1, 1), before)) < ROUNDING


@needs_triton
@pytest.mark.parametrize("layout", [LAYOUT, None], ids=["given", "chosen"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_as_near_to_float32_as_the_plain_loop(dtype: torch.dtype, layout: Layout | None) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies the bits of bfloat16 matrices")
    loop = Loop(2, dtype=dtype)
    plain, result = loop.plain(), loop.fused(layout)
    loop.denoiser.float()
    loop.features, loop.dtype = loop.features.float(), torch.float32
    exact = loop.plain()
    assert far(result, exact) < 1.5 * far(plain, exact)


@needs_triton
def test_cuts_change_nothing() -> None:
    loop = Loop(2, batch=1, size=9)
    for layout in (None, Layout(Tile(32, 16, 16), Tile(16, 16, 16))):
        assert far(loop.fused(layout), loop.plain()) < ROUNDING


@needs_triton
@pytest.mark.parametrize("layout", [LAYOUT, Layout(Tile(32, 16, 16), Tile(16, 16, 16))])
def test_kernels_launched_early(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs one after the other: only that they read and multiply the same can be seen there."""
    if INTERPRETED:
        from nova_video.fast import fused_kernels

        for name in ("gdc_wait", "gdc_launch_dependents"):
            monkeypatch.setattr(fused_kernels, name, lambda: None)
    elif torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a GPU that launches kernels early")
    loop = Loop(2, batch=1, size=9, dtype=torch.float16)
    early = replace(layout, early=True)
    assert far(loop.fused(early), loop.fused(layout)) < 2e-3


@needs_triton
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("width", [WIDTH, fused.EARLY_WIDTH], ids=["small", "as wide as early ones"])
def test_replays_in_a_graph(width: int) -> None:
    loop = Loop(2, dtype=torch.float16, width=width)
    once = loop.fused(None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = loop.fused(None)
    for _ in range(10):
        replayed.zero_()
        graph.replay()
        assert torch.equal(replayed, once)


def test_supports_says_where() -> None:
    denoiser = Denoiser(DEPTH, WIDTH, 16, CHANNELS, PATCH)
    assert not supports(denoiser, 10, 2)  # on a CPU
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
        denoiser.cuda()
        assert supports(denoiser, 10, 2)
        assert not supports(denoiser, fused.MAX_ROWS + 1, 2)
        assert not supports(Denoiser(DEPTH, 40, 16, CHANNELS, PATCH).cuda(), 10, 2)  # width is no multiple of 16


class Other(Denoiser):
    pass


class OtherBlock(DenoiserBlock):
    pass


def test_kernels_take_the_very_classes_they_were_written_for() -> None:
    denoiser = Denoiser(DEPTH, WIDTH, 16, CHANNELS, PATCH)
    assert all(type(part) is known for _, part, known in known_denoiser_parts(denoiser))
    assert len(blocks_of(denoiser)) == DEPTH
    assert not supports(Other(DEPTH, WIDTH, 16, CHANNELS, PATCH), 10, 2)
    for block in (OtherBlock(WIDTH), torch.nn.Identity()):
        denoiser.blocks[1] = block
        wrong = next(name for name, part, known in known_denoiser_parts(denoiser) if type(part) is not known)
        assert wrong == "image_decoder.blocks.1"
        assert not supports(denoiser, 10, 2)
        with pytest.raises(TypeError, match="expected DenoiserBlock"):  # never dropped without a word
            blocks_of(denoiser)


@pytest.mark.parametrize("width", [320, 768, 1024, 1280, 1536])
def test_cuts_are_even_and_fit(width: int) -> None:
    for rows, itemsize, split in itertools.product((6, 44, 128, 256, 512), (2, 4), (False, True)):
        ranked = rank_tiles(rows, width, itemsize, 132, split)
        for tile in ranked:
            assert width % tile.columns == 0
            assert width % (tile.depth * tile.splits) == 0
            assert tile.stages * (tile.rows + tile.columns) * tile.depth * itemsize <= 2 * fused.SHARED_MEMORY
            early = launched_early(Layout(tile, tile), width, itemsize)
            assert width % (early.fc1.depth * early.fc1.splits) == 0
            assert not early.early or (itemsize == 2 and early.fc1.stages == 1)
        first, second = (bytes_read(tile, rows, width, itemsize, 132) for tile in ranked[:2])
        assert first <= second
