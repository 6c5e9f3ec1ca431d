"""What a caller asks for: `GenerateRequest`, the one object that every surface (python, command line, server) fills in.

Defaults and bounds are written here and nowhere else. A request is checked in two steps: on creation, for what is wrong
with any model, and in `resolve`, against one checkpoint, which also replaces every None. The result is a `Plan`.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from nova_video.errors import InputError
from nova_video.sampling.guidance import Guidance

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
SETTINGS_FILE = "nova.json"


def check_number(
    name: str, value: object, low: float, *, integer: bool = False, above: bool = False, high: float | None = None
) -> None:
    """`value` is a finite number of at least `low` (more than it with `above`) and at most `high`, or an InputError."""
    kinds = (int, np.integer) if integer else (int, float, np.integer, np.floating)
    if isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value):
        number = float(value)
        if number >= low and not (above and number == low) and (high is None or number <= high):
            return
    bound = f"{'more than' if above else 'at least'} {low:g}" + ("" if high is None else f" and at most {high:g}")
    raise InputError(f"{name} is {value!r}: expected {'a whole number' if integer else 'a number'} of {bound}")


@dataclass(frozen=True)
class Defaults:
    """What None means for one checkpoint: the released models' values, unless its folder says otherwise."""

    num_frames: int = 1
    """Pixel frames; 1 is an image."""
    fps: float = 12
    """Frames per second: told to the model and written into the file."""
    num_inference_steps: int = 64
    """Sets in which the tokens of a frame are revealed."""
    num_diffusion_steps: int = 25
    """Denoising steps of each set."""
    guidance_scale: float = 5.0
    """Classifier-free guidance; off at 1 and below."""
    motion_flow: float = 5.0
    """Motion score: mean optical flow in pixels a frame."""

    def __post_init__(self) -> None:
        for field in fields(self):
            check_setting(field.name, getattr(self, field.name))


def check_setting(name: str, value: object) -> None:
    """The bounds of the settings that have a default."""
    if name in ("num_frames", "num_inference_steps", "num_diffusion_steps"):
        check_number(name, value, 1, integer=True)
    else:
        check_number(name, value, 0, above=name == "fps")


@dataclass(frozen=True)
class CheckpointSettings:
    """The optional `nova.json` beside a checkpoint's parts."""

    text_encoder: str | None = None
    """Looked up by name when a call needs it and the folder has no text_encoder/ of its own."""
    defaults: Defaults = Defaults()

    @classmethod
    def load(cls, folder: Path) -> "CheckpointSettings":
        """Read from a checkpoint folder; the released values where there is no such file."""
        path = folder / SETTINGS_FILE
        if not path.is_file():
            return cls()
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: not JSON ({error})") from None
        _check_keys(path, "", values, cls)
        name = values.get("text_encoder")
        if name is not None and not (isinstance(name, str) and name):
            raise InputError(f"{path}: text_encoder is {name!r}: expected the name of a text encoder")
        defaults = values.get("defaults", {})
        _check_keys(path, "defaults.", defaults, Defaults)
        try:
            return cls(name, Defaults(**defaults))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def save(self, folder: Path) -> None:
        defaults = {field.name: getattr(self.defaults, field.name) for field in fields(Defaults)}
        values = {"defaults": defaults} if self.text_encoder is None else vars(self) | {"defaults": defaults}
        (folder / SETTINGS_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _check_keys(path: Path, prefix: str, values: object, record: type[Any]) -> None:
    known = [field.name for field in fields(record)]
    if not isinstance(values, dict):
        raise InputError(f"{path}: {prefix.rstrip('.') or 'the file'} is {values!r}: expected an object")
    for key in values:
        if key not in known:
            raise InputError(f"{path}: unknown key {prefix}{key}: expected one of {', '.join(known)}")


@dataclass(frozen=True)
class Capabilities:
    """What one checkpoint can do: all that `resolve` needs to know of it."""

    image_size: tuple[int, int]
    """Height and width it was made for, in pixels."""
    image_stride: int
    """Pixels of a latent's side."""
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


@dataclass(frozen=True)
class Plan:
    """A request resolved against a checkpoint: no None is left but for what is truly absent."""

    batch: int
    """Pictures or clips: prompts times num_images_per_prompt."""
    height: int
    width: int
    num_frames: int
    latent_frames: int
    """Whole latent frames that cover num_frames; a given image is the first of them."""
    grid: tuple[int, int]
    """Latent height and width."""
    fps: float
    num_inference_steps: int
    num_diffusion_steps: int
    guidance: Guidance
    motion_flow: float
    flow_shift: float | None
    """None: the schedule's own."""


@dataclass(frozen=True, eq=False)
class GenerateRequest:
    """One call. None means the checkpoint's own default."""

    prompt: str | Sequence[str] | None = None
    """A sentence or several; or give `prompt_embeds`."""
    negative_prompt: str | Sequence[str] | None = None
    """What guidance pushes away from: one for all prompts, or one each. None: the empty prompt."""
    image: Image.Image | np.ndarray | None = None
    """First frame of a video: a picture, or uint8 (height, width, 3), of any size."""
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    """Pixel frames, a given image included."""
    fps: float | None = None
    num_inference_steps: int | None = None
    """Sets in which the tokens of a frame are revealed."""
    num_diffusion_steps: int | None = None
    """Denoising steps of each set."""
    guidance_scale: float | None = None
    """On above 1."""
    guidance_trunc: float = 0.0
    """Below this timestep (0 to 1000) only the conditional pass runs."""
    guidance_renorm: float = 1.0
    """Below 1: the guided prediction is scaled down towards the conditional one's norm, by this factor at most."""
    image_guidance_scale: float = 0.0
    """Above 0: a third pass, without history, guides towards it."""
    motion_flow: float | None = None
    """Motion score, for models of video."""
    flow_shift: float | None = None
    """Shift of a flow-matching schedule."""
    num_images_per_prompt: int = 1
    prompt_embeds: Sequence[Tensor] | None = None
    """Features of each prompt, (tokens, width)."""
    negative_prompt_embeds: Sequence[Tensor] | None = None
    output_type: str = "pil"
    """pil, np, pt, or latent (B, C, F, h, w)."""
    seed: int | None = None
    """Used where no generator is given. None: drawn anew, and told in the result."""

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        if (self.prompt is None) == (self.prompt_embeds is None):
            got = "neither" if self.prompt is None else "both"
            raise InputError(f"got {got} of prompt and prompt_embeds: expected one of them")
        _check_negative(self.negative_prompt)
        if self.negative_prompt is not None and self.negative_prompt_embeds is not None:
            raise InputError("got both of negative_prompt and negative_prompt_embeds: expected one of them at most")
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            _check_embeds(name, getattr(self, name))
        negative = self.negative_prompts if self.negative_prompt_embeds is None else self.negative_prompt_embeds
        if negative is not None and len(negative) not in (1, self.num_prompts):
            raise InputError(f"got {len(negative)} negative prompts: expected 1 or {self.num_prompts}, one a prompt")
        for field in fields(Defaults):
            if (value := getattr(self, field.name)) is not None:
                check_setting(field.name, value)
        for name in ("height", "width", "num_images_per_prompt"):
            if (value := getattr(self, name)) is not None:
                check_number(name, value, 1, integer=True)
        for name in ("guidance_trunc", "image_guidance_scale"):
            check_number(name, getattr(self, name), 0)
        check_number("guidance_renorm", self.guidance_renorm, 0, high=1)
        if self.flow_shift is not None:
            check_number("flow_shift", self.flow_shift, 0, above=True)
        if self.seed is not None:
            check_number("seed", self.seed, 0, integer=True, high=2**63 - 1)
        if self.output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type is {self.output_type!r}: expected one of {', '.join(OUTPUT_TYPES)}")
        if self.image is not None:
            _check_image(self.image)

    @property
    def prompts(self) -> list[str] | None:
        return [self.prompt] if isinstance(self.prompt, str) else None if self.prompt is None else list(self.prompt)

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
        height, width = self._size(model)
        num_frames = defaults.num_frames if self.num_frames is None else self.num_frames
        self._check_frames(num_frames, model)
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            for features in getattr(self, name) or ():
                if features.shape[1] != model.text_dim or features.shape[0] > model.text_len:
                    raise InputError(
                        f"{name}: got {tuple(features.shape)}: expected (tokens, {model.text_dim}) with at most "
                        f"{model.text_len} tokens"
                    )
        if self.motion_flow is not None and not model.video:
            raise InputError(f"motion_flow is {self.motion_flow:g}: this model makes images and takes no motion score")
        if self.flow_shift is not None and not model.shiftable:
            raise InputError(f"flow_shift is {self.flow_shift:g}: this model's schedule is not a flow and has no shift")
        steps = defaults.num_diffusion_steps if self.num_diffusion_steps is None else self.num_diffusion_steps
        check_number("num_diffusion_steps", steps, 1, integer=True, high=model.max_diffusion_steps)
        sets = defaults.num_inference_steps if self.num_inference_steps is None else self.num_inference_steps
        scale = defaults.guidance_scale if self.guidance_scale is None else self.guidance_scale
        return Plan(
            batch=self.num_prompts * self.num_images_per_prompt,
            height=height,
            width=width,
            num_frames=num_frames,
            latent_frames=math.ceil((num_frames - 1) / model.temporal_stride) + 1,
            grid=(height // model.image_stride, width // model.image_stride),
            fps=defaults.fps if self.fps is None else self.fps,
            num_inference_steps=sets,
            num_diffusion_steps=steps,
            guidance=Guidance(scale, self.guidance_trunc, self.guidance_renorm, self.image_guidance_scale),
            motion_flow=defaults.motion_flow if self.motion_flow is None else self.motion_flow,
            flow_shift=self.flow_shift,
        )

    def _size(self, model: Capabilities) -> tuple[int, int]:
        own = model.image_size
        height = own[0] if self.height is None else self.height
        width = own[1] if self.width is None else self.width
        multiple = 4 * model.image_stride
        if height % multiple or width % multiple:
            raise InputError(f"size is {height}x{width}: expected height and width in multiples of {multiple}")
        if (height, width) != own and not model.any_size:
            raise InputError(
                f"size is {height}x{width}: expected {own[0]}x{own[1]}, the only one this model's positions allow"
            )
        return height, width

    def _check_frames(self, num_frames: int, model: Capabilities) -> None:
        if num_frames > 1 and not model.video:
            raise InputError(f"num_frames is {num_frames}: expected 1, since this model makes images")
        if num_frames > 1 and model.temporal_stride == 1:
            raise InputError(f"num_frames is {num_frames}: expected 1, since this model's autoencoder is of images")
        if self.image is not None and num_frames == 1:
            raise InputError("num_frames is 1 with an image given: expected 2 or more, the image is the first frame")


def _check_prompt(prompt: object) -> None:
    if prompt is None:
        return
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, Sequence) or not prompts:
        raise InputError(f"prompt is {prompt!r}: expected a sentence or a list of them")
    for text in prompts:
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"prompt is {text!r}: expected a sentence that is not empty")


def _check_negative(prompt: object) -> None:
    prompts = [] if prompt is None else [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, Sequence) or not all(isinstance(text, str) for text in prompts):
        raise InputError(f"negative_prompt is {prompt!r}: expected a sentence or a list of them")


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
