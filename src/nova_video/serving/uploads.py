"""Checks of uploaded pictures and clips by what their headers say, before anything is decoded."""

import io

import av

from nova_video.common.checks import max_pixels
from nova_video.common.errors import InputError, MediaError, first_line
from nova_video.io.decode import open_media
from nova_video.serving.serve_settings import ServeSettings


def check_upload(name: str, data: bytes, settings: ServeSettings, still: bool = False) -> None:
    """Refuses an upload that is no picture or clip, or has more pixels or frames than the settings allow.

    `name` is what the caller names it, `image`, `video` or `mask_image`; `still` takes pictures of one frame alone.
    """
    try:
        media = open_media(
            io.BytesIO(data), limit=min(settings.max_pixels * (1 if still else settings.max_frames), max_pixels())
        )
        try:
            if media.picture is not None:
                (height, width), frames = media.picture.whole_size, media.picture.frames
            else:
                assert media.video is not None
                context = media.video.stream.codec_context
                height, width, frames = context.height, context.width, len(media.times())
        finally:
            media.close()
    except MediaError as error:
        raise InputError(f"{name} {_as_sentence(str(error))}") from None
    except (OSError, ValueError, ArithmeticError, av.FFmpegError, SyntaxError, EOFError) as error:
        raise InputError(f"{name} cannot be read: {first_line(error)}") from None
    if still and frames > 1:
        raise InputError(f"{name} has {frames} frames: expected a picture of one")
    if frames < 1:
        raise InputError(f"{name} has no frames: expected at least one")
    if width * height > settings.max_pixels:
        raise InputError(f"{name} has {width}x{height} pixels: expected at most {settings.max_pixels:,} in a frame")
    if frames > settings.max_frames:
        raise InputError(f"{name} has {frames:,} frames: expected at most {settings.max_frames:,}")


def _as_sentence(said: str) -> str:
    """The words of a decoder about a file, to stand behind its name."""
    said = said.replace(" (NOVA_MAX_PIXELS)", "")
    return f"cannot be read: {said}" if said.startswith(("its ", "cannot ", "breaks ")) else said
