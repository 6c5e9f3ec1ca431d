"""Pictures: upright, in sRGB, on white, whatever their mode; colours are checked against values known beforehand."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from nova_video.common.errors import MediaError
from nova_video.io.colour import (
    BT2020,
    D65,
    DCI_P3,
    DISPLAY_P3,
    ColourCoding,
    Primaries,
    coding_of,
    matrix_to_bt709,
    srgb_coded,
    srgb_linear,
    to_srgb,
)
from nova_video.io.decode import upright_srgb
from nova_video.io.media import load_image, read_frames
from nova_video.io.pictures import Picture, named_coding

ANY_SIZE = 2**29
PRO_PHOTO: Primaries = ((0.3457, 0.3585), (0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001))
ADOBE: Primaries = (D65, (0.64, 0.33), (0.21, 0.71), (0.15, 0.06))


def icc_profile(primaries: Primaries, gamma: float) -> bytes:
    """A matrix profile of version 2, its colours adapted to D50 as ICC has it."""

    def xyz(point: tuple[float, float]) -> np.ndarray:
        return np.array([point[0] / point[1], 1, (1 - sum(point)) / point[1]])

    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    white, *colours = primaries
    cones = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    d50 = np.array([0.9642, 1, 0.8249])
    adapt = np.linalg.inv(cones) @ np.diag(cones @ d50 / (cones @ xyz(white))) @ cones
    columns = np.stack([xyz(colour) for colour in colours], axis=1)
    columns = adapt @ (columns * np.linalg.solve(columns, xyz(white)))
    curve = b"curv" + bytes(4) + struct.pack(">IHH", 1, round(gamma * 256), 0)
    points = {b"wtpt": d50, b"rXYZ": columns[:, 0], b"gXYZ": columns[:, 1], b"bXYZ": columns[:, 2]}
    tags = {name: b"XYZ " + bytes(4) + b"".join(map(number, point)) for name, point in points.items()}
    tags |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    tags |= {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"t\0" + bytes(78),
        b"cprt": b"text" + bytes(4) + b"-\0\0\0",
    }
    place, table, body = 132 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        padded = data + bytes(-len(data) % 4)
        table += name + struct.pack(">II", place + len(body), len(data))
        body += padded
    head = struct.pack(">I4sI4s4s4s", place + len(body), b"lcms", 0x02200000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + b"".join(map(number, d50)) + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + body


def png(rows: np.ndarray, kind: int, *chunks: tuple[bytes, bytes]) -> io.BytesIO:
    """A PNG of 16 bits, written by hand: Pillow writes neither colours of 16 bits nor these chunks."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    pixels = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], 16, kind, 0, 0, 0)), *chunks]
    parts += [(b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))


def saved(image: Image.Image, kind: str, **settings: Any) -> io.BytesIO:
    image.save(file := io.BytesIO(), kind, **settings)
    file.seek(0)
    return file


def read(file: io.BytesIO) -> np.ndarray:
    return Picture(file, ANY_SIZE).still()


def colour(file: io.BytesIO) -> list[int]:
    return read(file)[0, 0].tolist()


# Upright -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "TIFF", "AVIF"])
def test_all_orientations(kind: str, orientation: int) -> None:
    """Shown upright: quarters of four colours come out where the whole picture has them."""
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24], upright[:16, 24:], upright[16:, :24] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a),  # to be turned clockwise
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossy = {"JPEG": {"quality": 95}, "AVIF": {"quality": 90}, "WEBP": {"lossless": True}}.get(kind, {})
    file = saved(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **lossy)
    picture = Picture(file, ANY_SIZE)
    assert picture.size == (32, 48)
    pixels = picture.still()[[8, 8, 24, 24], [12, 36, 12, 36]].astype(int)
    assert np.abs(pixels - [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)]).max() <= 16
    given = upright_srgb(Image.open(file))  # as a picture handed over in Python is
    assert np.array_equal(np.asarray(given), picture.still())
    assert np.array_equal(np.asarray(upright_srgb(given)), picture.still())  # twice is once


# Colours -------------------------------------------------------------------------------------------------------------


def srgb(light: Any) -> np.ndarray:
    light = np.clip(light, 0, 1)
    return np.round(255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055))


@pytest.mark.parametrize(
    ("primaries", "gamma", "code", "expected"),
    [
        (DISPLAY_P3, 2.2, (255, 255, 255), (255, 255, 255)),
        (DISPLAY_P3, 2.2, (255, 0, 0), (255, 0, 0)),  # beyond sRGB
        (DISPLAY_P3, 2.2, (200, 100, 50), (216, 93, 24)),
        (ADOBE, 2.2, (128, 128, 128), (129, 129, 129)),
        (ADOBE, 2.2, (100, 150, 50), (66, 151, 33)),
        (PRO_PHOTO, 1.8, (100, 100, 100), (119, 119, 119)),
    ],
)
def test_icc_profiles(
    primaries: Primaries, gamma: float, code: tuple[int, int, int], expected: tuple[int, ...]
) -> None:
    """As the matrices of the spaces say (colour by colour, to two steps), in files of every kind."""
    image, profile = Image.new("RGB", (8, 8), code), icc_profile(primaries, gamma)
    for kind, lossy in [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 100})]:
        got = colour(saved(image, kind, icc_profile=profile, **lossy))
        assert np.abs(np.subtract(got, expected)).max() <= (4 if kind == "JPEG" else 2), (kind, got)
    clear = image.copy()
    clear.putalpha(0)
    assert colour(saved(clear, "PNG", icc_profile=profile)) == [255, 255, 255]


def test_srgb_profiles_change_nothing() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(read(saved(noise, "PNG", icc_profile=own)), np.asarray(noise))


@pytest.mark.parametrize("profile", [b"no profile", icc_profile(DISPLAY_P3, 2.2)[:200]])
def test_damaged_profiles_are_named(profile: bytes, caplog: pytest.LogCaptureFixture) -> None:
    assert colour(saved(Image.new("RGB", (8, 8), (9, 8, 7)), "PNG", icc_profile=profile)) == [9, 8, 7]
    assert "colour profile cannot be used" in caplog.text


def test_png_names_its_coding() -> None:
    """Gamma, chromaticities and code points, of which the later ones come first; sRGB stays as it is."""
    middle = np.full((2, 2, 3), 32768)
    flat = [round(100000 * value) for point in DISPLAY_P3 for value in point]
    gamma, points = (b"gAMA", struct.pack(">I", 100000)), (b"cHRM", struct.pack(">8I", *flat))
    assert colour(png(middle, 2)) == [128, 128, 128]
    assert colour(png(middle, 2, gamma)) == [188, 188, 188]  # linear light of a half
    assert colour(png(middle, 2, gamma, (b"sRGB", b"\0"))) == [128, 128, 128]
    assert colour(png(middle[..., 0], 0, gamma)) == [188, 188, 188]
    red = np.array([[[65535, 0, 0]]])
    assert colour(png(red // 2, 2, points))[1:] == [0, 0]
    assert colour(png(red // 2, 2, points))[0] > 135  # P3's red is a stronger one
    code = (b"cICP", bytes([9, 16, 0, 1]))  # HDR: BT.2020 with PQ
    assert colour(png(np.full((2, 2, 3), 38055), 2, code, gamma)) == [255, 255, 255]  # 58.07%: 203 nits
    with pytest.raises(MediaError, match="has the transfer function log100: expected SDR, PQ"):
        read(png(middle, 2, (b"cICP", bytes([1, 9, 0, 1]))))


def test_avif_names_its_coding() -> None:
    data = saved(Image.new("RGB", (64, 64), (148, 148, 148)), "AVIF", quality=100).getvalue()
    start = data.index(b"colrnclx") + 8
    hdr = io.BytesIO(data[:start] + struct.pack(">HH", 9, 16) + data[start + 4 :])
    assert named_coding(hdr, "AVIF") == ColourCoding(BT2020, 16)
    assert min(colour(hdr)) >= 250
    assert colour(io.BytesIO(data)) == [148, 148, 148]


def test_adobe_rgb_of_cameras() -> None:
    """A camera names it by the interoperability index alone."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    file = saved(Image.new("RGB", (16, 16), (100, 150, 50)), "JPEG", exif=exif, quality=100)
    assert np.abs(np.subtract(colour(file), (66, 151, 33))).max() <= 4


@pytest.mark.parametrize(
    ("primaries", "transfer", "code", "expected"),
    [
        (9, 16, 0.5807, (255, 255, 255)),  # PQ of 203 nits
        (9, 16, 0.50957, (188, 188, 188)),  # of 101.5, half of it
        (9, 16, 1.0, (255, 255, 255)),
        (9, 18, 0.75, (255, 255, 255)),  # HLG
        (9, 18, 0.0, (0, 0, 0)),
        (1, 8, 0.5, (188, 188, 188)),
        (9, 14, 0.5, (128, 128, 128)),
        (1, 1, 0.5, (128, 128, 128)),
    ],
)
def test_transfer_functions(primaries: int, transfer: int, code: float, expected: tuple[int, ...]) -> None:
    codes = np.full((2, 3, 3), round(65535 * code), np.uint16)
    got = to_srgb(codes, coding_of(primaries, transfer))
    assert np.abs(got[1, 2].astype(int) - expected).max() <= 1


@pytest.mark.parametrize("primaries", [BT2020, DISPLAY_P3, DCI_P3])
def test_srgb_comes_back_from_wider_gamuts(primaries: Primaries) -> None:
    """White, grey and the primaries of sRGB, brought to a wider gamut by its published matrix, are what they were."""
    wanted = np.array([(255, 255, 255), (128, 128, 128), (255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 30, 90)])
    light = srgb_linear(wanted / 255) @ np.linalg.inv(matrix_to_bt709(primaries)).T
    codes = np.round(65535 * srgb_coded(light.clip(0, 1))).astype(np.uint16)
    assert np.abs(to_srgb(codes[None], ColourCoding(primaries))[0].astype(int) - wanted).max() <= 1
    if primaries == BT2020:  # ITU-R BT.2087
        published = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
        assert np.abs(matrix_to_bt709(primaries) - published).max() < 2e-4


# Modes ---------------------------------------------------------------------------------------------------------------


def test_all_modes_come_out_as_rgb() -> None:
    """Bits, grey, palettes, CMYK and 16 bits, on white where they are transparent, without their hidden colour."""
    grey = Image.new("L", (4, 4), 100)
    clear = Image.new("RGBA", (4, 4), (0, 0, 255, 0))
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    for image, kind, expected in [
        (Image.new("1", (4, 4), 1), "PNG", (255, 255, 255)),
        (grey, "PNG", (100, 100, 100)),
        (Image.merge("LA", (grey, Image.new("L", (4, 4), 0))), "PNG", (255, 255, 255)),
        (clear, "PNG", (255, 255, 255)),
        (clear, "TIFF", (255, 255, 255)),
        (half, "PNG", (127, 127, 127)),
        (palette, "PNG", (10, 20, 30)),
        (palette, "GIF", (10, 20, 30)),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
        (Image.new("CMYK", (4, 4), (0, 0, 0, 0)), "TIFF", (255, 255, 255)),
        (Image.fromarray(np.full((4, 4), 25700, np.uint16)), "PNG", (100, 100, 100)),
        (Image.fromarray(np.full((4, 4), 25700, np.uint16)), "TIFF", (100, 100, 100)),
        (Image.fromarray(np.full((4, 4), 25700, np.uint16)), "PPM", (100, 100, 100)),
    ]:
        assert colour(saved(image, kind)) == list(expected), (image.mode, kind)
        got = upright_srgb(image)
        assert (got.mode, got.getpixel((0, 0))) == ("RGB", expected), image.mode
    assert colour(saved(palette, "PNG", transparency=1)) == [255, 255, 255]
    jpeg = colour(saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(np.subtract(jpeg, (255, 0, 0))).max() <= 4
    deep = np.full((2, 2, 3), 25700)
    assert colour(png(deep, 2)) == [100, 100, 100]
    assert colour(png(deep, 2, (b"tRNS", struct.pack(">3H", 25700, 25700, 25700)))) == [255, 255, 255]
    assert colour(png(deep[..., 0], 0, (b"tRNS", struct.pack(">H", 25700)))) == [255, 255, 255]


@pytest.mark.parametrize(("kind", "said"), [(np.int32, "32 bit"), (np.float32, "floating point")])
def test_pixels_of_32_bits_are_refused(kind: Any, said: str) -> None:
    image = Image.fromarray(np.zeros((4, 4), kind))
    for call in (lambda: upright_srgb(image), lambda: read(saved(image, "TIFF"))):
        with pytest.raises(MediaError, match=f"has pixels of {said}: expected 8 or 16 bit"):
            call()


# Animations ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "AVIF", "GIF"])
def test_animations(kind: str) -> None:
    """Frames with their durations; what is clear is white, and its hidden colour does not show."""
    opaque = [Image.new("RGBA", (32, 32), (level, level, level, 255)) for level in (0, 90, 180)]
    for frame in opaque:
        frame.paste((200, 0, 0, 0), (16, 0, 32, 32))
    settings = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}, "GIF": {"disposal": 2}}.get(kind, {})
    file = saved(opaque[0], kind, save_all=True, append_images=opaque[1:], duration=[100, 200, 150], **settings)
    picture = Picture(file, ANY_SIZE)
    assert (picture.frames, picture.size) == (3, (32, 32))
    assert picture.durations() == pytest.approx([0.1, 0.2, 0.15])
    frames = list(picture.sequence())
    assert [int(frame[16, 8, 1]) for frame in frames] == pytest.approx([0, 90, 180], abs=3)
    assert all(frame[16, 24].min() >= 252 for frame in frames)
    assert np.array_equal(picture.still(), frames[0])


def test_several_pictures_in_a_file_are_no_animation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of the pages of a TIFF, and the pictures of a phone's JPEG (MPO), the first is meant; of pages, that is said."""
    pages = [Image.new("RGB", (8, 8), (level, 0, 0)) for level in (10, 200)]
    for kind in ("TIFF", "MPO"):
        picture = Picture(saved(pages[0], kind, save_all=True, append_images=pages[1:]), ANY_SIZE)
        assert picture.frames == 1
        assert picture.still()[0, 0, 0] == pytest.approx(10, abs=2)
    path = tmp_path / "a.tif"
    pages[0].copy().save(path, save_all=True, append_images=[pages[1].copy()])
    for read_file in (load_image, read_frames):
        caplog.clear()
        read_file(path)
        assert caplog.messages == [f"{path} has several pages: the first one is taken"]


def test_the_first_frame_of_an_animation_is_said_to_be_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("L", (8, 8), level) for level in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif").getpixel((0, 0)) == (10, 10, 10)
    assert caplog.messages == [f"{tmp_path / 'a.gif'} is an animation of 2 frames: the first one is taken"]


# Bounds --------------------------------------------------------------------------------------------------------------


def test_budget() -> None:
    """Pixels times frames are bounded before any are read."""
    frames = [Image.new("L", (500, 400), 20 * level) for level in range(12)]
    many = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    for file, said in [
        (saved(Image.new("L", (2000, 1000)), "PNG"), "has 2000x1000 pixels: expected at most 1000000 in all"),
        (many, "has 6 frames or more of 500x400 pixels: expected at most 1000000 in all (NOVA_MAX_PIXELS)"),
    ]:
        with pytest.raises(MediaError) as caught:
            Picture(file, 1_000_000)
        assert str(caught.value).startswith(said)
        Picture(file, 2_400_000)


@pytest.mark.parametrize(("kind", "said"), [("GIF", "3 frames or more"), ("PNG", "4 frames"), ("WEBP", "4 frames")])
def test_frames_are_bounded(kind: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few their pixels are: many small ones take long to go through."""
    frames = [Image.new("L", (8, 8), 60 * level) for level in range(4)]
    file = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    monkeypatch.setattr("nova_video.io.pictures.MOST_FRAMES", 4)
    assert Picture(file, ANY_SIZE).frames == 4
    monkeypatch.setattr("nova_video.io.pictures.MOST_FRAMES", 2)
    with pytest.raises(MediaError, match=f"^has {said}: expected at most 2$"):
        Picture(file, ANY_SIZE)


def test_large_pictures_are_reduced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's own bound, which is of the process, neither stops them nor is changed."""
    monkeypatch.setattr("nova_video.io.pictures.LARGE", 30_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.linear_gradient("L").resize((401, 301)).save(tmp_path / "large.png")
    with (tmp_path / "large.png").open("rb") as file:
        picture = Picture(file, ANY_SIZE)
        assert picture.size == (101, 134)
        assert picture.still().shape == (*picture.size, 3)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "is EPS or PostScript: expected a JPEG, PNG"),
        (b"%PDF-1.7\n", "is PDF: expected"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is HEIC or HEIF: expected"),
        (b"8BPS\0\1", "is a Photoshop file: expected"),
        (b"", "is damaged, or of no known format"),
        (b"\xd7\xcd\xc6\x9a\0\0", "is damaged, or of no known format"),  # WMF
    ],
)
def test_other_formats_are_named(data: bytes, said: str) -> None:
    with pytest.raises(MediaError) as caught:
        Picture(io.BytesIO(data), ANY_SIZE)
    assert str(caught.value).startswith(said)


def test_half_a_picture_is_an_error() -> None:
    whole = saved(Image.effect_noise((64, 64), 50), "PNG").getvalue()
    with pytest.raises(OSError, match="truncated"):
        read(io.BytesIO(whole[: len(whole) // 2]))
