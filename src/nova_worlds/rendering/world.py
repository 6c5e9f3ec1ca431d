"""`EmojiWorld`: captioned clips of emoji in motion, rendered on the device as training goes.

A prepared folder holds `world.json` (names and where the art is from, the motion table) and `atlas.safetensors`
(the art, and what is held out). Clips are sampled as a `ClipSpec` (numbers only), then rendered by one `grid_sample`
per batch: a clip's frames are stacked into one tall canvas, and the grid says where on the art each pixel falls.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from nova_video.common.errors import InputError
from nova_video.text.vocabulary import Vocabulary
from nova_worlds.rendering.captions import (
    CLIP_WORDINGS,
    IMAGE_WORDINGS,
    PAIR_WORDINGS,
    caption_vocabulary,
    clip_caption,
    image_caption,
    pair_caption,
)
from nova_worlds.rendering.clips import CANVAS, PAIR_SIZES, SIZES, SPAN, ClipSpec, ObjectPath, object_path, pair_paths
from nova_worlds.rendering.flow import MotionTable
from nova_worlds.rendering.lexicon import BACKGROUNDS, COLORS, MOTIONS, PLAIN, RELATIONS, SPEEDS, STILL

FORMAT = 1
TILE = 80  # pixels, side of an object's tile in the atlas
ART = 76  # of them covered by the art's bounding square; the rest is a clear margin
MAIN_FORM = 0.5  # of training captions are in the main form
MIRROR = 0.5  # of the other wordings for two objects are told from the second
# Frames rendered at a time: bounds the memory on a GPU (512 clips, about 3 GB); a CPU is quicker in small pieces.
GPU_FRAMES, CPU_FRAMES = 8704, 68

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class WorldInfo:
    """The contents of `world.json`."""

    set: str
    """core, all or shapes."""
    version: int
    art: str
    """Where the art is from, and its licence."""
    names: list[str]
    groups: list[str]
    """Per name."""
    code_points: list[str]
    """Per name."""
    motion_mean: list[list[list[float]]]
    """(motion, speed, size bucket), pixels a frame."""
    motion_std: list[list[list[float]]]


class EmojiWorld:
    """A prepared world with its tensors on a device. Holds no state beyond them: randomness is handed in."""

    def __init__(self, info: WorldInfo, tensors: dict[str, Tensor], device: torch.device | str) -> None:
        self.info = info
        self.tensors = tensors
        self.device = torch.device(device)
        self.names = info.names
        self.atlas = tensors["atlas"].to(self.device).float() / 255  # (objects, 4, TILE, TILE), premultiplied RGBA
        self.held_out_clips = tensors["held_out_clips"].to(self.device).bool()  # (objects, motions, backgrounds)
        self.held_out_pairs = tensors["held_out_pairs"].to(self.device).bool()  # (objects, relations, objects)
        self.motion_table = MotionTable(torch.tensor(info.motion_mean), torch.tensor(info.motion_std)).to(self.device)
        self.colors = torch.tensor(list(BACKGROUNDS.values()), device=self.device).float() / 255  # (backgrounds, 3)
        distinct = ~torch.eye(len(self.names), dtype=torch.bool, device=self.device)[:, None]
        # Flat indices of what each split may show, so sampling is one random integer per clip.
        self._clips = {"train": _indices(~self.held_out_clips), "heldout": _indices(self.held_out_clips)}
        stills = self.held_out_clips[:, STILL]  # (objects, backgrounds)
        self._images = {"train": _indices(~stills), "heldout": _indices(stills)}
        self._pairs = {
            "train": _indices(~self.held_out_pairs & distinct),
            "heldout": _indices(self.held_out_pairs & distinct),
        }

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> "EmojiWorld":
        folder = Path(folder)
        try:
            content = json.loads((folder / "world.json").read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise InputError(f"{folder}: prepared by another version, prepare it again")
            info = WorldInfo(**content)
            tensors = load_file(folder / "atlas.safetensors")
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{folder} is not a prepared world, as `nova data emoji` writes them: {error}") from error
        return cls(info, tensors, device)

    def to(self, device: torch.device | str) -> "EmojiWorld":
        """This world on another device."""
        return EmojiWorld(self.info, self.tensors, device)

    def __len__(self) -> int:
        return len(self.names)

    def sample(
        self,
        count: int,
        generator: torch.Generator,
        *,
        num_frames: int = SPAN,
        split: Split = "train",
        images: bool = False,
        pairs: float = 0.0,
        weights: Tensor | None = None,
    ) -> ClipSpec:
        """`count` clips of one split, every allowed (object, motion, background) equally likely.

        `weights`, one a motion, make the clips of some motions likelier than those of others.

        With `images`, single frames of still objects, a share `pairs` of them (on average) of two objects.
        `generator` lives on the world's device.
        """
        device = self.device
        if images:
            num_frames = 1
            picks = _pick(self._images[split], count, generator)
            thing, color = picks // len(COLORS), picks % len(COLORS)
            motion = torch.full_like(thing, STILL)
        else:
            picks = _pick(self._clips[split], count, generator, None if weights is None else weights.to(device))
            thing, color = picks // (len(MOTIONS) * len(COLORS)), picks % len(COLORS)
            motion = picks // len(COLORS) % len(MOTIONS)
        fast = torch.rand(count, generator=generator, device=device)  # a quarter slowly, half plain, a quarter quickly
        speed = 1 + (fast >= 0.75).long() - (fast < 0.25).long()
        speed = torch.where(motion == STILL, PLAIN, speed)
        size = _between(SIZES, count, generator)
        second_size = _between(PAIR_SIZES, count, generator)
        second = torch.full_like(thing, -1)
        relation = torch.full_like(thing, -1)
        if images and pairs > 0:
            paired = torch.rand(count, generator=generator, device=device) < pairs
            picks = _pick(self._pairs[split], count, generator)
            first = picks // (len(RELATIONS) * len(self.names))
            thing = torch.where(paired, first, thing)
            second = torch.where(paired, picks % len(self.names), second)
            relation = torch.where(paired, picks // len(self.names) % len(RELATIONS), relation)
            size = torch.where(paired, _between(PAIR_SIZES, count, generator), size)
            color = torch.where(paired, torch.randint(len(COLORS), (count,), generator=generator, device=device), color)
        return ClipSpec(
            num_frames=num_frames,
            has_pairs=images and pairs > 0,
            object=thing,
            background=color,
            motion=motion,
            speed=speed,
            size=size,
            place=torch.rand(count, 2, generator=generator, device=device),
            phase=torch.rand(count, generator=generator, device=device),
            second=second,
            relation=relation,
            second_size=second_size,
            second_place=torch.rand(count, 2, generator=generator, device=device),
        )

    def render(self, spec: ClipSpec) -> Tensor:
        """(N, 3, F, CANVAS, CANVAS) in [-1, 1]."""
        chunk = max(1, (CPU_FRAMES if self.device.type == "cpu" else GPU_FRAMES) // spec.num_frames)
        if len(spec) <= chunk:
            return self._render(spec)
        clips = torch.empty(len(spec), 3, spec.num_frames, CANVAS, CANVAS, device=self.device)
        for at in range(0, len(spec), chunk):
            clips[at : at + chunk] = self._render(spec.select(slice(at, at + chunk)))
        return clips

    def _render(self, spec: ClipSpec) -> Tensor:
        canvas = self.colors[spec.background][:, :, None, None, None]  # (N, 3, 1, 1, 1)
        path = object_path(spec)
        if spec.has_pairs:
            first, second = pair_paths(spec)
            paired = spec.second >= 0
            path = ObjectPath(
                torch.where(paired[:, None, None], first.centre, path.centre),
                torch.where(paired[:, None], first.size, path.size),
                path.angle,
            )
            layer = self.place(spec.second.clamp(min=0), second) * paired.view(-1, 1, 1, 1, 1)
            canvas = layer[:, :3] + canvas * (1 - layer[:, 3:])
        layer = self.place(spec.object, path)  # (N, 4, F, H, W)
        return (layer[:, :3] + canvas * (1 - layer[:, 3:])) * 2 - 1

    def place(self, index: Tensor, path: ObjectPath) -> Tensor:
        """Objects `index` (N,) along their paths, on a clear canvas: (N, 4, F, CANVAS, CANVAS), premultiplied."""
        N, frames = path.size.shape
        pixel = torch.arange(CANVAS, device=self.device) + 0.5
        scale = 2 * ART / TILE / path.size  # (N, F): a pixel's step on the tile, which spans -1 to 1
        cos, sin = scale * path.angle.cos(), scale * path.angle.sin()
        # The tile coordinates of a pixel: turned back by the angle. Affine in the pixel's x and y.
        dx = pixel - path.centre[..., :1]  # (N, F, W)
        dy = pixel - path.centre[..., 1:]  # (N, F, H)
        u = (cos[..., None] * dx)[:, :, None, :] + (sin[..., None] * dy)[:, :, :, None]  # (N, F, H, W)
        v = (cos[..., None] * dy)[:, :, :, None] - (sin[..., None] * dx)[:, :, None, :]
        grid = torch.stack((u, v), dim=-1).view(N, frames * CANVAS, CANVAS, 2)
        tiles = F.grid_sample(self.atlas[index], grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return tiles.view(N, 4, frames, CANVAS, CANVAS)

    def captions(self, spec: ClipSpec, rng: random.Random | None = None) -> list[str]:
        """One caption per clip, in the main form. With `rng`, half of them have a random other wording.

        Single frames are told as images, which have no motion.
        """
        columns = (spec.object, spec.background, spec.motion, spec.speed, spec.second, spec.relation)
        captions = []
        for thing, color, motion, speed, second, relation in torch.stack(columns).T.tolist():
            main = rng is None or rng.random() < MAIN_FORM
            name, backdrop = self.names[thing], COLORS[color]
            if second >= 0:
                wording = 0 if main or rng is None else rng.randrange(len(PAIR_WORDINGS))
                mirrored = not main and rng is not None and rng.random() < MIRROR
                relation_word = RELATIONS[relation]
                caption = pair_caption(name, relation_word, self.names[second], backdrop, wording, mirrored)
            elif spec.num_frames == 1:
                wording = 0 if main or rng is None else rng.randrange(1, len(IMAGE_WORDINGS))
                caption = image_caption(name, backdrop, wording)
            else:
                wording = 0 if main or rng is None else rng.randrange(1, len(CLIP_WORDINGS))
                caption = clip_caption(name, MOTIONS[motion], SPEEDS[speed], backdrop, wording)
            captions.append(caption)
        return captions

    def vocabulary(self, frames: Sequence[int], pairs: bool) -> Vocabulary:
        """The words of captions of clips of these lengths (1: pictures), with pictures of two objects or without."""
        groups: dict[str, list[str]] = {}
        for name, group in zip(self.names, self.info.groups, strict=True):
            groups.setdefault(group, []).append(name)
        return caption_vocabulary(groups, clips=max(frames) > 1, pictures=1 in frames, pairs=pairs and 1 in frames)

    def motion_scores(self, spec: ClipSpec) -> Tensor:
        """(N,) mean optical flow in pixels a frame, from the table; nothing moves in an image."""
        if spec.num_frames == 1:
            return torch.zeros(len(spec), device=self.device)
        return self.motion_table.lookup(spec.motion, spec.speed, spec.size)


def to_uint8(clips: Tensor) -> Tensor:
    """Clips as rendered (N, 3, F, H, W) in [-1, 1] -> frames (N, F, H, W, 3) uint8."""
    return clips.clamp(-1, 1).add_(1).mul_(127.5).round_().to(torch.uint8).permute(0, 2, 3, 4, 1)


def _indices(flags: Tensor) -> Tensor:
    return flags.flatten().nonzero().flatten()


def _pick(allowed: Tensor, count: int, generator: torch.Generator, weights: Tensor | None = None) -> Tensor:
    """Random entries of `allowed`, flat indices (of clips, where there are weights for the motions)."""
    if weights is None:
        return allowed[torch.randint(len(allowed), (count,), generator=generator, device=allowed.device)]
    share = weights[allowed // len(COLORS) % len(MOTIONS)]
    return allowed[torch.multinomial(share, count, replacement=True, generator=generator)]


def _between(bounds: tuple[float, float], count: int, generator: torch.Generator) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(count, generator=generator, device=generator.device)
