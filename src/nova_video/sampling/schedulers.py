"""Which of diffusers' schedulers can denoise for a checkpoint, and how one is prepared for a request.

A model learns one noise schedule: flow matching, or the diffusion of DDPM with its own betas. A scheduler that assumes
another one makes noise, and says nothing. `TrainedNoise` is what a checkpoint's own scheduler tells of its training;
`check_scheduler` compares another scheduler with it.
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import diffusers
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
)

from nova_video.common.checks import quote
from nova_video.common.errors import InputError

FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
SOLVERS = (
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
)
"""They serve both: flow matching if `use_flow_sigmas` is on."""
DIFFUSION = ("DDPMScheduler", "DDIMScheduler")
SIGMAS = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
"""Diffusion in terms of sigmas; they know the predictions epsilon and v_prediction. Heun's steps are not among them: of
eight steps, from sigmas as large as those of a cosine schedule, they make values far outside the data."""
UNSUPPORTED_OPTIONS = (
    *("thresholding", "use_dynamic_shifting", "invert_sigmas"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
)
"""Options that act on whole pictures, need a length of sequence, swap noise and data, or take other sigmas. With other
sigmas of diffusion most solvers fail, and those of flow matching would be replaced."""


@dataclass(frozen=True)
class TrainedNoise:
    """The noise schedule that a model was trained with."""

    prediction: str
    """flow_prediction, or what DDPM's denoiser predicts: epsilon, v_prediction or sample."""
    kept: tuple[float, ...] = ()
    """Cumulative products of alpha of a diffusion; empty for flow matching."""
    steps: int | None = None
    """The number of timesteps, which scales the times that the model reads; None: unknown."""
    clip: float | None = None
    """The bound to which a diffusion's predicted data are clamped; None: they are not."""

    @classmethod
    def of(cls, scheduler: Any) -> "TrainedNoise":
        """The training that a scheduler assumes."""
        config = scheduler.config
        steps = config.get("num_train_timesteps")
        prediction = str(config.get("prediction_type", type(scheduler).__name__))
        if _is_a(scheduler, FLOW) or prediction == "flow_prediction":
            return cls("flow_prediction", steps=steps)
        kept: Any = getattr(scheduler, "alphas_cumprod", None)
        clip = float(config.get("clip_sample_range", 1)) if config.get("clip_sample") else None
        return cls(prediction, () if kept is None else tuple(kept.tolist()), steps, clip)

    @property
    def is_flow(self) -> bool:
        return self.prediction == "flow_prediction"


def check_scheduler(scheduler: Any, trained: TrainedNoise) -> None:
    """Raises InputError if the scheduler does not step along the noise schedule that the weights were trained with."""
    if not isinstance(scheduler, SchedulerMixin):
        raise InputError(f"scheduler is {quote(scheduler)}: expected one of diffusers' schedulers")
    name, config = type(scheduler).__name__, scheduler.config
    fitting: tuple[str, ...] = (*FLOW, *SOLVERS) if trained.is_flow else (*DIFFUSION, *SOLVERS)
    if trained.prediction in ("epsilon", "v_prediction"):
        fitting = (*fitting, *SIGMAS)
    learned = "flow matching" if trained.is_flow else f"diffusion with {trained.prediction}"
    if not _is_a(scheduler, fitting):
        raise InputError(
            f"scheduler is {name}: expected one of {', '.join(fitting)}, since this checkpoint was trained by {learned}"
        )
    if trained.is_flow and not _is_a(scheduler, FLOW):
        for option, value in (("use_flow_sigmas", True), ("prediction_type", "flow_prediction")):
            if config.get(option) != value:
                raise InputError(
                    f"scheduler is {name} with {option} {config.get(option)}: expected {value}, since this checkpoint"
                    f" was trained by {learned}: {name}.from_config(pipe.scheduler.config, use_flow_sigmas=True,"
                    " prediction_type='flow_prediction')"
                )
        if (algorithm := str(config.get("algorithm_type", "deis"))) in ("dpmsolver", "sde-dpmsolver"):
            raise InputError(f"scheduler is {name} with algorithm_type {algorithm}: expected {algorithm}++ for a flow")
    for option in UNSUPPORTED_OPTIONS:
        if config.get(option):
            raise InputError(f"scheduler is {name} with {option} {config[option]}: expected False")
    if _is_a(scheduler, ("UniPCMultistepScheduler",)):
        for option, value in (("predict_x0", True), ("solver_type", "bh2")):  # with others it fails or makes NaN
            if config[option] != value:
                raise InputError(f"scheduler is {name} with {option} {config[option]}: expected {value}")
    if trained.is_flow and trained.steps not in (None, config.num_train_timesteps):
        raise InputError(
            f"scheduler is {name} with num_train_timesteps {config.num_train_timesteps}: expected {trained.steps}, as"
            f" this checkpoint was trained with: {name}.from_config(pipe.scheduler.config)"
        )
    if not trained.is_flow:
        _check_diffusion(scheduler, trained, learned)


def _check_diffusion(scheduler: Any, trained: TrainedNoise, learned: str) -> None:
    name, config = type(scheduler).__name__, scheduler.config
    if config.get("use_flow_sigmas"):
        raise InputError(
            f"scheduler is {name} with use_flow_sigmas: expected False, this checkpoint was trained by {learned}"
        )
    if config.prediction_type != trained.prediction:
        raise InputError(
            f"scheduler is {name} with prediction_type {config.prediction_type}: expected {trained.prediction}"
        )
    if config.get("timestep_type", "discrete") != "discrete":
        raise InputError(f"scheduler is {name} with timestep_type {config.timestep_type}: expected discrete")
    if _is_a(scheduler, ("DDPMScheduler",)) and config.variance_type != "fixed_small":
        raise InputError(f"scheduler is {name} with variance_type {config.variance_type}: expected fixed_small")
    own = TrainedNoise.of(scheduler)
    if _is_a(scheduler, DIFFUSION) and own.clip != trained.clip:  # the others never clamp, whatever their config holds
        option, found, expected = "clip_sample", str(own.clip is not None), str(trained.clip is not None)
        if own.clip is not None and trained.clip is not None:
            option, found, expected = "clip_sample_range", f"{own.clip:g}", f"{trained.clip:g}"
        raise InputError(
            f"scheduler is {name} with {option} {found}: expected {expected}, as this checkpoint was trained with:"
            f" {name}.from_config(pipe.scheduler.config)"
        )
    kept = own.kept
    if len(kept) != len(trained.kept) or not torch.allclose(
        torch.tensor(kept), torch.tensor(trained.kept), rtol=1e-3, atol=1e-6
    ):
        raise InputError(
            f"scheduler is {name} with the betas of {config.get('beta_schedule')}, {len(kept)} steps: expected those"
            f" that this checkpoint was trained with: {name}.from_config(pipe.scheduler.config)"
        )


def new_scheduler(name: Literal["flow", "ddpm"]) -> Any:
    """The noise schedule of a released model: flow matching for 1024 px, DDPM for the others."""
    if name == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)


def request_scheduler(scheduler: Any, flow_shift: float | None) -> Any:
    """A copy of a scheduler for one request, which counts its steps in it; shifted, if a shift is given."""
    scheduler = copy.deepcopy(scheduler)
    if flow_shift is None:
        return scheduler
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_shift(flow_shift)
    else:  # they read their config at every `set_timesteps`
        name = "shift" if isinstance(scheduler, FlowMatchHeunDiscreteScheduler) else "flow_shift"
        scheduler.register_to_config(**{name: flow_shift})
    return scheduler


def _is_a(scheduler: Any, names: tuple[str, ...]) -> bool:
    return isinstance(scheduler, tuple(getattr(diffusers, name) for name in names))


def second_order(scheduler: Any) -> Any:
    """DPM-Solver++ on a checkpoint's noise schedule."""
    config = scheduler.config
    if isinstance(scheduler, DDPMScheduler):
        return DPMSolverMultistepScheduler.from_config(
            config,
            algorithm_type="dpmsolver++",
            solver_order=2,
            timestep_spacing=config.timestep_spacing,  # from_config leaves out what was not set: it has another default
        )
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return DPMSolverMultistepScheduler(
            num_train_timesteps=config.num_train_timesteps,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=scheduler.shift,
            algorithm_type="dpmsolver++",
            solver_order=2,
        )
    raise InputError(f"solver is dpm++: expected a DDPM or flow schedule, got {type(scheduler).__name__}")
