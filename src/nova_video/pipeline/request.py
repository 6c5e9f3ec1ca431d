"""`GenerateRequest`, the request that every surface (Python, command line, server) fills in.

A request is checked in two steps: on creation, for what is wrong with any model, and in `resolve`, against one
checkpoint (`plan.py`), which also replaces every None. Files that it names are read on creation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image
from torch import Tensor

from nova_video.common.checks import LIMITS, quote
from nova_video.common.errors import InputError, MediaError
from nova_video.common.option_fields import facts_of, json_schema, option, option_fields, with_aliases
from nova_video.common.timeline import Timeline, is_timeline
from nova_video.io.decode import upright_srgb
from nova_video.io.inputs import InputClip, masks_of, read_clips, read_masks
from nova_video.pipeline.options import Options
from nova_video.pipeline.own_parts import CHECKS, own_part
from nova_video.pipeline.plan import PIXEL_BYTES, Capabilities, Plan, amount_of, make_plan
from nova_video.pipeline.settings import Defaults

AMOUNTS = ("num_frames", "height", "width", "num_images_per_prompt")
OutputType = Literal["pil", "np", "pt", "latent"]
OUTPUT_TYPES = get_args(OutputType)

Prompt = str | Sequence[str] | Sequence[tuple[float, str]] | Sequence[Sequence[tuple[float, str]]]
Picture = Image.Image | np.ndarray
Video = str | Path | np.ndarray | Tensor | InputClip | Sequence[Any]
Mask = str | Path | np.ndarray | Image.Image | Tensor | Sequence[Any]


@with_aliases
@dataclass(frozen=True, eq=False)
class GenerateRequest(Options):
    """One call: what to make, and every setting of `Options`. None means the checkpoint's own default."""

    prompt: Prompt | None = option(
        None,
        "A sentence or several, or sentences on a timeline: (seconds, sentence) pairs, or several such timelines with"
        " the same times, one a clip. A sentence holds from the first latent frame at or after its time on.",
    )
    negative_prompt: str | Sequence[str] | None = option(
        None, "What guidance pushes away from: one for all prompts, or one each.", unset="the empty prompt"
    )
    image: Picture | None = None
    """First frame of a video: a picture, or uint8 (height, width, 3), of any size. With `mask_image` or `strength`, a
    picture to edit."""
    video: Video | None = None
    """Leading frames of a video, or with `mask_image` or `strength` a clip to edit: one, or one a prompt.
    A path, PIL images, an array (F, H, W, 3) of uint8 or of floats in [0, 1], a tensor (F, 3, H, W), or latents
    (B, C, F, h, w). The model reads the last 4k + 1 frames; all come back as they were given."""
    mask_image: Mask | None = None
    """White parts of the given frames are made anew; black parts stay, bit for bit. One mask, or one a frame."""
    num_images_per_prompt: int = option(
        1, "Pictures or clips of each prompt.", low=1, high=LIMITS.pictures, aliases=("num_videos_per_prompt",)
    )
    prompt_embeds: Sequence[Tensor] | None = None
    """Features of each prompt, (tokens, width), in place of `prompt`."""
    negative_prompt_embeds: Sequence[Tensor] | None = None
    output_type: OutputType = option("pil", "The form of pictures and frames; latent is (B, C, F, h, w).")

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __post_init__(self) -> None:
        check_prompt(self.prompt)
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
        if self.num_frames is not None and self.seconds is not None:
            raise InputError(f"got num_frames {self.num_frames} and seconds {self.seconds}: expected one of them")
        for name in AMOUNTS:
            self._check_amount(name)
        super().__post_init__()
        if self.num_prompts * self.num_images_per_prompt > LIMITS.pictures:
            raise InputError(
                f"num_images_per_prompt is {self.num_images_per_prompt} with {self.num_prompts} prompts: expected at"
                f" most {LIMITS.pictures:,} pictures or clips in one call"
            )
        self._check_given()
        self._check_rule()

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON schema of everything but media and features."""
        return json_schema(cls)

    def _check_amount(self, name: str) -> None:
        """Refuse more than the bound of an option that multiplies pixels, and say what those would have taken."""
        value, high = getattr(self, name), facts_of(option_fields(self)[name]).high
        if not isinstance(value, int) or high is None or value <= high:
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
            f"{name} is {quote(value)}: expected a whole number of at least 1 and at most {high:,.0f}; of"
            f" {quote(width, 20)}x{quote(height, 20)} pixels, that would have taken {taken} of memory"
        )

    def _check_rule(self) -> None:
        """Refuse settings of the paper's guidance beside a rule of the user's own."""
        if self.guidance_rule is None:
            return
        for name in ("guidance_scale", "guidance_trunc", "guidance_renorm", "image_guidance_scale"):
            if getattr(self, name) != option_fields(self)[name].default:
                raise InputError(f"got both of guidance_rule and {name}: expected one of them")

    def _check_given(self) -> None:
        """Reads the given frames and masks from files and brings them to one form; makes own parts of their names."""
        for name in CHECKS:
            object.__setattr__(self, name, own_part(name, getattr(self, name)))
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
    def edits(self) -> bool:
        """Given frames are changed, not only gone on from."""
        return self.mask_image is not None or self.strength is not None

    @property
    def video_latents(self) -> Tensor | None:
        """(1 or B, C, F, h, w), where latents are given."""
        return self.video if isinstance(self.video, Tensor) else None

    @property
    def video_pixels(self) -> tuple[InputClip, ...] | None:
        """One clip or one a prompt, where clips are given."""
        return self.video if isinstance(self.video, tuple) else None

    @property
    def given_clips(self) -> tuple[InputClip, ...]:
        """Given pixels, a picture as a clip of one frame."""
        if self.image is None:
            return self.video_pixels or ()
        return (InputClip(np.asarray(as_picture(self.image))[None]),)

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

    def resolve(self, defaults: Defaults, model: Capabilities) -> Plan:
        """Fill in every None, and check what depends on the checkpoint."""
        return make_plan(self, defaults, model)


def check_prompt(prompt: object) -> None:
    """Raises InputError for what is no sentence, no list of them and no timeline."""
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
