"""The result of a call: `GenerateResult`, which can be saved to files and shows itself in a notebook."""

import base64
import io
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.utils import BaseOutput
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nova_video.common.errors import InputError
from nova_video.io import media
from nova_video.io.pixels import to_bytes

NUMBER = re.compile(r"%0?\d?d")
"""The place of a frame's number in a file name."""


@dataclass
class GenerateResult(BaseOutput):
    """The result of a call: `images` for one frame, else `frames`, with an entry for each picture or clip.

    As in diffusers, `result[0]` and the first entry of `result.to_tuple()` are the images or frames.
    """

    images: Any = None
    frames: Any = None
    fps: float | None = None
    """Rate the clips are meant to be shown at."""
    seeds: tuple[int, ...] = ()
    """Seeds of the generator, or of the generator of each picture."""
    stopped: bool = False
    """True if the callback ended the call early. Then these are the finished frames or a part of the first."""
    generation: Any = None
    """The `Generation` of a stopped call, to save or to continue."""
    records: list[dict[str, Any]] = field(default_factory=list, repr=False)
    """How each picture or clip was made; `save` writes it into the file."""

    def save(self, path: str | Path) -> list[Path]:
        """Write each picture or clip in the format of the path's extension, with its record; several are numbered.

        Returns the paths: whale.mp4, or whale-1.mp4, whale-2.mp4 and so on. A name such as frame-%03d.png makes a file
        of each frame of one clip: frame-001.png, frame-002.png and so on.
        """
        path, clips = Path(path).expanduser(), self._clips()
        if clips is None:
            raise InputError("output_type is 'latent': expected pil, np or pt, since latents cannot be saved as media")
        if (number := NUMBER.search(path.name)) is not None:
            return self._save_frames(path, number, clips)
        width = len(str(len(clips)))
        paths = [path.with_stem(f"{path.stem}-{number:0{width}d}") for number in range(1, len(clips) + 1)]
        paths = [path] if len(clips) == 1 else paths
        media.check_output(path)
        for index, (place, clip) in enumerate(zip(paths, clips, strict=True)):
            record = self.records[index] if index < len(self.records) else {"seed": self.seeds[index % len(self.seeds)]}
            media.write_media(clip, place, self.fps or 1, record)
        return paths

    def _save_frames(self, path: Path, number: re.Match[str], clips: list[NDArray[np.uint8]]) -> list[Path]:
        """Write each frame of one clip as a picture; `number` is where its number is in the name."""
        if len(clips) > 1:
            raise InputError(
                f"got {path.name} for {len(clips)} clips: expected a name without {number[0]}, or one clip"
            )
        before, after = path.name[: number.start()], path.name[number.end() :]
        paths = [path.with_name(f"{before}{number[0] % index}{after}") for index in range(1, len(clips[0]) + 1)]
        media.check_output(path)
        for place, frame in zip(paths, clips[0], strict=True):
            media.write_media(frame[None], place, 1, self.records[0] if self.records else {"seed": self.seeds[0]})
        return paths

    def _clips(self) -> list[NDArray[np.uint8]] | None:
        """(F, H, W, 3) of each picture or clip; None of latents."""
        made = self.images if self.frames is None else self.frames
        if isinstance(made, Tensor):
            if made.shape[-3] != 3:  # (B, C, F, h, w)
                return None
            made = made.movedim(-3, -1).cpu().numpy()
        clips = [np.stack([np.asarray(frame) for frame in _frames_of(each)]) for each in made]
        return [to_bytes(clip) for clip in clips]

    def _repr_html_(self) -> str | None:
        """Pictures and clips for a notebook, as data inside the page."""
        clips = self._clips()
        if clips is None:
            return None
        return " ".join(_as_html(clip, self.fps or 1) for clip in clips)


def _frames_of(entry: Any) -> Any:
    """The frames of a clip, or a picture as the only one of its own."""
    return [entry] if isinstance(entry, Image.Image) or getattr(entry, "ndim", 4) == 3 else entry


def _as_html(clip: NDArray[np.uint8], fps: float) -> str:
    if len(clip) == 1:
        buffer = io.BytesIO()
        Image.fromarray(clip[0]).save(buffer, format="PNG")
        return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        media.write_media(clip, path, fps, {})
        data = base64.b64encode(path.read_bytes()).decode()
    return f'<video controls loop autoplay muted src="data:video/mp4;base64,{data}"></video>'
