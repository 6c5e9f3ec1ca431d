"""Runs one request inside ComfyUI: progress and previews go to its page, and its Cancel stops within one set."""

import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import comfy.model_management as memory
import folder_paths
import numpy as np
import torch
from comfy_api.latest import ComfyAPISync, InputImpl
from numpy.typing import NDArray
from PIL import Image

from nova_video import FrameReady, GenerateRequest, Generation, InputError, NovaPipeline, PartialFrame
from nova_video.io.decode import MediaFile
from nova_video.io.fragments import join_fragments
from nova_video.io.inputs import InputClip
from nova_video.io.media import LiveWriter
from nova_video.io.pixels import to_bytes

from .loaded import LoadedModel

PREVIEW_SECONDS = 0.25
"""The least time between two previews: each is decoded for the page alone."""

Frame = NDArray[np.float32]


def make_pictures(model: LoadedModel, request: Callable[[NovaPipeline], GenerateRequest], node: str | None) -> Any:
    """The pictures of a request as ComfyUI's IMAGE, (B, H, W, 3) in [0, 1], and the record of their making."""
    with model.on_device() as pipe:
        generation = pipe.start(request(pipe))
        [frame] = _frames(generation, node)
    pictures = frame[None] if frame.ndim == 3 else frame
    return torch.from_numpy(np.ascontiguousarray(pictures, np.float32)), _record(generation)


def make_video(model: LoadedModel, request: Callable[[NovaPipeline], GenerateRequest], node: str | None) -> Any:
    """The clip of a request as ComfyUI's VIDEO, and its record. Each frame goes to the file when it is final."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"nova_{uuid.uuid4().hex}.mp4"
    part = path.with_suffix(".part.mp4")
    try:
        with model.on_device() as pipe:
            generation = pipe.start(request(pipe))
            with LiveWriter(part, generation.plan.fps, {}) as writer:
                for frame in _frames(generation, node):
                    writer.write(to_bytes(frame))
        path.write_bytes(join_fragments(part.read_bytes(), (), generation.records[0]))
    finally:
        part.unlink(missing_ok=True)
    return InputImpl.VideoFromFile(str(path)), _record(generation)


def picture_of(image: torch.Tensor) -> Image.Image:
    """The one picture of ComfyUI's IMAGE."""
    if image.ndim != 4 or len(image) != 1:
        got = f"{len(image)} pictures" if image.ndim == 4 else f"a tensor {tuple(image.shape)}"
        raise InputError(f"image holds {got}: expected 1")
    return Image.fromarray(to_bytes(image[0].clamp(0, 1).float().cpu().numpy()))


def masks_of(mask: torch.Tensor) -> NDArray[np.float32]:
    """ComfyUI's MASK, (H, W) or (M, H, W), as masks (M, H, W)."""
    masks = mask[None] if mask.ndim == 2 else mask
    if masks.ndim != 3:
        raise InputError(f"mask is a tensor {tuple(mask.shape)}: expected (H, W) or (M, H, W)")
    return masks.clamp(0, 1).float().cpu().numpy()


def clip_of(video: Any) -> InputClip:
    """ComfyUI's VIDEO. A whole file stays a file; what was trimmed, cropped or made of frames is taken as frames."""
    source = video.get_stream_source()
    window = getattr(video, "get_active_trim_window", None)
    if isinstance(source, str) and window is not None and not any(window()):
        file = MediaFile(source)
        if sorted(file.size) == sorted(video.get_dimensions()):
            return InputClip(file)
    parts = video.get_components()
    frames = parts.images[..., :3].clamp(0, 1).float().cpu().numpy()
    return InputClip(to_bytes(frames), float(parts.frame_rate))


def _frames(generation: Generation, node: str | None) -> Iterator[Frame]:
    """The final frames; ComfyUI hears of every set, and may stop between any two."""
    api, total, done, shown = ComfyAPISync(), generation.total_steps, 0, 0.0

    def tell(picture: Any = None) -> None:
        preview = None if picture is None else Image.fromarray(to_bytes(picture if picture.ndim == 3 else picture[0]))
        api.execution.set_progress(done, total, node_id=node, preview_image=preview)

    with closing(generation.stream(preview=True)) as events:
        for event in events:
            memory.throw_exception_if_processing_interrupted()
            if isinstance(event, FrameReady):
                yield event.frame
                continue
            done = event.step + 1 if isinstance(event, PartialFrame) else done + 1
            due = time.monotonic() - shown >= PREVIEW_SECONDS
            shown = time.monotonic() if due else shown
            tell(event.frame if due else None)
    done = total
    tell()


def _record(generation: Generation) -> str:
    """How it was made, as JSON: the sentence, the seed, all settings, and words that the model does not know."""
    return json.dumps(generation.records[0], indent=1)
