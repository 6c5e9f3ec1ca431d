"""Checks of a transformer's config, whose values may come from a stranger's file."""

import re
from collections.abc import Sequence
from typing import Any

from nova_video.common.checks import check_number
from nova_video.common.errors import InputError
from nova_video.model.embeddings import TABLE_LEN

MAX_DEPTH, MAX_WIDTH = 1024, 65536  # of a config that is not a mistake


def parse_arch(name: str, kind: str) -> tuple[int, int]:
    """Depth and width of an `arch` entry such as `vit_d16w1024`; `kind` is vit or mlp."""
    match = re.fullmatch(rf"{kind}_d(\d{{1,6}})w(\d{{1,6}})", name)
    if match is None:
        raise InputError(f"arch entry {name!r}: expected {kind}_d<depth>w<width>, such as {kind}_d6w1024")
    depth, width = int(match[1]), int(match[2])
    check_number(f"the depth of arch entry {name!r}", depth, 1, high=MAX_DEPTH)
    check_number(f"the width of arch entry {name!r}", width, 1, high=MAX_WIDTH)
    if kind == "vit" and width % 32:
        raise InputError(f"the width of arch entry {name!r} is {width}: expected a multiple of 32, the width of a head")
    return depth, width


def parse_archs(arch: Sequence[str]) -> list[tuple[int, int]]:
    """Depth and width of the temporal encoder, the spatial encoder and the denoiser."""
    sizes = [parse_arch(name, kind) for name, kind in zip(arch, ("vit", "vit", "mlp"), strict=True)]
    if sizes[0][1] != sizes[1][1]:
        raise InputError(f"arch {arch[0]} and {arch[1]}: the two encoders need the same width")
    return sizes


def spatial_patch(image_stride: int) -> int:
    """The side of a token of the spatial encoder, in latents."""
    return 15 // image_stride + 1


def size_multiple(image_stride: int) -> int:
    """Pixels that a height and a width are multiples of: two tokens of the spatial encoder."""
    return 2 * spatial_patch(image_stride) * image_stride


def check_config(config: Any) -> None:
    """Raise InputError for the first value that is of another kind or out of bounds."""
    if config.text_token_dim in (None, 0):
        raise InputError(
            f"text_token_dim is {config.text_token_dim}: expected the width of text features; models that are"
            " class-conditional, without text, are not supported"
        )
    for name in ("image_dim", "image_stride", "text_token_dim"):
        check_number(name, getattr(config, name), 1, integer=True, high=MAX_WIDTH)
    check_number("text_token_len", config.text_token_len, 1, integer=True, high=TABLE_LEN)
    for name, length in (("image_size", 2), ("image_base_size", 2), ("video_base_size", 3)):
        value = getattr(config, name)
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != length:
            raise InputError(f"{name} is {value!r}: expected {length} whole numbers")
        for number in value:
            check_number(name, number, 1, integer=True)
    if config.video_mixer_rank is not None:
        check_number("video_mixer_rank", config.video_mixer_rank, -MAX_WIDTH, integer=True, high=MAX_WIDTH)
    if not isinstance(config.rotary_pos_embed, bool | None):
        raise InputError(f"rotary_pos_embed is {config.rotary_pos_embed!r}: expected true or false")
    arch = config.arch
    names = isinstance(arch, Sequence) and len(arch) == 3 and all(isinstance(name, str) for name in arch)
    if not names or isinstance(arch, str):
        raise InputError(f"arch is {arch!r}: expected three names, such as vit_d16w1024, vit_d32w1024, mlp_d6w1024")
