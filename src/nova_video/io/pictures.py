"""Pictures by Pillow: stills and animations, upright, as sRGB bytes, on white where they are transparent.

Only the formats of `FORMATS` are opened, none of which starts another program. Legend: F frames, H W pixels.
"""

import logging
import math
import threading
from collections.abc import Iterator
from functools import lru_cache
from io import BytesIO
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageOps, ImageSequence, UnidentifiedImageError

from nova_video.common.errors import MediaError
from nova_video.io.colour import ColourCoding, Primaries, coding_of, to_srgb

FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that Pillow may open. Others, such as EPS, would start programs or read other files."""
ANIMATION_FORMATS = ("AVIF", "GIF", "PNG", "WEBP")
SIGNATURES = {
    b"%!PS": "EPS or PostScript",
    b"\xc5\xd0\xd3\xc6": "EPS",
    b"%PDF": "PDF",
    b"8BPS": "a Photoshop file",
    b"<svg": "SVG",
    b"gimp xcf": "a GIMP file",
    b"#EXTM3U": "a playlist",
    b"ffconcat": "a playlist",
    b"\xff\x0a": "JPEG XL",
    b"\x00\x00\x00\x0cJXL ": "JPEG XL",
}
"""Other formats, by the first bytes of their files, so that an error can name them."""
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1")
HEAD = 65536  # bytes in which a PNG or AVIF names its coding
MOST_FRAMES = 100_000  # of an animation: small frames take long to go through, however few their pixels
LARGE = 2**26  # pixels: a larger picture is reduced by a whole number as soon as it is read
DURATION = 0.1  # seconds a frame of an animation is shown if its file does not say
SURE_DURATION = 0.03  # seconds: a gif tells hundredths apart, so that rounding makes shorter frames uneven
ADOBE_RGB = ColourCoding(((0.3127, 0.3290), (0.64, 0.33), (0.21, 0.71), (0.15, 0.06)), gamma=256 / 563)

log = logging.getLogger(__name__)
_opening = threading.Lock()


# Opening -------------------------------------------------------------------------------------------------------------


class Picture:
    """An opened picture, or animation, whose pixels are still to be read."""

    def __init__(self, file: BinaryIO, max_pixels: int) -> None:
        """MediaError for a picture of another format, or of more than `max_pixels` pixels (times frames) or
        `MOST_FRAMES` frames."""
        self.image = _open(file)
        self._check_pixels(1, max_pixels)
        self.frames = 1
        self.has_pages = False
        """Whether a TIFF holds more pictures than the first one."""
        if self.image.format in ANIMATION_FORMATS:
            width, height = self.image.size
            if self.image.format == "GIF":  # Pillow would go through all of them first
                most = min(max_pixels // (width * height), MOST_FRAMES) + 1
                self._check_pixels(_count_gif(file, most), max_pixels, " or more")
            self.frames = getattr(self.image, "n_frames", 1)
            self._check_pixels(self.frames, max_pixels)
        elif self.image.format == "TIFF":
            self.has_pages = getattr(self.image, "is_animated", False)  # Pillow would go through all to count them
        if (coding := named_coding(file, self.image.format)) is not None:
            self.image.info["nova_coding"] = coding

    def _check_pixels(self, frames: int, max_pixels: int, more: str = "") -> None:
        width, height = self.image.size
        if frames * width * height > max_pixels:
            several = f"{frames} frames{more} of " if frames > 1 else ""
            raise MediaError(
                f"has {several}{width}x{height} pixels: expected at most {max_pixels} in all (NOVA_MAX_PIXELS)"
            )
        if frames > MOST_FRAMES:
            raise MediaError(f"has {frames} frames{more}: expected at most {MOST_FRAMES}")

    @property
    def whole_size(self) -> tuple[int, int]:
        """(H, W), upright."""
        width, height = self.image.size
        turned = self.image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        if turned and self.image.format != "TIFF":  # which Pillow turns itself
            width, height = height, width
        return height, width

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) as it is read: upright, and reduced if it is large."""
        (height, width), factor = self.whole_size, _reduction(self.image)
        return -(-height // factor), -(-width // factor)

    def still(self) -> NDArray[np.uint8]:
        """The first frame, (H, W, 3)."""
        self.image.seek(0)
        return np.asarray(upright_srgb(self.image))

    def durations(self) -> list[float]:
        """Seconds that each frame of the animation is shown."""
        shown = []
        for frame in self._sequence():
            frame.load()  # WebP tells the time of a frame that it has read
            shown.append(frame.info.get("duration", 0) / 1000 or DURATION)
        return shown

    def sequence(self) -> Iterator[NDArray[np.uint8]]:
        """The frames of the animation, (H, W, 3), read one by one."""
        for frame in self._sequence():
            yield np.asarray(upright_srgb(frame))

    def _sequence(self) -> Iterator[Image.Image]:
        frames = ImageSequence.Iterator(self.image)
        if getattr(self.image, "default_image", False) and self.frames > 1:
            next(frames)  # an APNG's picture for programs that know no animations
        yield from frames


def _open(file: BinaryIO) -> Image.Image:
    """An opened picture of one of `FORMATS`, of any size: Pillow's own bound is per process, the caller's per file."""
    with _opening:
        bound, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            raise MediaError(f"is {other_format(file) or 'damaged, or of no known format'}") from None
        finally:
            Image.MAX_IMAGE_PIXELS = bound


def _count_gif(file: BinaryIO, most: int) -> int:
    """The frames of a GIF by its blocks, of which no more than `most` are counted."""
    place = file.tell()
    file.seek(10)
    count, packed = 0, file.read(3)[0]
    file.seek(3 << (packed & 7) + 1 if packed & 0x80 else 0, 1)  # its palette
    while count < most and (kind := file.read(1)) in (b"!", b","):
        if kind == b"!":
            file.seek(1, 1)  # the extension's label
        else:
            count += 1
            packed = (file.read(9) or b"\0")[-1]
            file.seek((3 << (packed & 7) + 1 if packed & 0x80 else 0) + 1, 1)  # a palette and the width of codes
        while size := file.read(1)[:1]:
            if size == b"\0":
                break
            file.seek(size[0], 1)
    file.seek(place)
    return count


def other_format(file: BinaryIO) -> str:
    """A known format that is not read, with what is; empty for an unknown one."""
    file.seek(0)
    head = file.read(64)
    name = next((name for start, name in SIGNATURES.items() if head.lstrip().startswith(start)), "")
    if head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS:
        name = "HEIC or HEIF"
    return f"{name}: expected a JPEG, PNG, WebP, AVIF, GIF, TIFF or BMP picture, or a video" if name else ""


# Colour --------------------------------------------------------------------------------------------------------------


def upright_srgb(image: Image.Image) -> Image.Image:
    """A picture as RGB: turned as its EXIF says, in sRGB by its profile, on white where it is transparent.

    Pixels that need none of this stay as they are, bit for bit. MediaError for pixels of 32 bits.
    """
    coding, profile, in_16_bits = _find_coding(image), image.info.get("icc_profile"), _has_16_bits(image)
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("I", "F") and not in_16_bits:
        bits = "32 bit" if upright.mode == "I" else "floating point"
        raise MediaError(f"has pixels of {bits}: expected 8 or 16 bit")
    alpha = _alpha(upright)
    if in_16_bits:
        codes = np.asarray(upright).astype(np.uint16)  # (H, W)
        if profile is None and not coding.is_srgb:
            colour = Image.fromarray(to_srgb(np.stack([codes] * 3, axis=-1), coding))
            coding = ColourCoding()
        else:
            colour = Image.fromarray((codes / 257).round().astype(np.uint8))
    else:
        colour = upright.convert("L") if upright.mode in ("LA", "La") else upright
        if colour.mode not in ("L", "RGB", "CMYK", "LAB"):
            colour = colour.convert("RGBA").convert("RGB") if alpha is not None else colour.convert("RGB")
    factor = _reduction(image)
    if factor > 1:
        colour, alpha = colour.reduce(factor), None if alpha is None else alpha.reduce(factor)
    if colour.mode == "LAB":
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    if profile:
        colour = _apply_profile(colour, profile)
    colour = colour.convert("RGB")
    if not profile and not coding.is_srgb:
        colour = Image.fromarray(to_srgb(np.asarray(colour), coding))
    if alpha is not None:
        colour.putalpha(alpha)
        colour = Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour).convert("RGB")
    colour.info = {}  # done: a second call changes nothing
    return colour


def _has_16_bits(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")


def _alpha(image: Image.Image) -> Image.Image | None:
    """How opaque a picture is, as L; None where it has no transparency."""
    transparent = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        if transparent is None:
            return None
        return Image.fromarray(np.where(np.asarray(image) == transparent, 0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return None
    if isinstance(transparent, tuple) and max(transparent) > 255:  # of 16 bits, of which Pillow has read the upper 8
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    return image.convert("RGBA").getchannel("A")


def _reduction(image: Image.Image) -> int:
    """By how much a large picture is made smaller."""
    return math.ceil(math.sqrt(max(image.width * image.height / LARGE, 1)))


def _apply_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """Converts a picture in L, RGB, CMYK or LAB by its ICC profile, unless that is nearly sRGB."""
    try:
        space = ImageCms.ImageCmsProfile(BytesIO(profile)).profile.xcolor_space.strip()
        if space == "RGB" and image.mode == "L":
            image = image.convert("RGB")
        if {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "Lab": "LAB"}.get(space) != image.mode:
            raise ImageCms.PyCMSError(f"it is of {space}, the picture of {image.mode}")
        transform, is_srgb = _transform(profile, image.mode)
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        log.warning("a picture's colour profile cannot be used: its colours are taken as sRGB (%s)", error)
        return image.convert("RGB")
    return image.convert("RGB") if is_srgb else transform.apply(image)


@lru_cache(16)
def _transform(profile: bytes, mode: str) -> tuple[ImageCms.ImageCmsTransform, bool]:
    """The way from a profile to sRGB, and whether it changes nothing."""
    transform = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    if mode not in ("L", "RGB"):
        return transform, False
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    samples = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 9, 3)
    picture = Image.fromarray(samples) if mode == "RGB" else Image.fromarray(samples[..., 0])
    changed = np.asarray(transform.apply(picture)).astype(int) - np.asarray(picture.convert("RGB"))
    return transform, bool(np.abs(changed).max() <= 1)


def _find_coding(image: Image.Image) -> ColourCoding:
    """How the values of a picture without a profile are coded."""
    info = image.info
    if isinstance(named := info.get("nova_coding"), ColourCoding):
        return named
    if "srgb" in info:
        return ColourCoding()
    if "gamma" in info or "chromaticity" in info:
        gamma, flat = info.get("gamma") or 1 / 2.2, info.get("chromaticity")
        if not 0.1 <= gamma <= 10:
            return ColourCoding()
        points = [(flat[k], flat[k + 1]) for k in (0, 2, 4, 6)] if flat and len(flat) == 8 else None
        return ColourCoding(_near_bt709(points), gamma=gamma)
    try:
        interoperability = image.getexif().get_ifd(ExifTags.IFD.Interop)
    except KeyError:  # Pillow before 13 raises it where the EXIF data have no such directory
        return ColourCoding()
    return ADOBE_RGB if interoperability.get(1) == "R03" else ColourCoding()  # the DCF's option colour space


def _near_bt709(points: list[tuple[float, float]] | None) -> Primaries:
    """Chromaticities of a PNG; those of BT.709 where they are that, absent or impossible."""
    own = ColourCoding().primaries
    if points is None or min(min(point) for point in points) <= 0 or np.abs(np.subtract(points, own)).max() < 0.002:
        return own
    white, red, green, blue = points
    area = (red[0] - blue[0]) * (green[1] - blue[1]) - (green[0] - blue[0]) * (red[1] - blue[1])
    return (white, red, green, blue) if abs(area) > 0.001 else own


def named_coding(file: BinaryIO, kind: str | None) -> ColourCoding | None:
    """The coding that a PNG (chunk cICP) or an AVIF file (box nclx) names, None where it names none."""
    if kind not in ("PNG", "AVIF"):
        return None
    place = file.tell()
    file.seek(0)
    head = file.read(HEAD)
    file.seek(place)
    if kind == "PNG":
        start = head.find(b"cICP")
        if 0 <= start < (head.find(b"IDAT") % (HEAD + 1)) and len(head) >= start + 8:
            return coding_of(head[start + 4], head[start + 5])
        return None
    start = head.find(b"colrnclx")
    if start < 0 or b"colrprof" in head or b"colrrICC" in head or len(head) < start + 12:
        return None
    return coding_of(int.from_bytes(head[start + 8 : start + 10]), int.from_bytes(head[start + 10 : start + 12]))
