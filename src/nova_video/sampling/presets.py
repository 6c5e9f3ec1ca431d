"""What may be left out of sampling for speed, and the presets made of it. The loop in `generate.py` takes them.

Every shortcut is a share of the checkpoint's own sets and steps, so that one preset suits all checkpoints. What each
costs, in scores and in distance from the exact result, `nova bench presets` measures.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal

from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from nova_video.common.checks import check_number, check_whether, shown
from nova_video.common.errors import InputError

PresetName = Literal["exact", "balanced", "fast"]
Solver = Literal["own", "dpm++"]


@dataclass(frozen=True)
class Shortcuts:
    """How a request departs from the plain loop; by default it does not."""

    sets: float = 1.0
    """Sets, as a share of the checkpoint's own, where the request names no number."""
    steps: float = 1.0
    """Denoising steps of a set, likewise."""
    last_steps: float = 1.0
    """Diffusion step annealing (arXiv 2505.20297): the share of the steps that a frame's last set takes; the sets
    before it fall to that evenly. The more is known, the less is left to decide."""
    solver: Solver = "own"
    """The checkpoint's scheduler, or DPM-Solver++ of second order (arXiv 2211.01095) on the same noise schedule."""
    guided_sets: float = 1.0
    """Share of a frame's sets that are guided; the last ones run the conditional pass alone."""
    fp8: bool = False
    """The encoders' linear layers multiply in 8 bit floats (`fp8.py`)."""
    guidance_every: int = 1
    """Sets from one in which all passes are encoded to the next: those between encode the conditional one alone, and
    take the others' difference from it as it was (as the condition cache of LazyMAR, arXiv 2503.12450)."""

    def __post_init__(self) -> None:
        for name in ("sets", "steps", "last_steps"):
            check_number(name, getattr(self, name), 0, above=True, high=1)
        check_number("guided_sets", self.guided_sets, 0, high=1)
        check_number("guidance_every", self.guidance_every, 1, integer=True)
        if self.solver not in ("own", "dpm++"):
            raise InputError(f"solver is {shown(self.solver)}: expected own or dpm++")
        check_whether("fp8", self.fp8)

    def steps_of(self, index: int, num_sets: int, num_steps: int) -> int:
        """Denoising steps of set `index` of a frame's `num_sets`."""
        done = index / max(1, num_sets - 1)
        return max(1, round(num_steps * (1 - (1 - self.last_steps) * done)))

    def guides(self, index: int, num_sets: int) -> bool:
        """Set `index` is guided."""
        return index < round(self.guided_sets * num_sets)


EXACT = Shortcuts()
PRESETS: dict[PresetName, Shortcuts] = {
    "exact": EXACT,
    "balanced": Shortcuts(sets=0.6, steps=0.32, solver="dpm++", guidance_every=2),
    "fast": Shortcuts(sets=0.42, steps=0.32, solver="dpm++", guidance_every=3),
}


def shortcuts_of(preset: str | None, **parts: Any) -> Shortcuts:
    """A preset with the parts that are not None in place of its own."""
    name = "exact" if preset is None else preset
    if not isinstance(name, str) or name not in PRESETS:
        raise InputError(f"preset is {shown(preset)}: expected one of {', '.join(PRESETS)}")
    own = {field.name: getattr(PRESETS[name], field.name) for field in fields(Shortcuts)}
    return Shortcuts(**own | {part: value for part, value in parts.items() if value is not None})


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
