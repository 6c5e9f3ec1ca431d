"""Options of sampling for speed, and the presets that combine them. The loop in `generate.py` takes them.

A preset's sets and steps are shares of the checkpoint's own, so that one preset suits all checkpoints. What each part
costs, in scores and in distance from the exact result, `nova bench presets` measures.
"""

from dataclasses import dataclass
from typing import Literal

from nova_video.common.option_fields import check_options, option

PresetName = Literal["exact", "balanced", "fast"]
Solver = Literal["own", "dpm++"]


@dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """The settings that a preset is made of. None is as the preset has it, and as `exact` without one."""

    solver: Solver | None = option(
        None, "The model's own scheduler, or DPM-Solver++ of second order (arXiv 2211.01095), for fewer steps."
    )
    last_steps: float | None = option(
        None,
        "Share of the denoising steps that a frame's last set takes; earlier sets fall to it evenly"
        " (arXiv 2505.20297).",
        low=0,
        above=True,
        high=1,
        metavar="SHARE",
    )
    guided_sets: float | None = option(
        None,
        "Share of a frame's sets that are guided, the first ones; the others run the conditional pass alone.",
        low=0,
        high=1,
        metavar="SHARE",
    )
    guidance_every: int | None = option(
        None,
        "Every so many sets all guidance passes are encoded; between them the conditional pass runs alone and takes"
        " the others' difference from it as it was (as in LazyMAR, arXiv 2503.12450).",
        low=1,
        metavar="N",
    )
    fp8: bool | None = option(None, "Multiply in 8 bit floats, on a GPU that has them (needs torchao).")

    def __post_init__(self) -> None:
        check_options(self)

    def steps_of(self, index: int, num_sets: int, num_steps: int) -> int:
        """Denoising steps of set `index` of a frame's `num_sets`."""
        last = 1.0 if self.last_steps is None else self.last_steps
        done = index / max(1, num_sets - 1)
        return max(1, round(num_steps * (1 - (1 - last) * done)))

    def guides(self, index: int, num_sets: int) -> bool:
        """Set `index` is guided."""
        share = 1.0 if self.guided_sets is None else self.guided_sets
        return index < round(share * num_sets)


@dataclass(frozen=True, kw_only=True)
class Preset(SpeedOptions):
    """A named set of speed options, with shares of the checkpoint's own sets and steps."""

    sets: float = option(1.0, "Sets, as a share of the checkpoint's own.", low=0, above=True, high=1)
    steps: float = option(
        1.0, "Denoising steps of a set, as a share of the checkpoint's own.", low=0, above=True, high=1
    )


SHARES = {"sets": "sets", "diffusion_steps": "steps"}
"""Options that a preset has a share of -> the field of `Preset`."""
EXACT = Preset()
PRESETS: dict[PresetName, Preset] = {
    "exact": EXACT,
    "balanced": Preset(sets=0.6, steps=0.32, solver="dpm++", guidance_every=2),
    "fast": Preset(sets=0.42, steps=0.32, solver="dpm++", guidance_every=3),
}
