"""What a caller asks for: `GenerateRequest`, the one object that every surface (python, command line, server) fills in.

A request is checked in two steps: on creation, for what is wrong with any model, and in `resolve`, against one
checkpoint (`plan.py`), which also replaces every None. Files that it names are read on creation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from nova_video.common.checks import LIMITS, check_number, check_whether, shown
from nova_video.common.errors import InputError, MediaError
from nova_video.io.decode import upright_srgb
from nova_video.io.inputs import Clip, masks_of, read_clips, read_masks
from nova_video.pipeline.plan import PIXEL_BYTES, Capabilities, Plan, amount_of, make_plan
from nova_video.pipeline.settings import Defaults, check_setting
from nova_video.pipeline.timeline import Timeline, is_timeline
from nova_video.sampling.presets import Shortcuts, shortcuts_of

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Prompt = str | Sequence[str] | Sequence[tuple[float, str]] | Sequence[Sequence[tuple[float, str]]]
Number = float | Sequence[tuple[float, float]]  # or one that changes in time: (seconds, value) pairs
Picture = Image.Image | np.ndarray
Video = str | Path | np.ndarray | Tensor | Clip | Sequence[Any]
Mask = str | Path | np.ndarray | Image.Image | Tensor | Sequence[Any]


@dataclass(frozen=True, eq=False)
class GenerateRequest:
    """One call. None means the checkpoint's own default."""

    prompt: Prompt | None = None
    """A sentence or several, or sentences on a timeline: (seconds, sentence) pairs, or several such timelines with the
    same times, one a clip. A sentence holds from the first latent frame at or after its time on. Or give
    `prompt_embeds`."""
    negative_prompt: str | Sequence[str] | None = None
    """What guidance pushes away from: one for all prompts, or one each. None: the empty prompt."""
    image: Picture | None = None
    """First frame of a video: a picture, or uint8 (height, width, 3), of any size. With `mask_image` or `strength`, a
    picture to edit."""
    video: Video | None = None
    """Leading frames of a video, any number, or with `mask_image` or `strength` a clip to edit: one, or one a prompt.
    A path, PIL images, an array (F, H, W, 3) of uint8 or of floats in [0, 1], a tensor (F, 3, H, W), or latents
    (B, C, F, h, w). The model reads the last 4k + 1 frames; all come back as they were given."""
    mask_image: Mask | None = None
    """What of the given frames is made anew is white; black stays, bit for bit. One mask, or one a frame."""
    strength: float | None = None
    """0 to 1: share of the tokens (under the mask, if any) that are made anew. None: all."""
    height: int | None = None
    width: int | None = None
    num_frames: float | None = None
    """Pixel frames, given ones included. To be edited: None is all that is given. math.inf, for streams: no end."""
    seconds: float | None = None
    """Length in place of `num_frames`."""
    fps: float | None = None
    num_inference_steps: int | None = None
    """Sets in which the tokens of a frame are revealed. Not denoising steps: those are `num_diffusion_steps`."""
    num_diffusion_steps: int | None = None
    """Denoising steps of each set."""
    guidance_scale: Number | None = None
    """On above 1. A number or a timeline."""
    guidance_trunc: float = 0.0
    """Below this timestep (0 to 1000) only the conditional pass runs."""
    guidance_renorm: float = 1.0
    """Below 1: the guided prediction is scaled down towards the conditional one's norm, by this factor at most."""
    image_guidance_scale: float = 0.0
    """Above 0: a third pass, without history, guides towards it."""
    motion_flow: Number | None = None
    """Motion score, for models of video. A number or a timeline."""
    flow_shift: float | None = None
    """Shift of a flow-matching schedule."""
    context_frames: int | None = None
    """Longest clip that the model is shown: beyond it, the first frames and a window of recent ones. None: the
    checkpoint's own, without one all frames; a clip without end has 33."""
    sink_frames: int | None = None
    """First frames that such a bounded context keeps."""
    history_noise: float = 0.0
    """Against drift: standard deviation of noise on the latent frames that later ones are made from."""
    reanchor_frames: int | None = None
    """Against drift: every so many frames the context is cut back to the first frames and the newest one; 0: never.
    None: the checkpoint's own, without one never."""
    hold_statistics: float = 0.0
    """Against drift, 0 to 1: how far the channel statistics of new latent frames are drawn to those of the first."""
    compile: bool | None = None
    """False: the plain loop, step by step. None and True: the same numbers to rounding, faster: what does not depend on
    the noise is computed for all steps at once, and on CUDA blocks are compiled and captured in graphs."""
    preset: str | None = None
    """What may be lost for speed: exact (None), balanced or fast, as `sampling/presets.py` has them. The next five
    each replace a part of it."""
    solver: str | None = None
    """own: the checkpoint's scheduler. dpm++: DPM-Solver++ of second order, for fewer steps."""
    last_steps: float | None = None
    """Up to 1: share of the denoising steps that a frame's last set takes; earlier ones fall to it evenly."""
    guided_sets: float | None = None
    """0 to 1: share of a frame's sets that are guided, the first ones."""
    fp8: bool | None = None
    """The encoders multiply in 8 bit floats, on GPUs that have them (needs torchao)."""
    guidance_every: int | None = None
    """Every so many sets all guidance passes are encoded, between them the conditional one alone."""
    num_images_per_prompt: int = 1
    prompt_embeds: Sequence[Tensor] | None = None
    """Features of each prompt, (tokens, width)."""
    negative_prompt_embeds: Sequence[Tensor] | None = None
    output_type: str = "pil"
    """pil, np, pt, or latent (B, C, F, h, w)."""
    memory_gb: float | None = None
    """Most memory that the request may take, by an estimate (10^9 bytes); beyond it is refused before any work. None:
    as much as this machine has. math.inf: no bound."""
    seed: int | None = None
    """Used where no generator is given. None: drawn anew, and told in the result."""

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        if (self.prompt is None) == (self.prompt_embeds is None):
            got = "neither" if self.prompt is None else "both"
            raise InputError(f"got {got} of prompt and prompt_embeds: expected one of them")
        if self.prompts is not None and len({timeline.times for timeline in self.prompts}) > 1:
            raise InputError(
                "prompt: got timelines whose times differ: expected the same times for all clips of a call"
            )
        _check_negative(self.negative_prompt)
        if self.negative_prompt is not None and self.negative_prompt_embeds is not None:
            raise InputError("got both of negative_prompt and negative_prompt_embeds: expected one of them at most")
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            _check_embeds(name, getattr(self, name))
        negative = self.negative_prompts if self.negative_prompt_embeds is None else self.negative_prompt_embeds
        if negative is not None and len(negative) not in (1, self.num_prompts):
            raise InputError(f"got {len(negative)} negative prompts: expected 1 or {self.num_prompts}, one a prompt")
        self._check_length()
        self._check_amount("num_frames", LIMITS.frames)
        for field in fields(Defaults):
            value = getattr(self, field.name)
            if field.name in ("guidance_scale", "motion_flow") and value is not None:
                for moment in Timeline.of(field.name, value).values:
                    check_setting(field.name, moment)
            elif value is not None and not (field.name == "num_frames" and _is_infinite(value)):
                check_setting(field.name, value)
        for name, high in (("height", LIMITS.side), ("width", LIMITS.side), ("num_images_per_prompt", LIMITS.pictures)):
            if (value := getattr(self, name)) is not None or name == "num_images_per_prompt":
                self._check_amount(name, high)
                check_number(name, value, 1, integer=True)
        if self.num_prompts * self.num_images_per_prompt > LIMITS.pictures:
            raise InputError(
                f"num_images_per_prompt is {self.num_images_per_prompt} with {self.num_prompts} prompts: expected at"
                f" most {LIMITS.pictures:,} pictures or clips in one call"
            )
        check_number("guidance_trunc", self.guidance_trunc, 0)
        for name in ("image_guidance_scale", "history_noise"):
            check_number(name, getattr(self, name), 0, high=LIMITS.scale)
        for name in ("guidance_renorm", "hold_statistics", "strength"):
            if (value := getattr(self, name)) is not None:
                check_number(name, value, 0, high=1)
        if self.flow_shift is not None:
            check_number("flow_shift", self.flow_shift, 0, above=True, high=LIMITS.scale)
        if self.memory_gb is not None and not _is_infinite(self.memory_gb):
            check_number("memory_gb", self.memory_gb, 0, above=True)
        for name in ("compile", "fp8"):
            check_whether(name, getattr(self, name))
        if self.seed is not None:
            check_number("seed", self.seed, 0, integer=True, high=2**63 - 1)
        if self.output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type is {shown(self.output_type)}: expected one of {', '.join(OUTPUT_TYPES)}")
        _ = self.shortcuts  # checks itself
        self._check_given()

    def _check_amount(self, name: str, high: int) -> None:
        """Refuses more than `high`, and says what the pixels would have taken."""
        value = getattr(self, name)
        if not isinstance(value, int) or value <= high:
            return
        height, width, frames, pictures = (
            found if isinstance(found, int) and found > 0 else default
            for found, default in (
                (self.height, 256),
                (self.width, 256),
                (self.num_frames, 1),
                (self.num_images_per_prompt, 1),
            )
        )
        taken = amount_of(height * width * frames * pictures * PIXEL_BYTES)
        raise InputError(
            f"{name} is {shown(value)}: expected a whole number of at least 1 and at most {high:,}; of"
            f" {shown(width, 20)}x{shown(height, 20)} pixels, that would have taken {taken} of memory"
        )

    def _check_length(self) -> None:
        if self.num_frames is not None and self.seconds is not None:
            raise InputError(f"got num_frames {self.num_frames} and seconds {self.seconds}: expected one of them")
        if self.seconds is not None and not _is_infinite(self.seconds):
            check_number("seconds", self.seconds, 0, above=True, high=LIMITS.seconds)

    def _check_given(self) -> None:
        """What is given to begin with, read from files and brought to one form."""
        if self.image is not None and self.video is not None:
            raise InputError("got both of image and video: expected one of them")
        if self.image is not None:
            _check_image(self.image)
            object.__setattr__(self, "image", _upright(self.image))  # the dataclass is frozen for everyone else
        if self.video is not None:
            object.__setattr__(self, "video", read_clips(self.video))
        if not self.edits:
            return
        name = "strength" if self.mask_image is None else "mask_image"
        if self.image is None and self.video is None:
            raise InputError(f"got {name} without image or video: expected the picture or clip to edit")
        if self.video_latents is not None:
            raise InputError(f"got {name} with latents: expected video in pixels, to edit them")
        if self.mask_image is not None:
            masks = read_masks(self.mask_image)
            for clip in self.given_clips:
                masks_of(masks, clip)
            object.__setattr__(self, "mask_image", masks)

    @property
    def shortcuts(self) -> Shortcuts:
        """The preset, with what is named besides."""
        return shortcuts_of(
            self.preset,
            solver=self.solver,
            last_steps=self.last_steps,
            guided_sets=self.guided_sets,
            guidance_every=self.guidance_every,
            fp8=self.fp8,
        )

    @property
    def edits(self) -> bool:
        """Given frames are changed, not only gone on from."""
        return self.mask_image is not None or self.strength is not None

    @property
    def video_latents(self) -> Tensor | None:
        """(1 or B, C, F, h, w), where latents are given."""
        return self.video if isinstance(self.video, Tensor) else None

    @property
    def video_pixels(self) -> tuple[Clip, ...] | None:
        """One clip or one a prompt, where clips are given."""
        return self.video if isinstance(self.video, tuple) else None

    @property
    def given_clips(self) -> tuple[Clip, ...]:
        """Given pixels, a picture as a clip of one frame."""
        if self.image is None:
            return self.video_pixels or ()
        return (Clip(np.asarray(as_picture(self.image))[None]),)

    @property
    def prompts(self) -> list[Timeline[str]] | None:
        """One timeline a prompt; most have one entry."""
        if self.prompt is None:
            return None
        several = [self.prompt] if isinstance(self.prompt, str) or is_timeline(self.prompt) else self.prompt
        return [Timeline.of("prompt", entry) for entry in several]

    @property
    def timeline(self) -> Timeline[str] | None:
        """The first prompt's: all change at the same times."""
        return None if self.prompts is None else self.prompts[0]

    @property
    def is_single(self) -> bool:
        """One prompt, not a list of one, and one picture of it."""
        alone = isinstance(self.prompt, str) or is_timeline(self.prompt)
        return alone and self.num_images_per_prompt == 1

    @property
    def negative_prompts(self) -> list[str] | None:
        negative = self.negative_prompt
        return [negative] if isinstance(negative, str) else None if negative is None else list(negative)

    @property
    def num_prompts(self) -> int:
        given = self.prompts if self.prompt_embeds is None else self.prompt_embeds
        assert given is not None  # one of them is there: checked on creation
        return len(given)

    def guidance(self, defaults: Defaults) -> Timeline[float]:
        return Timeline.of(
            "guidance_scale", defaults.guidance_scale if self.guidance_scale is None else self.guidance_scale
        )

    def motion(self, defaults: Defaults) -> Timeline[float]:
        return Timeline.of("motion_flow", defaults.motion_flow if self.motion_flow is None else self.motion_flow)

    def resolve(self, defaults: Defaults, model: Capabilities) -> Plan:
        """Fill in every None, and check what depends on the checkpoint."""
        return make_plan(self, defaults, model)


def _check_prompt(prompt: object) -> None:
    if prompt is None:
        return
    several = [prompt] if isinstance(prompt, str) or is_timeline(prompt) else prompt
    if not isinstance(several, Sequence) or not several:
        raise InputError(f"prompt is {prompt!r}: expected a sentence, a list of them, or (seconds, sentence) pairs")
    for text in [text for entry in several for text in Timeline.of("prompt", entry).values]:
        if not isinstance(text, str):
            raise InputError(f"prompt is {text!r}: expected a sentence; an empty one is the null prompt")
        _check_letters("prompt", text)


def _check_negative(prompt: object) -> None:
    prompts = [] if prompt is None else [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, Sequence) or not all(isinstance(text, str) for text in prompts):
        raise InputError(f"negative_prompt is {prompt!r}: expected a sentence or a list of them")
    for text in prompts:
        _check_letters("negative_prompt", text)


def _check_letters(name: str, text: str) -> None:
    """Raises InputError for lone surrogates, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name} is {text!r}: expected text that UTF-8 can hold") from None


def _check_embeds(name: str, embeds: object) -> None:
    if embeds is None:
        return
    if not isinstance(embeds, Sequence) or not embeds:
        shape = tuple(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
        raise InputError(f"{name}: got {shape}: expected a list of (tokens, width) tensors, one a prompt")
    for features in embeds:
        if not isinstance(features, Tensor) or features.dim() != 2 or not features.is_floating_point():
            got = (
                f"{features.dtype} {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
            )
            raise InputError(f"{name}: got {got} in the list: expected floating point tensors (tokens, width)")
        if not features.is_meta and not bool(features.isfinite().all()):  # benchmarks check shapes alone
            raise InputError(f"{name}: got values that are not finite: expected finite features")


def _is_infinite(value: object) -> bool:
    return isinstance(value, float) and value == math.inf


def as_picture(image: Picture) -> Image.Image:
    return Image.fromarray(image) if isinstance(image, np.ndarray) else image


def _upright(image: Picture) -> Image.Image:
    """A picture as it is shown: turned as its EXIF says, in sRGB, on white."""
    try:
        return upright_srgb(as_picture(image))
    except MediaError as error:
        raise InputError(f"image {error}") from None


def _check_image(image: object) -> None:
    if isinstance(image, Image.Image):
        return
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size > 0:
            return
        got = f"{image.dtype} {image.shape}"
    else:
        got = type(image).__name__
    raise InputError(f"image: got {got}: expected a PIL image or a uint8 array (height, width, 3)")
