"""A request resolved against one checkpoint: every None filled in, every bound that depends on the model checked.

`GenerateRequest.resolve` makes a `Plan`; `generation.py` carries it out. Plain numbers only: a plan can be saved.

Pixel frames against latent ones: latent frame 0 is one pixel frame, every later one is `temporal_stride` of them.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from nova_video.common.checks import LIMITS, check_number
from nova_video.common.errors import InputError
from nova_video.common.option_fields import check_option, option_fields, values_of
from nova_video.common.timeline import Timeline
from nova_video.io.inputs import InputClip
from nova_video.model import RANDOM_ORDER, Order
from nova_video.pipeline.options import Options
from nova_video.pipeline.own_parts import CHECKS, part_names
from nova_video.pipeline.settings import Defaults
from nova_video.sampling.context import Context
from nova_video.sampling.guidance import Guidance, GuidanceRule
from nova_video.sampling.presets import PRESETS, SHARES, SpeedOptions

if TYPE_CHECKING:
    from nova_video.pipeline.request import GenerateRequest

PIXEL_BYTES = 24  # red, green and blue as float32, twice while pieces are joined
ACTIVATIONS = 12  # values of a token at once within a block: query, key and value, the hidden layer, sums
ENDLESS_CONTEXT = 33  # pixel frames: of a clip without end, where the checkpoint says nothing; the released length


@dataclass(frozen=True)
class Capabilities:
    """The abilities of a checkpoint: the facts that a plan needs."""

    image_size: tuple[int, int]
    """Height and width it was made for, in pixels."""
    image_stride: int
    """Pixels of a latent's side."""
    size_multiple: int
    """Height and width are multiples of it, in pixels."""
    any_size: bool
    """Rotary positions: other sizes than its own."""
    video: bool
    """More than one frame, and a motion score."""
    temporal_stride: int
    """Pixel frames of a latent frame, after the first."""
    text_dim: int
    """Width of prompt features."""
    text_len: int
    """Most tokens of a prompt."""
    shiftable: bool
    """A flow-matching schedule, which can be shifted."""
    max_diffusion_steps: int
    """Steps the noise schedule was trained with."""
    latent_channels: int = 4
    second_order: bool = True
    """A noise schedule that DPM-Solver++ knows."""
    layers: int = 0
    """Blocks of the temporal encoder, which has a cache."""
    width: int = 0
    """Values of a token within both encoders."""
    value_bytes: int = 4
    """Bytes of a weight or activation."""

    def latent_count(self, num_frames: int) -> int:
        """Whole latent frames that cover so many pixel frames."""
        return latent_count(num_frames, self.temporal_stride)

    def pixel_count(self, latent_frames: int) -> int:
        """Pixel frames of so many latent frames."""
        return self.temporal_stride * (latent_frames - 1) + 1


@dataclass(frozen=True, kw_only=True)
class Plan(Options):
    """The plan of a request for one checkpoint: every option has its value.

    None is left only for what is truly absent.
    """

    width: int = field()  # in a plan it has no default
    height: int = field()
    num_frames: int | None = field()
    """Pixel frames, given ones included; None: without end."""
    fps: float = field()
    sets: int = field()
    diffusion_steps: int = field()
    compile: bool = field()
    batch: int
    """Pictures or clips: prompts times num_images_per_prompt."""
    grid: tuple[int, int]
    """Latent height and width."""
    temporal_stride: int
    given_frames: int = 0
    """Leading pixel frames that are given, at this plan's frame rate."""
    offset: int = 0
    """Number of given frames that are only returned: latent frame 0 begins at pixel frame `offset`."""
    edits: bool = False
    """Given frames are changed, under a mask or by `strength`; else they stay."""

    def __post_init__(self) -> None:
        for name in option_fields(Options):
            check_option(Options, name, getattr(self, name))

    @property
    def latent_frames(self) -> int | None:
        """Whole latent frames that cover the pixel frames, without the given frames that are only returned."""
        if self.num_frames is None:
            return None
        return latent_count(self.num_frames - self.offset, self.temporal_stride)

    @property
    def guidance(self) -> Timeline[GuidanceRule]:
        """The guidance rule of every moment."""
        if self.guidance_rule is not None:
            rule: Any = self.guidance_rule
            return Timeline((0.0,), (rule,))
        scales = Timeline.of("guidance_scale", self.guidance_scale)
        rules = [
            Guidance(scale, self.guidance_trunc, self.guidance_renorm, self.image_guidance_scale)
            for scale in scales.values
        ]
        return Timeline(scales.times, tuple(rules))

    @property
    def order_rule(self) -> Order:
        """The order in which tokens are made, and their sets."""
        rule: Any = self.order
        return RANDOM_ORDER if rule is None else rule

    @property
    def motion(self) -> Timeline[float]:
        """The motion score of every moment."""
        return Timeline.of("motion_flow", self.motion_flow)

    @property
    def context(self) -> Context:
        """The frames that the temporal encoder reads, in latent frames."""
        stride, reanchor = self.temporal_stride, self.reanchor_frames
        assert self.sink_frames is not None
        return Context(
            frames=None if self.context_frames is None else latent_count(self.context_frames, stride),
            sink=latent_count(self.sink_frames, stride),
            reanchor=max(1, round(reanchor / stride)) if reanchor else None,
            history_noise=self.history_noise,
            hold_statistics=self.hold_statistics,
        )

    @property
    def sampling(self) -> dict[str, Any]:
        """The arguments of `SamplingState.create` that a plan says."""
        return {
            "num_frames": self.latent_frames,
            "grid": self.grid,
            "num_sets": self.sets,
            "num_diffusion_steps": self.diffusion_steps,
            "context": self.context,
            "speed": self,
            "order_rule": self.order_rule,
        }

    def check_pixels(self) -> None:
        """Raises InputError if the machine cannot hold all frames at once, which only a stream does without."""
        if self.num_frames is not None:
            self.check_memory({"its pixels": self.batch * self.num_frames * self.height * self.width * PIXEL_BYTES})

    def check_memory(self, parts: dict[str, int]) -> None:
        """Raises InputError where `parts`, estimated in bytes, are more than the bound."""
        bound, whose = machine_memory(), "this machine has"
        if self.memory_gb is not None:
            bound, whose = self.memory_gb * 1e9, "memory_gb allows"
        if sum(parts.values()) > bound:
            frames = "endless" if self.num_frames is None else f"{self.num_frames:,}"
            listed = ", ".join(f"{name} about {amount_of(size)}" for name, size in parts.items())
            raise InputError(
                f"{self.batch:,} of {frames} frames of {self.width}x{self.height} would take more memory than {whose}:"
                f" {listed}: expected at most {amount_of(int(min(bound, 1e30)))}; fewer frames, a smaller size or a"
                " bounded context (context_frames) take less"
            )

    @property
    def passes(self) -> int:
        """Guidance passes of the encoders: enough for every moment."""
        return max(guidance.passes for guidance in self.guidance.values)

    def first_pixel(self, latent: int) -> int:
        """Number of the first pixel frame of a latent frame."""
        return self.offset + max(0, self.temporal_stride * (latent - 1) + 1)

    def latent_at(self, seconds: float) -> int:
        """First latent frame that begins at this time or later."""
        pixel = math.ceil(seconds * self.fps - 1e-6) - self.offset
        return 0 if pixel <= 0 else math.ceil((pixel - 1) / self.temporal_stride) + 1


def make_plan(request: "GenerateRequest", defaults: Defaults, model: Capabilities) -> Plan:
    """Fill in every None of a request, and check what depends on the checkpoint."""
    values = values_of(request, Options)
    preset = PRESETS[request.preset or "exact"]
    for name, value in asdict(defaults).items():
        if values[name] is None:
            values[name] = max(1, round(value * getattr(preset, SHARES[name]))) if name in SHARES else value
    for name, value in values_of(preset, SpeedOptions).items():
        values[name] = value if values[name] is None else values[name]
    values |= {"preset": request.preset or "exact", "compile": request.compile is not False, "seconds": None}
    values["height"], values["width"] = height, width = _size(request, model)
    fps = values["fps"]
    given = _given_frames(request, model, fps)
    values["num_frames"] = num_frames = _num_frames(request, defaults, given, fps)
    _check_frames(request, num_frames, given, model)
    _check_features(request, model)
    if request.motion_flow is not None and not model.video:
        score = f"{request.motion_flow:g}" if isinstance(request.motion_flow, int | float) else request.motion_flow
        raise InputError(f"motion_flow is {score}: this model makes images and takes no motion score")
    if values["context_frames"] is None and num_frames is None:
        values["context_frames"] = ENDLESS_CONTEXT
    plan = Plan(
        **{name: _plain(value) for name, value in values.items()},
        batch=request.num_prompts * request.num_images_per_prompt,
        grid=(height // model.image_stride, width // model.image_stride),
        temporal_stride=model.temporal_stride,
        given_frames=given,
        edits=request.edits,
    )
    timelines = {"prompt": request.timeline, "guidance_scale": plan.guidance, "motion_flow": plan.motion}
    for name, timeline in timelines.items():
        if timeline is not None and num_frames is not None:
            timeline.check_end(name, num_frames / fps)
    if request.video_pixels is not None and not request.edits:
        used = (given - 1) // model.temporal_stride + 1  # latent frames: the last 4k + 1 pixel frames
        if plan.context.frames is not None:
            used = min(used, plan.context.frames - 1)
        plan = replace(plan, offset=given - model.pixel_count(used))
    _check_fit(plan, model)
    return plan


def _check_fit(plan: Plan, model: Capabilities) -> None:
    """Raise InputError where the options of a plan are not for this model, or more than the machine holds."""
    check_number("diffusion_steps", plan.diffusion_steps, 1, integer=True, high=model.max_diffusion_steps)
    if plan.flow_shift is not None and not model.shiftable:
        raise InputError(f"flow_shift is {plan.flow_shift:g}: this model's schedule is not a flow and has no shift")
    if plan.solver not in (None, "own") and not model.second_order:
        raise InputError(f"solver is {plan.solver}: expected a checkpoint with a DDPM or flow schedule")
    context = plan.context
    if context.frames is not None and context.frames < context.sink + 2:
        least = model.pixel_count(context.sink + 1) + 1
        raise InputError(
            f"context_frames is {plan.context_frames} with {plan.sink_frames} first frames kept (sink_frames): expected"
            f" at least {least}"
        )
    if context.frames is None and plan.num_frames is None:
        raise InputError("context_frames is None: expected a number, the clip has no end")
    plan.check_memory(sampling_memory(plan, model))


def latent_count(num_frames: int, stride: int) -> int:
    """Whole latent frames that cover so many pixel frames."""
    return math.ceil((num_frames - 1) / stride) + 1


def _plain(value: Any) -> Any:
    """A number of NumPy as Python's, and a timeline as (seconds, value) pairs: types that JSON has."""
    if isinstance(value, Timeline):
        return tuple(zip(value.times, map(_plain, value.values), strict=True))
    if isinstance(value, np.generic):
        return value.item()
    return value if not isinstance(value, Sequence) or isinstance(value, str) else tuple(map(_plain, value))


def sampling_memory(plan: Plan, model: Capabilities) -> dict[str, int]:
    """Bytes that sampling holds at once, estimated by what."""
    rows, text = plan.batch * plan.passes, model.text_len + 2
    tokens = 4 * plan.height * plan.width // model.size_multiple**2  # of a frame; the temporal encoder has a quarter
    slots = plan.context.slots(plan.latent_frames) * tokens // 4
    read = text + (slots if plan.context.frames is not None else tokens // 4)  # at once by the temporal encoder
    token = rows * model.width * model.value_bytes
    return {
        "the cache of earlier frames": 2 * model.layers * (text + slots) * token,
        "the encoders' activations": ACTIVATIONS * (tokens + tokens // 4 + read) * token,
    }


def amount_of(size: int) -> str:
    """Bytes in words."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9)):
        if size >= factor:
            return f"{size // factor:,} {unit}" if size < 10**24 else "more than there is"
    return f"{max(1, size // 10**6)} MB"


def machine_memory() -> float:
    """Bytes of memory that this machine has, or infinity where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def _size(request: "GenerateRequest", model: Capabilities) -> tuple[int, int]:
    own = model.image_size
    height = own[0] if request.height is None else request.height
    width = own[1] if request.width is None else request.width
    _check_size(height, width, model)
    latents = request.video_latents
    if latents is not None:
        expected = (model.latent_channels, height // model.image_stride, width // model.image_stride)
        if (latents.shape[1], *latents.shape[3:]) != expected:
            raise InputError(
                f"video: got latents {tuple(latents.shape)}: expected (B, {expected[0]}, F, {expected[1]}, "
                f"{expected[2]}) for {width}x{height}"
            )
    return height, width


def _check_size(height: int, width: int, model: Capabilities) -> None:
    own, multiple = model.image_size, model.size_multiple
    if height % multiple or width % multiple:
        raise InputError(f"size is {width}x{height}: expected width and height in multiples of {multiple}")
    if (height, width) != own and not model.any_size:
        raise InputError(
            f"size is {width}x{height}: expected {own[1]}x{own[0]}, the only one this model's positions allow"
        )


def _given_frames(request: "GenerateRequest", model: Capabilities, fps: float) -> int:
    """Leading pixel frames that are given."""
    if request.image is not None:
        return 1
    if request.video_latents is not None:
        return model.pixel_count(request.video_latents.shape[2])
    if request.video_pixels is None:
        return 0
    clip: InputClip = request.video_pixels[0]
    return clip.count(fps)


def _num_frames(request: "GenerateRequest", defaults: Defaults, given: int, fps: float) -> int | None:
    """Pixel frames in all; None: without end."""
    asked = request.num_frames
    if request.seconds is not None:
        asked = request.seconds if math.isinf(request.seconds) else max(1, round(request.seconds * fps))
        if not math.isinf(asked) and asked > LIMITS.frames:
            raise InputError(
                f"seconds is {request.seconds:g}, which is {asked:,} frames at {fps:g} fps: expected at most"
                f" {LIMITS.frames:,} frames"
            )
    if asked is None:
        return given if request.edits else defaults.num_frames
    return None if math.isinf(asked) else int(asked)


def _check_frames(request: "GenerateRequest", num_frames: int | None, given: int, model: Capabilities) -> None:
    length = "inf" if num_frames is None else num_frames
    if length != 1 and not model.video:
        raise InputError(f"num_frames is {length}: expected 1, since this model makes images")
    if length != 1 and model.temporal_stride == 1:
        raise InputError(f"num_frames is {length}: expected 1, since this model's autoencoder is of images")
    if num_frames is None or given == 0:
        return
    if request.edits:
        if num_frames < given:
            raise InputError(f"num_frames is {num_frames} with {given} frames to edit: expected at least {given}")
    elif request.image is not None and num_frames == 1:
        raise InputError(
            "num_frames is 1 with an image given: expected 2 or more, the image is the first frame (or mask_image or "
            "strength, to edit it)"
        )
    elif num_frames <= given:
        raise InputError(f"num_frames is {num_frames} with {given} frames given: expected more than {given}, in all")


def _check_features(request: "GenerateRequest", model: Capabilities) -> None:
    for name, rows in (
        ("prompt_embeds", request.prompt_embeds),
        ("negative_prompt_embeds", request.negative_prompt_embeds),
    ):
        for features in rows or ():
            assert isinstance(features, Tensor)
            if features.shape[1] != model.text_dim or features.shape[0] > model.text_len:
                raise InputError(
                    f"{name}: got {tuple(features.shape)}: expected (tokens, {model.text_dim}) with at most "
                    f"{model.text_len} tokens"
                )


# On paper -------------------------------------------------------------------------------------------------------------


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """A plan in types that JSON has, as `records.read_record` reads it. The bound on memory is the next run's own."""
    no_parts: dict[str, Any] = dict.fromkeys(CHECKS)
    return asdict(replace(plan, **no_parts)) | part_names(plan) | {"memory_gb": None}


def size_problem(plan: Plan, model: Capabilities) -> str | None:
    """A line about a size that the model was not trained at."""
    if (plan.height, plan.width) == model.image_size:
        return None
    own = f"{model.image_size[1]}x{model.image_size[0]}"
    return f"size is {plan.width}x{plan.height}: the model was trained at {own}, others may look worse"


def check_plan(plan: Plan, model: Capabilities) -> None:
    """Raise InputError for a plan that no request to this model would have made."""
    check_number("batch", plan.batch, 1, integer=True, high=LIMITS.pictures)
    _check_size(plan.height, plan.width, model)
    if plan.grid != (plan.height // model.image_stride, plan.width // model.image_stride):
        raise InputError(f"grid is {plan.grid}: expected that of {plan.width}x{plan.height}")
    if plan.temporal_stride != model.temporal_stride:
        raise InputError(f"temporal_stride is {plan.temporal_stride}: expected {model.temporal_stride}")
    if plan.num_frames != 1 and (not model.video or model.temporal_stride == 1):
        raise InputError(f"num_frames is {plan.num_frames}: expected 1, since this model makes images")
    check_number("given_frames", plan.given_frames, 0, integer=True, high=LIMITS.frames)
    check_number("offset", plan.offset, 0, integer=True, high=max(plan.given_frames - 1, 0))
    if plan.num_frames is not None and plan.num_frames <= plan.offset:
        raise InputError(f"offset is {plan.offset}: expected less than the {plan.num_frames} frames")
    for name in ("guidance_scale", "motion_flow", "sink_frames"):
        if getattr(plan, name) is None:
            raise InputError(f"{name} is None: expected a number")
    _check_fit(plan, model)
