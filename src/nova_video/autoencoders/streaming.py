"""A clip's latent frames in, one by one; its pixels out as soon as nothing that follows can change them.

What is decoded in pieces is what `decode` gives for the whole clip: each piece is decoded behind the few latent frames
that its pixels depend on, and only those are kept, so a clip of any length takes the memory of a piece. How long a
piece and its context are is the autoencoder's to say (`decode_piece`, `decode_context` in `base.py`). The pipeline
decodes calls and streams alike through this file.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nova_video.autoencoders.adapter import AutoencoderAdapter, adapt
from nova_video.common.errors import InputError


class StreamDecoder:
    """One batch of clips on its way to pixels."""

    def __init__(self, vae: Any, before: Sequence[Tensor] = (), decoded: int = 0) -> None:
        """A new clip; or one to be gone on with, whose first `decoded` latent frames are pixels already.

        `before`: the last `vae.decode_context` of those, unscaled, (B, C, h, w) each; fewer if there are fewer. The
        next latent frame to push is number `decoded`, also where later ones had been pushed before.
        """
        adapter: AutoencoderAdapter = adapt(vae)
        context = min(adapter.decode_context, decoded)
        if len(before) < context:
            raise InputError(f"decoding goes on behind the last {context} latent frames, got {len(before)}")
        self.decoded = decoded
        """Latent frames whose pixels were given out."""
        self._vae = adapter
        self._context = list(before[len(before) - context :])
        self._waiting: list[Tensor] = []

    @property
    def needs(self) -> int:
        """Latent frames before the next one that another process needs to go on: the context, and those waiting."""
        return len(self._context) + len(self._waiting)

    def push(self, z: Tensor) -> list[Tensor]:
        """The next latent frame (B, C, h, w), unscaled -> pieces of pixels (B, 3, T, H, W) that are final with it."""
        self._waiting.append(z)
        return self._decode() if len(self._waiting) == self._vae.decode_piece(self.decoded) else []

    def finish(self) -> list[Tensor]:
        """No more latent frames: the pixels of those that waited for a whole piece."""
        return self._decode() if self._waiting else []

    def _decode(self) -> list[Tensor]:
        latents = [*self._context, *self._waiting]
        pixels = self._vae.decode(torch.stack(latents, dim=2), context=len(self._context))
        self.decoded += len(self._waiting)
        self._context = latents[max(len(latents) - self._vae.decode_context, 0) :]
        self._waiting = []
        return [pixels]
