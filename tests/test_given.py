"""Given clips and masks: every form gives the same frames, bits pass, sizes and rates are converted as said."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from nova_video.common.errors import InputError
from nova_video.io import media
from nova_video.io.fit import fit_frames
from nova_video.io.inputs import (
    InputClip,
    enlarge,
    fit_masks,
    frames_at,
    known_tokens,
    masks_of,
    read_clips,
    read_masks,
    same_rate,
    to_pixels,
)
from nova_video.io.pixels import image_to_pixels, output_form, unit_frames
from nova_video.pipeline.request import GenerateRequest

BYTES = np.random.default_rng(0).integers(0, 256, (3, 6, 8, 3), dtype=np.uint8)
FLOATS = np.random.default_rng(1).random((3, 6, 8, 3), dtype=np.float32)
PICTURES = [Image.fromarray(frame) for frame in BYTES]


def one(video: Any) -> InputClip:
    clips = read_clips(video)
    assert isinstance(clips, tuple)
    (clip,) = clips
    return clip


def smooth(height: int, width: int) -> np.ndarray:
    """One frame of soft waves, (1, H, W, 3) uint8."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return (127.5 + 100 * np.sin(y / 15 + c) * np.cos(x / 13))[None].astype(np.uint8)


# clips


@pytest.mark.parametrize(
    "video", [BYTES, list(BYTES), PICTURES, tuple(PICTURES), [PICTURES], BYTES[None], InputClip(BYTES)]
)
def test_bytes_in_every_form(video: Any) -> None:
    clip = one(video)
    assert clip.frames.dtype == np.uint8
    assert np.array_equal(clip.frames, BYTES)
    assert (clip.fps, clip.size, len(clip)) == (None, (6, 8), 3)


@pytest.mark.parametrize(
    "video",
    [
        FLOATS,
        FLOATS.astype(np.float64),
        list(FLOATS),  # as a stream of "np" gives them
        torch.from_numpy(FLOATS).permute(0, 3, 1, 2),
        torch.from_numpy(FLOATS).permute(0, 3, 1, 2)[None],
        list(torch.from_numpy(FLOATS).permute(0, 3, 1, 2)),  # as a stream of "pt" gives them
    ],
)
def test_floats_in_every_form(video: Any) -> None:
    clip = one(video)
    assert clip.frames.dtype == np.float32
    assert np.array_equal(clip.frames, FLOATS)


def test_half_precision_is_exact() -> None:
    halves = torch.from_numpy(FLOATS).permute(0, 3, 1, 2).bfloat16()
    assert np.array_equal(one(halves).frames, halves.float().permute(0, 2, 3, 1).numpy())


def test_pictures_are_clips_of_one_frame(tmp_path: Path) -> None:
    PICTURES[0].save(tmp_path / "still.png")
    for picture in (PICTURES[0], BYTES[0], tmp_path / "still.png", str(tmp_path / "still.png")):
        clip = one(picture)
        assert np.array_equal(clip.frames, BYTES[:1])
        assert clip.fps is None  # a still has no rate
    gray = one(PICTURES[0].convert("L"))
    assert gray.frames.shape == (1, 6, 8, 3)


def test_files(tmp_path: Path) -> None:
    media.write_media(BYTES, tmp_path / "clip.png", 10, {})
    clip = one(tmp_path / "clip.png")
    assert np.array_equal(clip.frames, BYTES)
    assert clip.fps == pytest.approx(10)
    both = read_clips([tmp_path / "clip.png", str(tmp_path / "clip.png")])
    assert len(both) == 2
    with pytest.raises(InputError, match="there is no file"):
        read_clips("missing.mp4")


def test_batches() -> None:
    other = 255 - BYTES
    for video in (
        np.stack([BYTES, other]),
        [BYTES, other],
        [PICTURES, list(other)],
        (InputClip(BYTES), InputClip(other)),
    ):
        clips = read_clips(video)
        assert isinstance(clips, tuple)
        assert np.array_equal(np.stack([clip.frames for clip in clips]), np.stack([BYTES, other]))
    tensors = torch.rand(2, 3, 3, 6, 8)
    clips = read_clips(tensors)
    assert isinstance(clips, tuple)
    assert np.array_equal(clips[1].frames, tensors[1].permute(0, 2, 3, 1).numpy())


def test_reading_twice_is_reading_once() -> None:
    clips = read_clips([BYTES, BYTES])
    again = read_clips(clips)
    assert all(one is two for one, two in zip(clips, again, strict=True))
    latents = torch.randn(1, 4, 2, 3, 3)
    kept = read_clips(read_clips(latents))
    assert isinstance(kept, torch.Tensor)
    assert torch.equal(kept, latents)


def test_latents_and_pixels_are_told_apart() -> None:
    for latents in (torch.rand(2, 16, 1, 4, 4), torch.randn(2, 4, 3, 8, 8), torch.randn(1, 16, 2, 4, 4).half()):
        kept = read_clips(latents)
        assert isinstance(kept, torch.Tensor)
        assert kept.dtype == latents.dtype
    assert isinstance(read_clips(torch.rand(2, 5, 3, 8, 8)), tuple)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ([], "video: got an empty list: expected a path"),
        ([[]], "video: got an empty list"),
        (5, "video: got int: expected a path, PIL images"),
        ([1, 2], "video: got int"),
        (BYTES.astype(np.int64), "video: got int64 (3, 6, 8, 3)"),
        (BYTES[..., :2], "video: got uint8 (3, 6, 8, 2)"),
        (BYTES[:0], "video: got uint8 (0, 6, 8, 3)"),
        (FLOATS * 2, "video: got floats from "),
        (FLOATS * np.nan, "video: got floats from nan to nan: expected them in [0, 1]"),
        (torch.zeros(3, 6, 8, 3), "video: got float32 (3, 6, 8, 3)"),
        (torch.zeros(3, 3, 6, 8, dtype=torch.uint8), "video: got uint8 (3, 3, 6, 8)"),
        (torch.full((1, 4, 2, 3, 3), torch.nan), "video: got float32 (1, 4, 2, 3, 3), empty or not finite"),
        ([PICTURES[0], PICTURES[0].resize((4, 4))], "video: got frames of 4x4, 8x6: expected frames of one size"),
        ([BYTES, BYTES[:2]], "got clips of 3 frames of 8x6, 2 frames of 8x6: expected the same length, size and rate"),
        ((InputClip(BYTES, 8), InputClip(BYTES, 12)), "3 frames of 8x6 at 8 fps, 3 frames of 8x6 at 12 fps"),
    ],
)
def test_wrong_clips(video: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read_clips(video)
    assert "\n" not in str(caught.value)


def test_wrong_clip_objects() -> None:
    for frames in (BYTES[0], FLOATS.astype(np.float64), BYTES[:0]):
        with pytest.raises(InputError, match="a clip's frames are"):
            InputClip(frames)
    with pytest.raises(InputError, match="a clip's frames: got floats"):
        InputClip(FLOATS + 1)
    with pytest.raises(InputError, match="a clip's fps is 0"):
        InputClip(BYTES, 0)


# masks

HOLE = np.zeros((6, 8), dtype=bool)
HOLE[2:4, 3:] = True
WHITE = np.where(HOLE, 255, 0).astype(np.uint8)


@pytest.mark.parametrize(
    "mask",
    [
        HOLE,
        HOLE[None],
        WHITE,
        WHITE // 2 + 1 - (WHITE == 0),  # 128 is white
        HOLE.astype(np.float32),
        np.where(HOLE, 0.5, 0.49),
        np.repeat(WHITE[..., None], 3, axis=2),
        np.repeat(np.where(HOLE, 0.5, 0.49)[..., None], 3, axis=2),
        torch.from_numpy(HOLE),
        torch.from_numpy(HOLE).half(),
        Image.fromarray(WHITE),
        Image.fromarray(WHITE).convert("1"),
        Image.fromarray(WHITE).convert("RGB"),
        [HOLE],
    ],
)
def test_one_mask_in_every_form(mask: Any) -> None:
    masks = read_masks(mask)
    assert masks.dtype == bool
    assert np.array_equal(masks, HOLE[None])
    assert read_masks(masks) is masks


def test_several_masks(tmp_path: Path) -> None:
    expected = np.stack([HOLE, ~HOLE])
    white = np.stack([WHITE, 255 - WHITE])
    media.write_media(np.repeat(white[..., None], 3, axis=3), tmp_path / "masks.png", 8, {})
    forms: list[Any] = [expected, white, white / 255, list(white), [Image.fromarray(mask) for mask in white]]
    for mask in [
        *forms,
        np.repeat(white[..., None], 3, axis=3),
        tmp_path / "masks.png",
        [HOLE, Image.fromarray(~HOLE)],
    ]:
        assert np.array_equal(read_masks(mask), expected)
    narrow = np.zeros((4, 5, 3), dtype=bool)  # never taken for colours
    assert read_masks(narrow).shape == (4, 5, 3)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([], "mask_image: got an empty list"),
        (None, "mask_image: got NoneType: expected a path, a PIL image"),
        (HOLE.astype(np.int64), "mask_image: got int64 (6, 8)"),
        (HOLE.astype(np.uint8), "mask_image: got uint8 of 0 and 1: expected white to be 255"),
        (HOLE * 255.0, "mask_image: got floats from 0 to 255: expected them in [0, 1]"),
        (HOLE[0], "mask_image: got bool (8,)"),
        (HOLE[None, None], "mask_image: got bool (1, 1, 6, 8)"),
        ([HOLE, HOLE[:2]], "mask_image: got masks of 8x2, 8x6: expected masks of one size"),
    ],
)
def test_wrong_masks(mask: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        read_masks(mask)


def test_masks_of_a_clip() -> None:
    clip = InputClip(BYTES)
    assert np.array_equal(masks_of(HOLE[None], clip), np.stack([HOLE] * 3))
    each = np.stack([HOLE, ~HOLE, HOLE])
    assert np.array_equal(masks_of(each, clip), each)
    with pytest.raises(InputError, match="got 2 masks: expected 1, or 3, one a given frame"):
        masks_of(each[:2], clip)
    with pytest.raises(InputError, match="mask_image is 7x6: expected 8x6, the size of the picture it belongs to"):
        masks_of(HOLE[None, :, :7], clip)


# rate and size


def test_frames_at_another_rate() -> None:
    for source in (None, 12, 11.99, 12.05):  # files round their rates
        assert same_rate(source, 12)
        assert np.array_equal(frames_at(500, source, 12), np.arange(500))
    assert not same_rate(24, 12)
    assert frames_at(9, 24, 12).tolist() == [0, 2, 4, 6, 8]
    assert frames_at(3, 6, 12).tolist() == [0, 0, 1, 1, 2, 2]  # of two as near, the earlier
    assert frames_at(1, 30, 12).tolist() == [0]
    for count, source, fps in [(300, 30, 12), (250, 25, 8), (77, 23.976, 12), (50, 8, 30), (1, 1, 12)]:
        shown = frames_at(count, source, fps)
        assert len(shown) == pytest.approx(count * fps / source, abs=0.5)  # as long as it was
        assert shown[0] == 0
        assert shown[-1] < count
        off = np.abs(shown / source - np.arange(len(shown)) / fps)[shown < count - 1]  # the last one may stay longer
        assert off.max(initial=0) <= 0.5 / source + 1e-9


SIZES = [((40, 60), (32, 32)), ((7, 9), (32, 64)), ((33, 31), (32, 32)), ((100, 50), (32, 64)), ((64, 64), (32, 32))]


@pytest.mark.parametrize(("source", "size"), SIZES)
def test_fit_covers_and_crops(source: tuple[int, int], size: tuple[int, int]) -> None:
    """As PIL's own `fit`; floats as bytes."""
    noise = np.random.default_rng(0).integers(0, 256, (2, *source, 3), dtype=np.uint8)
    expected = [ImageOps.fit(Image.fromarray(frame), size[::-1], Image.Resampling.BICUBIC) for frame in noise]
    assert np.array_equal(fit_frames(noise, size), np.stack([np.asarray(picture) for picture in expected]))
    floats = fit_frames((smooth(*source) / 255).astype(np.float32), size)
    assert floats.dtype == np.float32
    assert np.abs(255 * floats - fit_frames(smooth(*source), size)).max() <= 3


def test_floats_stay_in_range() -> None:
    checks = np.indices((16, 16)).sum(0)[None, ..., None].repeat(3, 3) % 8 // 4
    fitted = fit_frames(checks.astype(np.float32), (40, 40))
    assert (fitted.min(), fitted.max()) == (0, 1)


def test_the_exact_size_passes() -> None:
    for frames in (BYTES, FLOATS):
        assert fit_frames(frames, (6, 8)) is frames
    assert fit_masks(HOLE[None], (6, 8))[0].tolist() == HOLE.tolist()


@pytest.mark.parametrize(("source", "size"), SIZES)
def test_fitted_masks_cover_what_they_touch(source: tuple[int, int], size: tuple[int, int]) -> None:
    """Brute force: a pixel is filled where the filled part of the picture, drawn finely, has any of its area."""
    height, width = source
    mask = np.random.default_rng(2).random((2, *source)) < 0.1
    scale = min(height / size[0], width / size[1])
    top, left = (height - scale * size[0]) / 2, (width - scale * size[1]) / 2
    fine = (np.arange(64) + 0.5) / 64

    def touched(low: float, count: int, sides: int) -> np.ndarray:
        places = (low + scale * (np.arange(count)[:, None] + fine)).astype(int)  # (count, 64)
        return (places[..., None] == np.arange(sides)).any(1)  # (count, sides)

    rows, columns = touched(top, size[0], height), touched(left, size[1], width)
    assert np.array_equal(fit_masks(mask, size), np.einsum("hi,nij,wj->nhw", rows, mask.astype(int), columns) > 0)


# tensors


def test_given_pixels_come_back() -> None:
    assert torch.equal(to_pixels(BYTES[:1]).transpose(0, 1), image_to_pixels(PICTURES[0], (6, 8)))
    pixels = to_pixels(BYTES)  # (3, F, H, W)
    assert (pixels.shape, pixels.dtype) == ((3, 3, 6, 8), torch.float32)
    assert torch.equal(pixels, torch.from_numpy((BYTES.astype(np.float32) - 127.5) / 127.5).permute(3, 0, 1, 2))
    back = output_form(unit_frames(pixels[None]), "pil")[0]
    assert np.array_equal(np.stack([np.asarray(picture) for picture in back]), BYTES)
    floats = to_pixels(FLOATS)
    assert torch.equal(floats, 2 * torch.from_numpy(FLOATS).permute(3, 0, 1, 2) - 1)


def test_every_output_form_can_be_given() -> None:
    for frames in (BYTES, FLOATS):
        made = unit_frames(to_pixels(frames)[None])
        arrays, tensors = output_form(made, "np")[0], output_form(made, "pt")[0]
        assert np.array_equal(one(arrays).frames, arrays)
        assert np.array_equal(one(tensors).frames, arrays)
        assert np.array_equal(one(output_form(made, "pil")[0]).frames, (arrays * 255).round().astype(np.uint8))
        assert np.allclose(arrays, frames / 255 if frames.dtype == np.uint8 else frames, atol=1e-6)


def test_known_tokens() -> None:
    masks = torch.zeros(9, 16, 24, dtype=torch.bool)
    masks[0, 3, 3] = True  # token (0, 0) of latent frame 0
    masks[6, 15, 8] = True  # token (1, 1) of latent frame 2: pixel frames 5 to 8
    known = torch.ones(3, 2, 3, dtype=torch.bool)
    known[0, 0, 0] = known[2, 1, 1] = False
    assert torch.equal(known_tokens(masks, 8, 3), known)
    assert torch.equal(known_tokens(masks, 8, 1), known[:1])
    assert torch.equal(known_tokens(masks[:8], 8, 3)[:2], known[:2])
    assert not known_tokens(masks[:8], 8, 3)[2].any()  # its last pixel frame is missing
    assert torch.equal(known_tokens(masks, 8, 5, temporal_stride=2).sum((1, 2)), torch.tensor([5, 6, 6, 5, 6]))


def test_importing_opens_no_video_library() -> None:
    code = "import sys, nova_video.io.inputs, nova_video.common.timeline; sys.exit('av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_enlarged_canvas() -> None:
    """The old frames are in the middle, bit for bit, and the masks have all that is new."""
    clip, masks = enlarge(InputClip(BYTES, 8.0), None, 2)
    assert (clip.size, clip.fps, masks.shape) == ((10, 12), 8.0, (1, 10, 12))
    assert np.array_equal(clip.frames[:, 2:-2, 2:-2], BYTES)
    assert not masks[:, 2:-2, 2:-2].any()
    assert masks.sum() == 10 * 12 - 6 * 8
    own = np.arange(3)[:, None, None] == np.zeros((3, 6, 8))  # the first frame is filled in
    masks = enlarge(InputClip(BYTES), own, 1)[1]
    assert np.array_equal(masks[:, 1:-1, 1:-1], own)
    assert masks[:, 0].all()
    with pytest.raises(InputError, match="outpaint is 0: expected"):
        enlarge(InputClip(BYTES), None, 0)


def test_pictures_are_taken_as_they_are_shown() -> None:
    """Turned as their EXIF says, on white where they are clear; what cannot be shown is named."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.new("RGBA", (8, 6), (255, 0, 0, 0))
    turned.info["exif"] = exif.tobytes()
    request = GenerateRequest("a whale", image=turned)
    for clip in (one([turned]), one(turned), request.given_clips[0]):
        assert clip.size == (8, 6)
        assert (clip.frames == 255).all()
    assert read_masks(turned).shape == (1, 8, 6)
    deep = Image.fromarray(np.zeros((4, 4), np.float32))
    for call, name in [
        (lambda: GenerateRequest("a whale", image=deep), "image has"),
        (lambda: read_clips([deep]), "video: a picture has"),
        (lambda: read_masks(deep), "mask_image: a picture has"),
    ]:
        with pytest.raises(InputError, match=f"^{name} pixels of floating point: expected 8 or 16 bit$"):
            call()
