"""Latent frames to pixels, piece by piece, with given pixels put back in their place.

Legend: B clips, T pixel frames, C latent channels, h w latent grid, H W pixels.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nova_video.autoencoders import StreamDecoder, adapt, unscale_latents
from nova_video.common.errors import InputError
from nova_video.io.pixels import output_form, unit_frames
from nova_video.model.finite import first_not_finite
from nova_video.pipeline.call_parts import Parts
from nova_video.pipeline.progress import RequestProgress
from nova_video.sampling.stopwatch import span


class FrameDecoder:
    """Decodes latent frames for one consumer of a request, from the frame that it has not handed out yet."""

    def __init__(self, parts: Parts, progress: RequestProgress) -> None:
        plan, state = progress.plan, progress.state
        vae = adapt(parts.decoding_vae(plan.compile))
        self.parts, self.progress, self.vae = parts, progress, vae
        self.pushed = 0 if vae.decodes_whole_clips else untouched_latents(progress)
        """Latent frames that went in."""
        while plan.first_pixel(self.pushed + vae.decode_piece(self.pushed)) <= progress.emitted:
            self.pushed += vae.decode_piece(self.pushed)
        before = range(max(self.pushed - vae.decode_context, 0), self.pushed)
        scaled = [unscale_latents(vae.vae, state.frames[frame].to(vae.dtype)) for frame in before]
        self.pieces = StreamDecoder(vae, scaled, decoded=self.pushed)
        self.first_pixel = plan.first_pixel(self.pushed)
        """The first pixel frame of the next piece."""

    @property
    def first_needed(self) -> int:
        """First latent frame that is needed to go on from here, in another process too."""
        return self.pushed - self.pieces.needs

    def push(self, stop: int) -> Iterator[Tensor]:
        """Decode latent frames up to `stop` -> pieces (B, T, 3, H, W) in [0, 1], given pixels put back."""
        while self.pushed < stop:
            latents = self.progress.state.frames[self.pushed]
            self.pushed += 1
            with span(self.parts.stopwatch, "vae"):
                made = self.pieces.push(unscale_latents(self.vae.vae, latents.to(self.vae.dtype)))
            for piece in made:
                yield self._final(piece)

    def finish(self) -> Iterator[Tensor]:
        """No more latent frames come: decode those that had waited for a whole piece."""
        with span(self.parts.stopwatch, "vae"):
            made = self.pieces.finish()
        for piece in made:
            yield self._final(piece)

    def _final(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W) of a piece -> those of its frames that are part of the clip and not handed out."""
        first, progress = self.first_pixel, self.progress
        self.first_pixel += pixels.shape[2]
        frames = unit_pixels(self.vae.vae, pixels)
        if progress.given is not None:
            frames = progress.given.over(frames, first)
        last = self.first_pixel if progress.plan.num_frames is None else progress.plan.num_frames
        return frames[:, max(progress.emitted - first, 0) : max(last - first, 0)]


def untouched_latents(progress: RequestProgress) -> int:
    """Number of leading latent frames that need no decoding, since their pixels were given and stay."""
    plan = progress.plan
    if progress.given is None or plan.edits:
        return 0
    return (plan.given_frames - plan.offset - 1) // plan.temporal_stride + 1


def untouched_pixels(progress: RequestProgress) -> list[Tensor]:
    """Given frames that come back without decoding and were not handed out yet: one piece or none."""
    plan = progress.plan
    if progress.given is None or plan.edits or progress.emitted >= plan.given_frames:
        return []
    given = progress.given.part(progress.emitted, plan.given_frames, progress.state.batch)
    return [given.to(progress.state.random.device)]  # where the others will be


def unit_pixels(vae: Any, pixels: Tensor) -> Tensor:
    """The autoencoder's pixels (B, 3, T, H, W) -> (B, T, 3, H, W) in [0, 1]; InputError if some are not finite."""
    if not bool(pixels.isfinite().all()):  # they would be black
        name = first_not_finite(vae)
        cause = "a smaller scale, or another precision such as float32" if name is None else "finite weights"
        known = "" if name is None else f", but its {name} is not"
        raise InputError(f"the autoencoder's pixels are not finite: expected {cause}{known}")
    return unit_frames(pixels)


@torch.no_grad()
def picture_of(parts: Parts, latents: Tensor, output_type: str) -> Any:
    """Latents (B, C, h, w) decoded by themselves, one entry a clip ("pt" for output_type "latent")."""
    frames = unit_pixels(parts.vae, parts.decode_picture(latents).unsqueeze(2))
    made = output_form(frames, "pt" if output_type == "latent" else output_type)
    return [clip[0] for clip in made] if isinstance(made, list) else made[:, 0]


@torch.no_grad()
def check_frames(parts: Parts, progress: RequestProgress) -> None:
    """Raises InputError if a saved state lacks a finished frame that is not decoded yet."""
    if progress.output_type == "latent" or parts.vae is None:
        return
    try:
        first = FrameDecoder(parts, progress).pushed
    except KeyError as error:
        raise InputError(f"it lacks the latent frame {error}, which is needed to decode later ones") from None
    missing = [frame for frame in range(first, progress.state.done) if frame not in progress.state.frames]
    if missing:
        raise InputError(f"it lacks the latent frame {missing[0]}, which is not decoded yet: expected it")
