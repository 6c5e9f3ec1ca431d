"""Pictures and names -> a prepared folder that `EmojiWorld` opens. Shared by the real art and the drawn shapes."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from nova_video.common.errors import InputError
from nova_video.io.motion import flow_magnitude
from nova_worlds.rendering.clips import SIZES
from nova_worlds.rendering.flow import SIZE_BUCKETS, MotionTable
from nova_worlds.rendering.lexicon import MOTIONS, PLAIN, SPEEDS, STILL
from nova_worlds.rendering.split import held_out_clips, held_out_pairs
from nova_worlds.rendering.world import ART, FORMAT, TILE, EmojiWorld, WorldInfo, to_uint8

VERSION = 1  # of the world: raised when the same art would give other clips
SCORE_CLIPS = 8  # measured per (motion, speed, size bucket)
SCORE_EVERY = 4  # of the pairs of frames of each
SCORE_SEED = 0


@dataclass(frozen=True)
class WorldPicture:
    """One object: its name and its art, RGBA of any size."""

    name: str
    group: str
    code_point: str
    art: Image.Image


def write_world(
    pictures: Sequence[WorldPicture], output: Path, set_name: str, art: str, score_clips: int
) -> EmojiWorld:
    """Write the prepared folder at once or not at all; returns the world as written, on the CPU.

    The motion table is measured on `score_clips` clips for every (motion, speed, size bucket).
    """
    if output.exists() and not (output / "world.json").exists() and (output.is_file() or any(output.iterdir())):
        raise InputError(f"{output} exists and is not a prepared world: name a new or empty folder")
    names = [picture.name for picture in pictures]
    tensors = {
        "atlas": torch.stack([_tile(picture.art) for picture in pictures]),
        "held_out_clips": held_out_clips(names),
        "held_out_pairs": held_out_pairs(names),
    }
    shape = (len(MOTIONS), len(SPEEDS), SIZE_BUCKETS)
    unmeasured = torch.zeros(shape).tolist()
    info = WorldInfo(
        set=set_name,
        version=VERSION,
        art=art,
        names=names,
        groups=[picture.group for picture in pictures],
        code_points=[picture.code_point for picture in pictures],
        motion_mean=unmeasured,
        motion_std=unmeasured,
    )
    with _new_folder(output) as folder:
        table = measure_motion(EmojiWorld(info, tensors, "cpu"), score_clips)
        content = {"format": FORMAT, **asdict(info)}
        content["motion_mean"] = [[[round(v, 4) for v in row] for row in rows] for rows in table.mean.tolist()]
        content["motion_std"] = [[[round(v, 4) for v in row] for row in rows] for rows in table.std.tolist()]
        (folder / "world.json").write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        (folder / "atlas.safetensors").write_bytes(save(tensors))
    return EmojiWorld.load(output, "cpu")


def measure_motion(world: EmojiWorld, clips: int) -> MotionTable:
    """The mean optical flow of `clips` random clips for every (motion, speed, size bucket), and its spread."""
    generator = torch.Generator().manual_seed(SCORE_SEED)
    low, high = SIZES
    mean = torch.zeros(len(MOTIONS), len(SPEEDS), SIZE_BUCKETS)
    std = torch.zeros_like(mean)
    for motion in range(len(MOTIONS)):
        for bucket in range(SIZE_BUCKETS):
            base = world.sample(clips, generator)
            part = (bucket + torch.rand(clips, generator=generator)) / SIZE_BUCKETS
            base = replace(base, motion=torch.full_like(base.motion, motion), size=low + (high - low) * part)
            base = base.select(torch.arange(clips).repeat(len(SPEEDS)))  # the same clips at every speed
            speed = torch.arange(len(SPEEDS)).repeat_interleave(clips)
            spec = replace(base, speed=torch.full_like(speed, PLAIN) if motion == STILL else speed)
            frames = to_uint8(world.render(spec)).numpy()
            scores = torch.tensor([flow_magnitude(clip, SCORE_EVERY) for clip in frames]).view(len(SPEEDS), clips)
            mean[motion, :, bucket], std[motion, :, bucket] = scores.mean(1), scores.std(1, correction=0)
    return MotionTable(mean, std)


def _tile(art: Image.Image) -> Tensor:
    """The art's bounding square, centred on a TILE with a clear margin: (4, TILE, TILE) uint8, premultiplied RGBA."""
    art = art.convert("RGBA")
    box = art.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox()
    if box is None:
        raise InputError("a picture is empty: every pixel is transparent")
    left, top, right, bottom = box
    side = max(right - left, bottom - top)
    square = Image.new("RGBA", (side, side))
    square.paste(art.crop(box), ((side - right + left) // 2, (side - bottom + top) // 2))
    # Resized premultiplied, so that no colour of transparent pixels bleeds in.
    small = np.asarray(square.convert("RGBa").resize((ART, ART), Image.Resampling.HAMMING))  # (ART, ART, 4)
    tile = np.zeros((TILE, TILE, 4), dtype=np.uint8)
    margin = (TILE - ART) // 2
    tile[margin : margin + ART, margin : margin + ART] = np.minimum(small, small[..., 3:])
    return torch.from_numpy(tile).permute(2, 0, 1).contiguous()


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `output` when all went well and vanishes when not."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise InputError(f"{output} is not writable: {error.strerror}") from error
    try:
        yield folder
        folder.chmod(0o755)
        if output.exists():
            shutil.rmtree(output)
        folder.rename(output)
    except OSError as error:
        raise InputError(f"{output} is not writable: {error.strerror}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
