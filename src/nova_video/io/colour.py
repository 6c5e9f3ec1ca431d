"""Colours of any coding to sRGB: wide gamuts (BT.2020, P3), other gammas, and HDR (PQ and HLG).

Code points are those of ITU-T H.273, as video streams, AVIF and PNG (cICP) name them. SDR codes of BT.709 and BT.601
are taken for sRGB codes, as players do. HDR is mapped directly (ITU-R BT.2408): diffuse white, 203 nits, becomes 255,
and brighter light is clipped to it. Legend: H W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

from nova_video.common.errors import MediaError

SDR_WHITE = 203.0  # nits of diffuse white in HDR, by ITU-R BT.2408
HLG_PEAK = 1000.0  # nits of the display that HLG is rendered for
STRIP = 2**20  # pixels that are converted at a time

Primaries = tuple[tuple[float, float], tuple[float, float], tuple[float, float], tuple[float, float]]
"""Chromaticities (x, y) of white, red, green and blue."""
D65 = (0.3127, 0.3290)
BT709: Primaries = (D65, (0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
BT2020: Primaries = (D65, (0.708, 0.292), (0.170, 0.797), (0.131, 0.046))
DISPLAY_P3: Primaries = (D65, (0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
DCI_P3: Primaries = ((0.314, 0.351), *DISPLAY_P3[1:])
WIDE: dict[int, Primaries] = {9: BT2020, 11: DCI_P3, 12: DISPLAY_P3}
NEAR_BT709 = (0, 1, 2, 3, 4, 5, 6, 7, 22)  # unnamed, or so near that players make no difference
SDR_TRANSFERS = (0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 14, 15)
LINEAR, PQ, HLG = 8, 16, 18
TRANSFER_NAMES = {9: "log100", 10: "log316", PQ: "smpte2084", 17: "smpte428", HLG: "arib-std-b67"}
PRIMARIES_NAMES = {8: "film", 10: "smpte428"}


@dataclass(frozen=True)
class ColourCoding:
    """How the RGB values of a picture are to be understood."""

    primaries: Primaries = BT709
    transfer: int = 13
    """Code point of the transfer function."""
    gamma: float | None = None
    """Exponent that linear light was coded with, in place of `transfer`: 0.45455 in most PNG files that name one."""

    @property
    def is_srgb(self) -> bool:
        sdr = self.transfer in SDR_TRANSFERS if self.gamma is None else abs(self.gamma - 1 / 2.2) < 0.005
        return sdr and self.primaries == BT709

    @property
    def is_hdr(self) -> bool:
        return self.gamma is None and self.transfer in (PQ, HLG)


def coding_of(primaries: int, transfer: int) -> ColourCoding:
    """The coding of two H.273 code points. MediaError names what cannot be converted."""
    if transfer not in (*SDR_TRANSFERS, LINEAR, PQ, HLG):
        name = TRANSFER_NAMES.get(transfer, str(transfer))
        raise MediaError(f"has the transfer function {name}: expected SDR, PQ (smpte2084) or HLG (arib-std-b67)")
    if primaries not in (*NEAR_BT709, *WIDE):
        name = PRIMARIES_NAMES.get(primaries, str(primaries))
        raise MediaError(f"has the colour primaries {name}: expected BT.709, BT.601, BT.2020 or P3")
    if transfer in (PQ, HLG) and primaries in (0, 2, 3):
        return ColourCoding(BT2020, transfer)  # what HDR is mastered in
    return ColourCoding(WIDE.get(primaries, BT709), transfer)


def to_srgb(codes: NDArray[np.uint8] | NDArray[np.uint16], coding: ColourCoding) -> NDArray[np.uint8]:
    """Values (H, W, 3) of 8 or 16 bits in any coding -> sRGB bytes (H, W, 3)."""
    height, width = codes.shape[:2]
    out = np.empty((height, width, 3), np.uint8)
    rows = max(1, STRIP // width)
    matrix = matrix_to_bt709(coding.primaries)
    for top in range(0, height, rows):
        light = _linear(codes[top : top + rows], coding) @ matrix.T
        np.clip(light, 0, 1, out=light)
        out[top : top + rows] = _srgb_table()[(light * 65535 + 0.5).astype(np.uint16)]
    return out


def _linear(codes: NDArray[np.uint8] | NDArray[np.uint16], coding: ColourCoding) -> NDArray[np.float32]:
    """Linear light in which 1 is the white of SDR."""
    light = _linear_table(codes.dtype.itemsize, coding.transfer, coding.gamma)[codes]
    if coding.gamma is None and coding.transfer == HLG:  # from the scene to a display: its gamma acts on luminance
        luminance = light @ _xyz_from_rgb(coding.primaries)[1].astype(np.float32)
        light = light * (HLG_PEAK / SDR_WHITE * luminance**0.2)[..., None]
    return light


@lru_cache(8)
def _linear_table(size: int, transfer: int, gamma: float | None) -> NDArray[np.float32]:
    values = np.linspace(0, 1, 256**size)
    curves: dict[int, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
        LINEAR: lambda value: value,
        PQ: lambda value: pq_nits(value) / SDR_WHITE,
        HLG: hlg_scene,
    }
    light = values ** (1 / gamma) if gamma is not None else curves.get(transfer, srgb_linear)(values)
    return np.asarray(light, np.float32)


@cache
def _srgb_table() -> NDArray[np.uint8]:
    return np.asarray(np.round(255 * srgb_coded(np.linspace(0, 1, 65536))), np.uint8)


def srgb_linear(value: NDArray[np.float64]) -> NDArray[np.float64]:
    """sRGB codes in [0, 1] -> linear light (IEC 61966-2-1)."""
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def srgb_coded(light: NDArray[np.float64]) -> NDArray[np.float64]:
    """Linear light in [0, 1] -> sRGB codes."""
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def pq_nits(value: NDArray[np.float64]) -> NDArray[np.float64]:
    """PQ codes in [0, 1] -> nits (SMPTE ST 2084)."""
    root = value ** (1 / 78.84375)
    return 10000 * (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)


def hlg_scene(value: NDArray[np.float64]) -> NDArray[np.float64]:
    """HLG codes in [0, 1] -> light of the scene in [0, 1] (ITU-R BT.2100)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(value <= 0.5, value**2 / 3, (np.exp((value - c) / a) + b) / 12)


@lru_cache(64)
def matrix_to_bt709(primaries: Primaries) -> NDArray[np.float32]:
    """Linear RGB of some primaries -> linear RGB of BT.709, (3, 3); white stays white (Bradford)."""
    if primaries == BT709:
        return np.eye(3, dtype=np.float32)
    cones = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    ratio = (cones @ _xyz(BT709[0])) / (cones @ _xyz(primaries[0]))
    adapted = np.linalg.inv(cones) @ np.diag(ratio) @ cones
    return np.asarray(np.linalg.inv(_xyz_from_rgb(BT709)) @ adapted @ _xyz_from_rgb(primaries), np.float32)


def _xyz_from_rgb(primaries: Primaries) -> NDArray[np.float64]:
    white, *colours = primaries
    columns = np.stack([_xyz(colour) for colour in colours], axis=1)
    return np.asarray(columns * np.linalg.solve(columns, _xyz(white)))


def _xyz(chromaticity: tuple[float, float]) -> NDArray[np.float64]:
    x, y = chromaticity
    return np.array([x / y, 1, (1 - x - y) / y])
