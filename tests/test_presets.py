"""Preset do what they say and no more; presets are shares of a checkpoint's own numbers."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from nova_video.common.errors import InputError
from nova_video.common.option_fields import values_of
from nova_video.model import set_sizes
from nova_video.pipeline.plan import Capabilities, Plan, plan_as_json
from nova_video.pipeline.records import read_record
from nova_video.pipeline.request import GenerateRequest
from nova_video.pipeline.settings import Defaults
from nova_video.sampling.diffusion import Schedule
from nova_video.sampling.engine import Engine, PlainEngine
from nova_video.sampling.generate import generate_sets
from nova_video.sampling.guidance import Guidance
from nova_video.sampling.presets import EXACT, PRESETS, Preset, SpeedOptions
from nova_video.sampling.schedulers import request_scheduler, second_order
from nova_video.sampling.state import SamplingState
from test_sampling import close, embeds, make_state, open_model, open_scheduler

SETS = 5
GUIDED = Guidance(4.0)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@dataclass(frozen=True)
class Watched(PlainEngine):
    """The plain engine, and what it was asked for: rows and tokens encoded, passes and steps denoised."""

    calls: list[tuple[int, ...]]

    def features(self, condition: Tensor, embedded: Tensor, visible: Tensor, ids: Tensor, positions: Any) -> Tensor:
        self.calls.append((len(condition), ids.shape[1]))
        return super().features(condition, embedded, visible, ids, positions)

    def denoise(
        self, features: Tensor, ids: Tensor, schedule: Schedule, guidance: Guidance, noise: Any, generators: Any
    ) -> Tensor:
        self.calls.append((guidance.passes, len(schedule.timesteps)))
        return super().denoise(features, ids, schedule, guidance, noise, generators)


def made(
    speed: Preset,
    guidance: Guidance = GUIDED,
    folder: str = "rotary-flow",
    scheduler: Any = None,
    make_engine: Callable[[Any], Engine] | None = None,
) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Latents, and what the engine was asked for."""
    model, calls = open_model(folder), list[tuple[int, ...]]()
    state = make_state(model, embeds()[:1], guidance, sets=SETS, steps=4, speed=speed)
    engine = Watched(model, calls) if make_engine is None else make_engine(model)
    scheduler = request_scheduler(scheduler or open_scheduler(folder), None)
    for _ in generate_sets(model, scheduler, state, engine):
        pass
    return state.latents(), calls


SIZES = set_sizes(24, SETS)


def test_exact_is_exact() -> None:
    latents, calls = made(EXACT)
    assert calls == [call for size in SIZES for call in ((2, size), (2, 4))] * 2
    for none in (Preset(guidance_every=1), Preset(guided_sets=1.0), Preset(last_steps=1.0)):
        assert torch.equal(made(none)[0], latents)


def test_annealing() -> None:
    _, calls = made(Preset(last_steps=0.25))
    assert [steps for _, steps in calls[1::2]] == [4, 3, 2, 2, 1] * 2
    assert [EXACT.steps_of(i, 3, 25) for i in range(3)] == [25, 25, 25]
    assert Preset(last_steps=0.01).steps_of(2, 3, 25) == 1


@pytest.mark.parametrize("guidance", [Guidance(4.0), Guidance(4.0, image_scale=1.5)], ids=str)
def test_guided_sets(guidance: Guidance) -> None:
    none, calls = made(Preset(guided_sets=0.0), guidance)
    close(none, made(EXACT, Guidance(1.0))[0])
    assert {rows for rows, _ in calls} == {1}
    some, calls = made(Preset(guided_sets=0.6), guidance)
    n = guidance.passes
    assert [rows for rows, _ in calls[::2]] == [n, n, n, 1, 1] * 2
    assert [passes for passes, _ in calls[1::2]] == [n, n, n, 1, 1] * 2
    assert not torch.equal(some, none)


@pytest.mark.parametrize("guidance", [Guidance(4.0), Guidance(4.0, image_scale=1.5)], ids=str)
def test_guidance_every_other_set(guidance: Guidance) -> None:
    latents, calls = made(Preset(guidance_every=2), guidance)
    n, s = guidance.passes, SIZES
    asked = [(n, s[0] + s[1]), (1, s[1]), (n, s[2] + s[3]), (1, s[3]), (n, s[4])]
    assert calls[::2] == asked * 2
    assert {passes for passes, _ in calls[1::2]} == {n}
    exact = made(EXACT, guidance)[0]
    assert not torch.equal(latents, exact)
    assert (latents - exact).abs().mean() < (made(Preset(guided_sets=0.2), guidance)[0] - exact).abs().mean()


@pytest.mark.parametrize("folder", ["text-to-video", "rotary-flow"])
def test_second_order_is_the_library_s(folder: str) -> None:
    scheduler = second_order(open_scheduler(folder))
    assert isinstance(scheduler, DPMSolverMultistepScheduler)
    got, _ = made(Preset(solver="dpm++"), folder=folder)
    close(got, made(EXACT, folder=folder, scheduler=scheduler)[0])


def test_second_order_begins_where_the_schedule_does() -> None:
    """Not at the last timestep of training, where next to nothing of the data is left and every error counts 20,000
    times: the library's solver has another spacing of its own."""
    own = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    solver = second_order(own)
    for scheduler in (own, solver):
        scheduler.set_timesteps(10)
    assert float(own.timesteps[0]) == float(solver.timesteps[0]) == 900.0


def test_second_order_needs_fewer_steps() -> None:
    """On a flow whose velocity is known, data N(1.5, 0.3^2): nearer to the limit than Euler with twice the steps."""
    start = torch.randn(4000, generator=torch.Generator().manual_seed(0))

    def end(scheduler: Any, steps: int) -> Tensor:
        scheduler.set_timesteps(steps)
        x = start
        for i, t in enumerate(scheduler.timesteps):
            sigma = float(scheduler.sigmas[i])
            data = 1.5 + (1 - sigma) * 0.09 / ((1 - sigma) ** 2 * 0.09 + sigma**2) * (x - (1 - sigma) * 1.5)
            x = scheduler.step((x - (1 - sigma) * data) / sigma - data, t, x, return_dict=False)[0]
        return x

    flow = FlowMatchEulerDiscreteScheduler(shift=1.0)
    limit = end(FlowMatchEulerDiscreteScheduler(shift=1.0), 500)
    assert (end(second_order(flow), 12) - limit).abs().mean() < (end(flow, 24) - limit).abs().mean()


# Requests -------------------------------------------------------------------------------------------------------------

MODEL = Capabilities((64, 64), 8, 32, False, True, 4, 32, 8, True, 1000)


def plan(**values: Any) -> Any:
    return GenerateRequest("a whale", **values).resolve(Defaults(sets=16, diffusion_steps=25), MODEL)


def test_presets_are_shares_of_the_checkpoint_s_own() -> None:
    assert (plan().sets, plan().diffusion_steps, values_of(plan(), SpeedOptions)) == (16, 25, values_of(SpeedOptions()))
    fast = PRESETS["fast"]
    quick = plan(preset="fast")
    assert (quick.sets, quick.diffusion_steps) == (round(16 * fast.sets), round(25 * fast.steps))
    assert values_of(quick, SpeedOptions) == values_of(fast, SpeedOptions)
    named = plan(preset="fast", sets=12, diffusion_steps=7, solver="own", guidance_every=1)
    assert (named.sets, named.diffusion_steps) == (12, 7)
    assert (named.solver, named.guidance_every) == ("own", 1)
    assert named.last_steps == fast.last_steps
    assert read_record(Plan, json.loads(json.dumps(plan_as_json(quick))), "plan") == quick


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "turbo"}, "preset is 'turbo': expected one of exact, balanced, fast"),
        ({"solver": "heun"}, "solver is 'heun': expected own or dpm"),
        ({"last_steps": 0}, "last_steps is 0: expected a number of more than 0 and at most 1"),
        ({"guided_sets": 1.5}, "guided_sets is 1.5"),
        ({"guidance_every": 0}, "guidance_every is 0"),
    ],
)
def test_wrong_speed_options(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GenerateRequest("a whale", **values)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_fp8_is_near_the_same_picture() -> None:
    from nova_video import NovaPipeline

    pytest.importorskip("torchao")
    pipe = NovaPipeline.from_pretrained("emoji", torch_dtype=torch.bfloat16).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    request = GenerateRequest(prompt_embeds=[torch.randn(8, 384)], num_frames=5, output_type="latent", seed=0)
    exact, quick = (pipe.generate(replace(request, fp8=fp8)).frames for fp8 in (False, True))
    assert not torch.equal(quick, exact)
    apart = (quick - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    other = pipe.generate(replace(request, seed=1)).frames
    assert apart < 0.5 * (other - exact).square().mean().sqrt() / exact.square().mean().sqrt()


def test_solver_needs_a_schedule_that_it_knows() -> None:
    with pytest.raises(InputError, match="solver is dpm"):
        second_order(DDIMScheduler())


def test_saved_between_sets(tmp_path: Path) -> None:
    """In the middle of a frame whose other passes are not computed for every set."""
    from nova_video import NovaPipeline

    pipe = NovaPipeline(open_model("rotary-flow"), open_scheduler("rotary-flow"))
    pipe.set_progress_bar_config(disable=True)
    features = embeds()[0]
    request = GenerateRequest(
        prompt_embeds=[features],
        num_frames=9,
        num_inference_steps=5,
        num_diffusion_steps=3,
        preset="fast",
        output_type="latent",
        seed=0,
    )
    whole = pipe.generate(request).frames
    stopped = pipe.start(request)
    stopped.run(lambda pipe, step, frame, tensors: step < 2)
    state: SamplingState = stopped.state
    assert state.open is not None
    assert state.open.differences is not None
    stopped.save(tmp_path / "clip.state")
    assert torch.equal(pipe.resume(tmp_path / "clip.state").run().frames, whole)
