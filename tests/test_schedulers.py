"""diffusers' schedulers in the place of a checkpoint's own: right where they fit, refused by name where they do not.

Right is measured on values that are normal with mean 0.4 and deviation 0.3: their denoiser is a formula, and so is the
end of every path.
"""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from nova_video import NovaPipeline
from nova_video.common.errors import InputError
from nova_video.sampling.diffusion import Schedule, SetNoise, denoise_set
from nova_video.sampling.guidance import Guidance, Prediction
from nova_video.sampling.schedulers import TrainedNoise, check_scheduler, request_scheduler

CONFORMANCE = Path(__file__).parent / "conformance"
MEAN, DEVIATION = 0.4, 0.3
FLOW = FlowMatchEulerDiscreteScheduler()
DDPM = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
AS_FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
OLD_SOLVER: dict[str, Any] = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}


def make(name: str, own: Any, **options: Any) -> Any:
    return getattr(diffusers, name).from_config(own.config, **options)


def two_sets(scheduler: Any, steps: int, start: Tensor, is_flow: bool) -> Tensor:
    """Two equal sets that one scheduler denoises in turn: start (N,) -> values (2, N)."""
    schedule = Schedule.of(scheduler, steps, torch.device("cpu"))
    table = DDPM.alphas_cumprod.double()

    def predict(i: int, x: Tensor) -> Prediction:
        time, x = schedule.timesteps[i], schedule.scaled(i, x)
        if is_flow:
            noise_scale = min(time / 1000, 0.9999)
            data_scale = 1 - noise_scale
        else:
            low, high = table[int(time)], table[min(int(time) + 1, 999)]
            kept = float(low + (time - int(time)) * (high - low))
            data_scale, noise_scale = kept**0.5, (1 - kept) ** 0.5
        variance = (data_scale * DEVIATION) ** 2 + noise_scale**2
        data = MEAN + data_scale * DEVIATION**2 / variance * (x - data_scale * MEAN)
        noise = (x - data_scale * data) / noise_scale
        output = noise - data if is_flow else noise
        return Prediction(output, output)

    fresh = torch.randn(sum(schedule.noisy), 1, len(start), 1, generator=torch.Generator().manual_seed(1))
    noise = SetNoise(start.view(1, -1, 1) * schedule.start_scale, fresh, torch.zeros(1, 1, 1))
    ids = torch.arange(len(start))[None]
    made = [
        denoise_set(schedule, Guidance(1.0), noise, ids, predict, [torch.Generator().manual_seed(2)]) for _ in range(2)
    ]
    return torch.cat(made).squeeze(-1)


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}, 0.012),
        ("FlowMatchHeunDiscreteScheduler", {}, 1e-4),
        ("UniPCMultistepScheduler", AS_FLOW, 2e-3),
        ("DPMSolverMultistepScheduler", AS_FLOW, 4e-3),
        ("DPMSolverMultistepScheduler", AS_FLOW | {"solver_order": 3}, 2e-3),
        ("DPMSolverSinglestepScheduler", AS_FLOW, 1e-3),
        ("DEISMultistepScheduler", AS_FLOW, 8e-3),
        ("DDIMScheduler", {}, 0.016),
        ("DPMSolverMultistepScheduler", {}, 4e-4),
        ("DPMSolverSinglestepScheduler", {}, 5e-3),
        ("UniPCMultistepScheduler", {}, 2e-3),
        ("DEISMultistepScheduler", {}, 2e-3),
        ("EulerDiscreteScheduler", {}, 0.014),
    ],
)
def test_solvers_follow_the_exact_path(name: str, options: dict[str, Any], error: float) -> None:
    """100 steps from 9 points; the path of a normal distribution ends at mean + deviation * start."""
    is_flow = bool(options) or name.startswith("Flow")
    scheduler = make(name, FLOW if is_flow else DDPM, **options)
    check_scheduler(scheduler, TrainedNoise.of(FLOW if is_flow else DDPM))
    start = torch.linspace(-2, 2, 9)
    first, second = two_sets(request_scheduler(scheduler, None), 100, start, is_flow)
    assert torch.equal(first, second)  # nothing of a set's history reaches the next
    assert (first - (MEAN + DEVIATION * start)).abs().max() < error


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDPMScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", AS_FLOW | {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_schedulers_that_draw_end_in_the_right_distribution(name: str, options: dict[str, Any]) -> None:
    scheduler = make(name, FLOW if options else DDPM, **options)
    check_scheduler(scheduler, TrainedNoise.of(FLOW if options else DDPM))
    start = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    made = two_sets(request_scheduler(scheduler, None), 100, start, bool(options))[0]
    assert abs(float(made.mean()) - MEAN) < 0.02
    assert abs(float(made.std()) - DEVIATION) < 0.025


@pytest.mark.parametrize("name", ["FlowMatchEuler", "FlowMatchHeun", "UniPCMultistep", "DPMSolverMultistep"])
def test_flow_shift_of_every_kind(name: str) -> None:
    """sigma' = shift sigma / (1 + (shift - 1) sigma)."""
    full = f"{name}{'Discrete' if name.startswith('Flow') else ''}Scheduler"
    scheduler = make(full, FLOW, **({} if name.startswith("Flow") else AS_FLOW))
    shifted = request_scheduler(scheduler, 3.0)
    shifted.set_timesteps(100)
    scheduler.set_timesteps(100)
    plain, moved = (sorted({float(t) / 1000 for t in each.timesteps}) for each in (scheduler, shifted))
    for sigma, found in zip(plain[5:], moved[5:], strict=True):
        assert found == pytest.approx(3 * sigma / (1 + 2 * sigma), abs=4e-3)


FLOW_REFUSED = [
    (
        "UniPCMultistepScheduler",
        {"flow_shift": 3.0},
        "UniPCMultistepScheduler with use_flow_sigmas False: expected True",
    ),
    (
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True},
        "with prediction_type epsilon: expected flow_prediction",
    ),
    (
        "DPMSolverMultistepScheduler",
        AS_FLOW | OLD_SOLVER,
        r"expected dpmsolver\+\+",
    ),
    ("UniPCMultistepScheduler", AS_FLOW | {"use_karras_sigmas": True}, "use_karras_sigmas True: expected False"),
    *(
        (name, options | {"num_train_timesteps": 500}, f"{name} with num_train_timesteps 500: expected 1000")
        for name, options in (
            ("FlowMatchEulerDiscreteScheduler", {}),
            ("FlowMatchHeunDiscreteScheduler", {}),
            ("UniPCMultistepScheduler", AS_FLOW),
            ("DPMSolverMultistepScheduler", AS_FLOW),
        )
    ),
    ("UniPCMultistepScheduler", AS_FLOW | {"predict_x0": False}, "predict_x0 False: expected True"),
    ("UniPCMultistepScheduler", AS_FLOW | {"solver_type": "bh1"}, "solver_type bh1: expected bh2"),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, "use_dynamic_shifting True: expected False"),
    ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas True: expected False"),
    *(
        (name, {}, f"scheduler is {name}: expected one of FlowMatchEulerDiscreteScheduler")
        for name in ("EulerDiscreteScheduler", "DDIMScheduler", "DDPMScheduler", "LCMScheduler", "PNDMScheduler")
    ),
    ("FlowMatchLCMScheduler", {}, "scheduler is FlowMatchLCMScheduler: expected one of"),
]
DIFFUSION_REFUSED = [
    ("FlowMatchEulerDiscreteScheduler", {}, "FlowMatchEulerDiscreteScheduler: expected one of DDPMScheduler"),
    ("HeunDiscreteScheduler", {}, "HeunDiscreteScheduler: expected one of DDPMScheduler"),
    ("LCMScheduler", {}, "LCMScheduler: expected one of DDPMScheduler"),
    ("UniPCMultistepScheduler", AS_FLOW, "with use_flow_sigmas: expected False"),
    ("DDIMScheduler", {"prediction_type": "v_prediction"}, "prediction_type v_prediction: expected epsilon"),
    ("DDIMScheduler", {"beta_schedule": "linear"}, "betas of linear, 1000 steps: expected those"),
    ("DDIMScheduler", {"thresholding": True}, "thresholding True: expected False"),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type continuous: expected discrete"),
    ("DDPMScheduler", {"variance_type": "fixed_large"}, "variance_type fixed_large: expected fixed_small"),
    ("DDIMScheduler", {"clip_sample": True}, "DDIMScheduler with clip_sample True: expected False"),
    ("DDPMScheduler", {"clip_sample": True}, "DDPMScheduler with clip_sample True: expected False"),
    ("UniPCMultistepScheduler", {"solver_type": "bh1"}, "solver_type bh1: expected bh2"),
    *(
        (f"{name}MultistepScheduler", {option: True}, f"{option} True: expected False")
        for name in ("DPMSolver", "DEIS", "UniPC")
        for option in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    ),
]


@pytest.mark.parametrize(("own", "refused"), [(FLOW, FLOW_REFUSED), (DDPM, DIFFUSION_REFUSED)])
def test_what_does_not_fit_is_refused_by_name(own: Any, refused: list[tuple[str, dict[str, Any], str]]) -> None:
    for name, options, message in refused:
        with pytest.raises(InputError, match=message) as caught:
            check_scheduler(make(name, own, **options), TrainedNoise.of(own))
        assert "\n" not in str(caught.value)


def test_settings_that_do_not_say_how_many_steps_take_any() -> None:
    check_scheduler(FlowMatchEulerDiscreteScheduler(500), TrainedNoise("flow_prediction"))


def test_a_clamp_that_was_trained_with_is_kept() -> None:
    """Solvers have none, and are taken with it in the config that they were made from."""
    own = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True, clip_sample_range=2.0)
    for name in ("DDPMScheduler", "DDIMScheduler", "UniPCMultistepScheduler"):
        check_scheduler(make(name, own), TrainedNoise.of(own))
    check_scheduler(make("UniPCMultistepScheduler", own), TrainedNoise.of(DDPM))
    with pytest.raises(InputError, match="with clip_sample_range 1: expected 2,"):
        check_scheduler(make("DDIMScheduler", own, clip_sample_range=1.0), TrainedNoise.of(own))
    with pytest.raises(InputError, match="with clip_sample False: expected True"):
        check_scheduler(DDPM, TrainedNoise.of(own))


@pytest.mark.parametrize("scheduler", [None, "euler", DDIMScheduler])
def test_what_is_no_scheduler_is_refused(emoji: NovaPipeline, scheduler: Any) -> None:
    own = emoji.scheduler
    try:
        emoji.scheduler = scheduler
        with pytest.raises(InputError, match="scheduler is .*: expected one of diffusers' schedulers"):
            draw(emoji, 2)
    finally:
        emoji.scheduler = own


@pytest.fixture(scope="module")
def emoji() -> NovaPipeline:
    pipe = NovaPipeline.from_pretrained("emoji")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: NovaPipeline, steps: int, compile: bool = True, **options: Any) -> Tensor:
    images: Tensor = pipe(
        "a red apple on a white background",
        num_frames=1,
        num_inference_steps=2,
        num_diffusion_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        compile=compile,
        **options,
    ).images
    return images


def test_swapped_schedulers_draw_the_picture_of_fine_steps(emoji: NovaPipeline) -> None:
    """The fast way and the plain one alike, also with guidance that renormalises."""
    own = emoji.scheduler
    fine = draw(emoji, 200)
    coarse = (draw(emoji, 8) - fine).abs().mean()
    try:
        for scheduler in (
            FlowMatchHeunDiscreteScheduler.from_config(own.config),
            UniPCMultistepScheduler.from_config(own.config, **AS_FLOW),
            DPMSolverMultistepScheduler.from_config(own.config, **AS_FLOW),
        ):
            emoji.scheduler = scheduler
            made = draw(emoji, 8)
            assert (made - fine).abs().mean() < 0.8 * coarse
            torch.testing.assert_close(draw(emoji, 8, compile=False), made, rtol=1e-4, atol=1e-4)
            renormalised = [draw(emoji, 4, compile=way, guidance_renorm=0.5) for way in (True, False)]
            torch.testing.assert_close(*renormalised, rtol=1e-4, atol=1e-4)
        emoji.scheduler = DDIMScheduler.from_config(own.config)
        with pytest.raises(InputError, match="scheduler is DDIMScheduler: expected one of FlowMatchEuler"):
            draw(emoji, 8)
        with pytest.raises(InputError, match="scheduler is DDIMScheduler"):  # its parts remember what they learned
            draw(NovaPipeline(**emoji.components), 8)
    finally:
        emoji.scheduler = own


def test_scheduler_of_a_diffusion_checkpoint(tiny_checkpoint: Path) -> None:
    pipe = NovaPipeline.from_pretrained(tiny_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    for name in ("DDIMScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"):
        pipe.scheduler = make(name, pipe.scheduler)
        plain, fast = (
            pipe(
                "a whale",
                num_inference_steps=2,
                num_diffusion_steps=3,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
                compile=way,
            ).images
            for way in (False, True)
        )
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)
    pipe.scheduler = FLOW
    with pytest.raises(InputError, match="expected one of DDPMScheduler"):
        pipe("a whale", output_type="latent")


def test_a_scheduler_given_at_opening_is_held_against_the_checkpoint_s() -> None:
    pipe = NovaPipeline.from_pretrained("emoji", scheduler=DDIMScheduler())
    with pytest.raises(InputError, match="scheduler is DDIMScheduler: expected one of FlowMatchEuler"):
        draw(pipe, 2)
