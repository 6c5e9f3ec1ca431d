"""The denoiser in two halves for sampling: its modulations for all steps at once, and the rest of each step.

Both read the layers of exactly `Denoiser` and `DenoiserBlock`; together they give what `Denoiser.forward` gives.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from nova_video.model.denoiser import Denoiser, add_gated, modulate


def modulations(denoiser: Denoiser, u: Tensor) -> list[Tensor]:
    """Embeddings u (..., width) -> the modulation of every block (..., 3 width), and the head's (..., 2 width)."""
    active = functional.silu(u)
    norms: list[Any] = [*(block.norm1 for block in denoiser.blocks), denoiser.norm]
    return [norm.proj(active) for norm in norms]


def predict(denoiser: Denoiser, noisy: Tensor, modulations: Sequence[Tensor]) -> Tensor:
    """noisy (B, S, P) under the modulations of a step, (B, S, 3 or 2 width) each -> prediction (B, S, P)."""
    x = denoiser.patch_embed.embed_tokens(noisy)  # (B, S, width)
    blocks: Any = denoiser.blocks
    for block, modulation in zip(blocks, modulations[:-1], strict=True):
        scale, shift, gate = modulation.chunk(3, dim=-1)
        x = add_gated(x, gate, block.norm2(block.proj(modulate(x, scale, shift))))
    scale, shift = modulations[-1].chunk(2, dim=-1)
    return denoiser.head(modulate(x, scale, shift))
