"""How a training step computes the model's blocks: with their insides kept or made again, and under which mask.

Both are handed to `loss.py` by the trainer; the model itself keeps nothing.
"""

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from nova_video.common.devices import compile_every_variant
from nova_video.model import NOVATransformer3DModel, Positions
from nova_video.model.attention import (
    FLEX_HEAD_DIM,
    Mask,
    attend,
    block_causal_mask,
    flex_block_causal_mask,
)

log = logging.getLogger(__name__)


def checkpointed(block: nn.Module, *args: Any) -> Tensor:
    """Calls a block; of what it computes only the output is kept, and the backward pass computes the rest again.

    The same gradients, in less memory and about a third more time. Blocks draw no random numbers, so none are saved.
    """
    out: Tensor = checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
    return out


def compile_blocks(model: NOVATransformer3DModel, backend: str = "inductor") -> None:
    """Compile the blocks of both encoders and of the denoiser, for any number of tokens.

    And the norm behind the denoiser's: on all noise draws of all tokens, uncompiled, it moves more memory than they.
    """
    compile_every_variant()
    # else inductor copies a sum for a kernel of ours, and sums up again for who reads it next
    options = {"triton_kernel_default_layout_constraint": "flexible_layout"} if backend == "inductor" else None
    for block in (*model.video_encoder.blocks, *model.image_encoder.blocks):
        block.compile(dynamic=True, backend=backend, options=options)
    for part in (*model.image_decoder.blocks, model.image_decoder.norm):
        part.compile(dynamic=True, backend=backend)


class TemporalMasks:
    """The block-causal masks of a run, each made once: for flex attention on a GPU, else for plain attention."""

    def __init__(self, flex: bool | None = None) -> None:
        """`flex` None: whichever suits the device."""
        self.flex = flex
        self._made: dict[tuple[int, int, int, torch.device], Mask] = {}

    def of(self, model: NOVATransformer3DModel, condition_tokens: int, positions: Positions) -> Mask | None:
        """The mask of `positions` behind so many condition tokens; None for a single frame, which needs none."""
        frames, tokens = positions.num_frames, model.video_tokens(positions)
        if frames == 1:
            return None
        device = model.mask_embed.bos_token.device
        key = (condition_tokens, tokens, frames, device)
        if key not in self._made:
            flex = chooses_flex(device, model.head_dim) if self.flex is None else self.flex
            make = flex_block_causal_mask if flex else block_causal_mask
            self._made[key] = make(condition_tokens, tokens, frames, device)
        return self._made[key]


@cache
def chooses_flex(device: torch.device, head_dim: int) -> bool:
    """Whether the temporal mask is for flex attention on this device; says so, once."""
    reason = why_not_flex(device, head_dim)
    if reason is None:
        log.info("block-causal mask on %s: flex attention, which skips what is hidden", device)
    else:
        log.info("block-causal mask on %s: plain attention (%s)", device, reason)
    return reason is None


def why_not_flex(device: torch.device, head_dim: int) -> str | None:
    """What keeps flex attention from training here, or None: on a GPU it is tried, forward and back, on two blocks."""
    if device.type != "cuda":
        return "flex attention has no backward there"
    if head_dim < FLEX_HEAD_DIM:
        return f"heads of {head_dim} channels: flex attention needs {FLEX_HEAD_DIM}"
    try:
        with torch.enable_grad():  # wherever the first mask is asked for
            mask = flex_block_causal_mask(64, 64, 3, device)
            ones = torch.ones(3, 1, 1, 256, head_dim, device=device, dtype=torch.bfloat16, requires_grad=True)
            query, key, value = ones
            attend(query, key, value, mask).sum().backward()
            torch.cuda.synchronize(device)
    except Exception as error:  # no compiler, a GPU it does not know: the same numbers come without it
        return f"{flex_attention.__name__} fails here: {(str(error) or repr(error)).splitlines()[0]}"
    return None
