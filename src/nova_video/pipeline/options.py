"""The settings of one generation, each declared once: a new one is a field here and its use.

Flags, keys of scripts, records, saved states and the JSON schema follow from the fields (`common/option_fields.py`).
None is the checkpoint's own default, where help says nothing else. `GenerateRequest` adds what is not a number or a
word: prompts and media. The settings of a preset are in `sampling/presets.py`. Nothing heavy is imported.

A part that users may write themselves is a setting whose value is its name, or `module:Name` (`common/extensions.py`).
"""

from dataclasses import dataclass
from typing import Any

from nova_video.common.checks import LIMITS
from nova_video.common.option_fields import Number, check_options, option, with_aliases
from nova_video.sampling.presets import PresetName, SpeedOptions

OWN = "the model's own"


@dataclass(frozen=True, kw_only=True)
class LengthOptions:
    """Size and length."""

    width: int | None = option(
        None, "Width in pixels.", low=1, high=LIMITS.side, unset=OWN, metavar="PIXELS", flags=("-W",)
    )
    height: int | None = option(
        None, "Height in pixels.", low=1, high=LIMITS.side, unset=OWN, metavar="PIXELS", flags=("-H",)
    )
    num_frames: int | float | None = option(
        None,
        "Frames, given ones included; 1 is a picture. Of what is edited, all that is given by default.",
        low=1,
        high=LIMITS.frames,
        endless=True,
        unset=OWN,
        metavar="N",
        flags=("--frames",),
    )
    seconds: float | None = option(
        None,
        "Length, in place of the number of frames; inf, for what is written while it is made: no end.",
        low=0,
        above=True,
        high=LIMITS.seconds,
        endless=True,
        metavar="SECONDS",
        recorded=False,
    )
    fps: float | None = option(
        None,
        "Frames per second, told to the model and written into the file.",
        low=LIMITS.least_fps,
        high=LIMITS.fps,
        unset=OWN,
        metavar="N",
    )


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Random numbers, sets of tokens and denoising steps."""

    seed: int | None = option(
        None,
        "Fixes the result; of several, each takes the next seed. Drawn at random if absent.",
        low=0,
        high=2**63 - 1,
        metavar="N",
    )
    sets: int | None = option(
        None,
        "Sets in which a frame's tokens are made: more is slower and finer. num_inference_steps, as released scripts"
        " say, means the same.",
        low=1,
        high=LIMITS.sets,
        unset=OWN,
        metavar="N",
        aliases=("num_sets", "num_inference_steps"),
        hint=" (num_inference_steps counts sets of tokens; the denoising steps of a set are diffusion_steps)",
    )
    diffusion_steps: int | None = option(
        None,
        "Denoising steps of each set.",
        low=1,
        high=LIMITS.diffusion_steps,
        unset=OWN,
        metavar="N",
        aliases=("num_diffusion_steps",),
    )
    order: str | Any | None = option(
        None,
        "The order in which a frame's tokens are made, and their sets: `module:Class`, or in Python an object of your"
        " own.",
        unset="random",
        metavar="MODULE:CLASS",
    )


@dataclass(frozen=True, kw_only=True)
class GuidanceOptions:
    """Settings that guide the model besides the sentence."""

    guidance_scale: Number | None = option(
        None,
        "How strictly to follow the sentence; 1 is off. It may change in time.",
        low=0,
        high=LIMITS.scale,
        unset=OWN,
        key="guidance",
        metavar="SCALE",
        flags=("--cfg", "--cfg-scale"),
    )
    guidance_rule: str | Any | None = option(
        None,
        "A rule of guidance in place of the paper's, which guidance_scale and the next three options are of:"
        " `module:Class`, or in Python an object of your own.",
        unset="the paper's",
        metavar="MODULE:CLASS",
    )
    guidance_trunc: float = option(
        0.0, "Below this timestep (0 to 1000) only the conditional pass runs.", low=0, metavar="TIMESTEP"
    )
    guidance_renorm: float = option(
        1.0,
        "Below 1: the guided prediction is scaled down towards the conditional one's norm, by this factor at most.",
        low=0,
        high=1,
        metavar="FACTOR",
    )
    image_guidance_scale: float = option(
        0.0,
        "Above 0: a third pass, without history, guides towards the history.",
        low=0,
        high=LIMITS.scale,
        key="image_guidance",
        metavar="SCALE",
    )
    motion_flow: Number | None = option(
        None,
        "How much to move, in pixels a frame. It may change in time.",
        low=0,
        high=LIMITS.motion,
        unset=OWN,
        key="motion",
        metavar="SCORE",
        flags=("--motion-score",),
    )
    flow_shift: float | None = option(
        None,
        "Shift of a flow-matching schedule.",
        low=0,
        above=True,
        high=LIMITS.scale,
        unset=OWN,
        metavar="N",
    )
    strength: float | None = option(
        None,
        "0 to 1: share of the tokens of what is given (under the mask, if there is one) that are made anew.",
        low=0,
        high=1,
        metavar="SHARE",
    )


@dataclass(frozen=True, kw_only=True)
class PresetOptions:
    """The named set of speed options."""

    preset: PresetName | None = option(None, "What may be lost for speed; the next five are its parts.", unset="exact")


@dataclass(frozen=True, kw_only=True)
class ContextOptions:
    """The past frames that the model reads, and the remedies against drift in long clips."""

    context_frames: int | None = option(
        None,
        "Longest clip that the model is shown: beyond it, the first frames and the most recent ones.",
        low=1,
        high=LIMITS.frames,
        unset=OWN,
        metavar="N",
    )
    sink_frames: int | None = option(
        None, "First frames that it is always shown.", low=1, high=LIMITS.frames, unset=OWN, metavar="N"
    )
    history_noise: float = option(
        0.0,
        "Against drift in long clips: noise on the frames that later ones are made from, as a standard deviation.",
        low=0,
        high=LIMITS.scale,
        metavar="STD",
    )
    reanchor_frames: int | None = option(
        None,
        "Against drift: every so many frames, show the model only the first frames and the newest one; 0: never.",
        low=0,
        high=LIMITS.frames,
        unset=OWN,
        metavar="N",
    )
    hold_statistics: float = option(
        0.0,
        "Against drift, 0 to 1: how far new frames' statistics are drawn to those of the first.",
        low=0,
        high=1,
        metavar="SHARE",
    )


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """How the machine is used: the result is the same, to rounding."""

    compile: bool | None = option(
        True, "Arrange sampling for speed. Off is the plain loop, step by step: slower, the same result to rounding."
    )
    memory_gb: float | None = option(
        None,
        "Refuse what would take more memory than this (10^9 bytes), by an estimate; inf: no bound.",
        low=0,
        above=True,
        endless=True,
        unset="this machine's",
        metavar="GB",
        recorded=False,
    )


@with_aliases
@dataclass(frozen=True, kw_only=True)
class Options(MachineOptions, ContextOptions, SpeedOptions, PresetOptions, GuidanceOptions, StepOptions, LengthOptions):
    """All settings of one generation; dataclasses list the fields of the last base first."""

    def __post_init__(self) -> None:
        check_options(self)
