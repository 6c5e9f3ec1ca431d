"""Given clips and masks of a request, in every form that users have.

`read_clips` and `read_masks` bring them to one form each; the rest takes that form to a model's frame rate and size,
and to tensors. A clip in a file stays there until it is known at which rate and size it is needed. Pixels pass bit for
bit wherever neither size nor rate changes. Legend: B clips, F T frames, H W pixels, h w tokens, M masks, C channels.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from nova_video.common.errors import InputError, MediaError
from nova_video.io.decode import MediaFile, upright_srgb
from nova_video.io.fit import cover_box, fit_frames
from nova_video.io.timing import nearest_frames

CLIP_FORMS = (
    "a path, PIL images, a uint8 array (F, H, W, 3), a float array of that shape or a float tensor (F, 3, H, W) in "
    "[0, 1], or latents (B, C, F, h, w)"
)
MASK_FORMS = "a path, a PIL image, or an array (H, W), (H, W, 3) or (F, H, W) of bool, uint8 or floats in [0, 1]"
SAME_RATE = 0.01  # files round their rates: a webp of 12 frames a second tells 11.99


@dataclass(frozen=True, eq=False)
class InputClip:
    """One clip as it was given: its frames, or the file that holds them."""

    content: np.ndarray | MediaFile
    """(F, H, W, 3), uint8 or float32 in [0, 1]; or a file, decoded when it is read."""
    fps: float | None = None
    """Frames a second of the file. None: unknown, taken to be the request's."""

    def __post_init__(self) -> None:
        if isinstance(self.content, MediaFile):
            object.__setattr__(self, "fps", self.content.fps)
            return
        frames = self.content
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.size == 0 or frames.dtype not in (np.uint8, np.float32):
            raise InputError(
                f"a clip's frames are {frames.dtype} {frames.shape}: expected (F, H, W, 3) of uint8 or float32, F >= 1"
            )
        if frames.dtype == np.float32:
            _check_range("a clip's frames", frames)
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise InputError(f"a clip's fps is {self.fps:g}: expected a number above 0")

    def __len__(self) -> int:
        return self.content.count() if isinstance(self.content, MediaFile) else len(self.content)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.content.size if isinstance(self.content, MediaFile) else self.content.shape[1:3]

    @property
    def frames(self) -> np.ndarray:
        """All frames at the clip's own rate and size, (F, H, W, 3); a file is decoded anew each time."""
        return self.read()

    def count(self, fps: float) -> int:
        """How many frames the clip has at this rate."""
        if isinstance(self.content, MediaFile) and not same_rate(self.fps, fps):
            return self.content.count(fps)
        return len(frames_at(len(self), self.fps, fps))

    def read(self, fps: float | None = None, size: tuple[int, int] | None = None) -> np.ndarray:
        """The frames at a rate, the nearest in time, and at a size (H, W), by default the clip's own."""
        if isinstance(self.content, MediaFile):
            return self.content.read(None if fps is None or same_rate(self.fps, fps) else fps, size)
        frames = self.content if fps is None else self.content[frames_at(len(self), self.fps, fps)]
        return frames if size is None else fit_frames(frames, size)


def read_clips(video: object, name: str = "video") -> tuple[InputClip, ...] | Tensor:
    """Reads one clip or a batch in any form: clips of one length, size and rate, or latents.

    A float tensor of five axes is pixels (B, F, 3, H, W) if the third is of 3 and all values are in [0, 1], and latents
    (B, C, F, h, w) otherwise. What is returned may be given again.
    """
    if isinstance(video, Tensor) and video.dim() == 5 and video.is_floating_point():
        if video.numel() == 0 or not bool(video.isfinite().all()):
            raise InputError(f"{name}: got {_describe(video)}, empty or not finite: expected latents (B, C, F, h, w)")
        low, high = video.aminmax()
        if video.shape[2] != 3 or low < 0 or high > 1:
            return video.detach()
    clips = tuple(_read_clip(name, clip) for clip in _several(name, video))
    told = {(len(clip), clip.size, clip.fps) for clip in clips}
    if len(told) > 1:
        each = ", ".join(
            f"{len(clip)} frames of {clip.size[1]}x{clip.size[0]}" + (f" at {clip.fps:g} fps" if clip.fps else "")
            for clip in clips
        )
        raise InputError(f"{name}: got clips of {each}: expected the same length, size and rate")
    return clips


def _several(name: str, video: Any) -> Sequence[Any]:
    """The clips of a batch; a clip by itself is a batch of one."""
    if isinstance(video, np.ndarray | Tensor):
        return list(video) if video.ndim == 5 else [video]
    if isinstance(video, list | tuple):
        if not video:
            raise InputError(f"{name}: got an empty list: expected {CLIP_FORMS}")
        if not all(_is_frame(entry) for entry in video):
            return video
    return [video]


def _is_frame(entry: Any) -> bool:
    return isinstance(entry, Image.Image) or (isinstance(entry, np.ndarray | Tensor) and entry.ndim == 3)


def _read_clip(name: str, clip: Any) -> InputClip:
    if isinstance(clip, InputClip):
        return clip
    if isinstance(clip, str | os.PathLike):
        return InputClip(MediaFile(clip))
    if _is_frame(clip):
        clip = [clip]  # a picture is a clip of one frame
    if isinstance(clip, list | tuple):
        frames = [_frame(name, entry) for entry in clip]
        shapes = {frame.shape for frame in frames}
        if len(shapes) > 1 or len({frame.dtype for frame in frames}) > 1:
            each = ", ".join(sorted(f"{shape[1]}x{shape[0]}" for shape in shapes))
            raise InputError(f"{name}: got frames of {each}: expected frames of one size and kind in a clip")
        if not frames:
            raise InputError(f"{name}: got an empty list: expected {CLIP_FORMS}")
        clip = np.stack(frames)
    elif isinstance(clip, Tensor):
        clip = _channels_last(name, clip)
    if not isinstance(clip, np.ndarray):
        raise InputError(f"{name}: got {_describe(clip)}: expected {CLIP_FORMS}")
    if clip.ndim != 4 or clip.shape[3] != 3 or clip.size == 0 or not _is_colour(clip.dtype):
        raise InputError(f"{name}: got {_describe(clip)}: expected {CLIP_FORMS}")
    if clip.dtype != np.uint8:
        _check_range(name, clip)
        clip = clip.astype(np.float32, copy=False)
    return InputClip(clip)


def _frame(name: str, frame: Any) -> np.ndarray:
    """One frame -> (H, W, 3)."""
    if isinstance(frame, Image.Image):
        return _as_frame(name, frame)
    if not _is_frame(frame):
        raise InputError(f"{name}: got {_describe(frame)} as a frame: expected a PIL image or an array (H, W, 3)")
    array = _channels_last(name, frame.unsqueeze(0))[0] if isinstance(frame, Tensor) else frame
    if array.shape[2] != 3:
        raise InputError(f"{name}: got {_describe(frame)} as a frame: expected a PIL image or an array (H, W, 3)")
    return array


def _as_frame(name: str, image: Image.Image) -> np.ndarray:
    """A picture as it is shown, (H, W, 3)."""
    try:
        return np.asarray(upright_srgb(image))
    except MediaError as error:
        raise InputError(f"{name}: a picture {error}") from None


def _channels_last(name: str, clip: Tensor) -> np.ndarray:
    """(F, 3, H, W) of floats -> (F, H, W, 3) float32."""
    if clip.dim() != 4 or clip.shape[1] != 3 or not clip.is_floating_point():
        raise InputError(f"{name}: got {_describe(clip)}: expected {CLIP_FORMS}")
    return np.ascontiguousarray(clip.detach().permute(0, 2, 3, 1).float().cpu().numpy())


def _is_colour(dtype: Any) -> bool:
    return dtype == np.uint8 or np.issubdtype(dtype, np.floating)


def _check_range(name: str, values: np.ndarray) -> None:
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 1):  # NaN fails as well
        raise InputError(f"{name}: got floats from {low:g} to {high:g}: expected them in [0, 1]")


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray | Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__


def read_masks(mask_image: object) -> np.ndarray:
    """Masks, one or several, in any form -> (M, H, W) bool, True where something is to be filled in.

    White is filled: bytes of at least 128, floats of at least 0.5, True; colours count by their mean. What is returned
    may be given again.
    """
    if isinstance(mask_image, list | tuple):
        if not mask_image:
            raise InputError(f"mask_image: got an empty list: expected {MASK_FORMS}")
        masks = [read_masks(mask) for mask in mask_image]
        sizes = sorted({f"{mask.shape[2]}x{mask.shape[1]}" for mask in masks})
        if len(sizes) > 1:
            raise InputError(f"mask_image: got masks of {', '.join(sizes)}: expected masks of one size")
        return np.concatenate(masks)
    if isinstance(mask_image, str | os.PathLike):
        file = MediaFile(mask_image)
        file.check_budget(file.count(), *file.size)
        return np.concatenate([_brighter(frame.pixels()[None]) for frame in file.frames()])
    if isinstance(mask_image, Image.Image):
        return _brighter(_as_frame("mask_image", mask_image)[None])
    values = mask_image
    if isinstance(values, Tensor):
        values = (values.float() if values.is_floating_point() else values).detach().cpu().numpy()
    if not isinstance(values, np.ndarray) or values.size == 0 or not (_is_colour(values.dtype) or values.dtype == bool):
        raise InputError(f"mask_image: got {_describe(mask_image)}: expected {MASK_FORMS}")
    colours = values.shape[-1] == 3 and values.dtype != bool
    if values.ndim == 2 or (values.ndim == 3 and colours):
        values = values[None]
    if values.ndim != 3 + colours:
        raise InputError(f"mask_image: got {_describe(mask_image)}: expected {MASK_FORMS}")
    if values.dtype == np.uint8 and values.max() == 1:
        raise InputError("mask_image: got uint8 of 0 and 1: expected white to be 255, or an array of bool")
    if np.issubdtype(values.dtype, np.floating):
        _check_range("mask_image", values)
    return _brighter(values)


def _brighter(values: np.ndarray) -> np.ndarray:
    """Mask values (M, H, W) or (M, H, W, 3) -> (M, H, W) bool: True if nearer to white than to black."""
    if values.dtype == bool:
        return values
    half = 128 if values.dtype == np.uint8 else 0.5
    return (values.mean(axis=3) if values.ndim == 4 else values) >= half


def masks_of(masks: np.ndarray, clip: InputClip) -> np.ndarray:
    """One mask (M, H, W) for all frames of a clip, or one a frame -> one a frame, (F, H, W)."""
    if masks.shape[1:] != clip.size:
        raise InputError(
            f"mask_image is {masks.shape[2]}x{masks.shape[1]}: expected {clip.size[1]}x{clip.size[0]}, the size of the "
            "picture it belongs to"
        )
    if len(masks) not in (1, len(clip)):
        raise InputError(f"got {len(masks)} masks: expected 1, or {len(clip)}, one a given frame")
    return np.broadcast_to(masks, (len(clip), *clip.size))


def masks_at(masks: np.ndarray, clip: InputClip, fps: float, size: tuple[int, int]) -> np.ndarray:
    """Masks of a clip (1 or F, H, W) -> one for each of its frames at a rate, at a size, as `Clip.read` gives them."""
    fitted, count = fit_masks(masks, size), clip.count(fps)
    if len(masks) == 1:
        return np.broadcast_to(fitted, (count, *size))
    shown = frames_at(len(clip), clip.fps, fps)
    return fitted[shown[np.minimum(np.arange(count), len(shown) - 1)]]


def enlarge(clip: InputClip, masks: np.ndarray | None, pixels: int) -> tuple[InputClip, np.ndarray]:
    """A clip with `pixels` more on every side, and its masks (M, H, W): what is new is filled in as well."""
    if pixels < 1:
        raise InputError(f"outpaint is {pixels}: expected a whole number of at least 1, pixels on every side")
    border = ((0, 0), (pixels, pixels), (pixels, pixels))
    frames = np.pad(clip.frames, (*border, (0, 0)), mode="edge")
    masks = np.zeros((1, *clip.size), bool) if masks is None else masks
    return InputClip(frames, clip.fps), np.pad(masks, border, constant_values=True)


def same_rate(source_fps: float | None, fps: float) -> bool:
    """True if a clip can be used frame by frame: its rate is that of the request, or unknown."""
    return source_fps is None or abs(source_fps - fps) <= SAME_RATE * fps


def frames_at(count: int, source_fps: float | None, fps: float) -> np.ndarray:
    """Which of `count` frames are shown at `fps`: the nearest in time, over the same duration (at least one)."""
    if source_fps is None or same_rate(source_fps, fps):
        return np.arange(count)
    timed = ((number / source_fps, number) for number in range(count))
    return np.array([number for _, number in nearest_frames(timed, fps, 1 / source_fps)])


def fit_masks(masks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Masks (M, H, W) -> the geometry of `fit_frames`; a pixel that a filled one touches is filled."""
    if masks.shape[1:] == size:
        return masks
    if len(masks) > 1:  # one by one: the sums below take eight times the room of a mask
        return np.concatenate([fit_masks(mask[None], size) for mask in masks])
    left, top, right, bottom = cover_box((masks.shape[1], masks.shape[2]), size)
    fitted = _any_touched(masks, top, bottom, size[0], axis=1)
    return _any_touched(fitted, left, right, size[1], axis=2)


def _any_touched(masks: np.ndarray, low: float, high: float, count: int, axis: int) -> np.ndarray:
    """Divides the part from `low` to `high` of one axis into `count` cells: True where any covered pixel is."""
    edges = low + (high - low) * np.arange(count + 1) / count
    first = np.floor(edges[:-1] + 1e-6).astype(int)  # a hair, so that rounding touches no neighbour
    last = np.maximum(np.ceil(edges[1:] - 1e-6).astype(int), first + 1)
    filled = np.concatenate([np.zeros_like(masks.take([0], axis), int), masks.cumsum(axis)], axis)
    return filled.take(last, axis) > filled.take(first, axis)


def to_pixels(frames: np.ndarray) -> Tensor:
    """Frames (F, H, W, 3) -> (3, F, H, W) float32 in [-1, 1]."""
    values = torch.from_numpy(frames.astype(np.float32))
    values = (values - 127.5) / 127.5 if frames.dtype == np.uint8 else 2 * values - 1
    return values.permute(3, 0, 1, 2)


def known_tokens(masks: Tensor, stride: int, frames: int, temporal_stride: int = 4) -> Tensor:
    """Masks (T, H, W) of pixel frames -> (F, h, w) bool for `frames` latent frames: True where a token is wholly known.

    A token is a square of `stride` pixels; in latent frame 0 of the first pixel frame, in later ones of the next
    `temporal_stride`. Pixel frames beyond the masks are not known.
    """
    wanted = temporal_stride * (frames - 1) + 1
    hole = masks[:wanted].float()
    hole = functional.pad(hole, (0, 0, 0, 0, 0, wanted - len(hole)), value=1.0)
    hole = functional.max_pool2d(hole.unsqueeze(1), stride).squeeze(1)  # (T, h, w)
    later = hole[1:].unflatten(0, (frames - 1, temporal_stride)).amax(1)  # (F - 1, h, w)
    return torch.cat([hole[:1], later]) == 0
