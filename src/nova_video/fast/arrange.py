"""Brings the fast parts into a model: copies of it over the same weights, whose known parts compute otherwise.

The model that is given stays as it is, and may be in use elsewhere. Parts of a class of the user's own, or with hooks,
are called as they are.
"""

from typing import Any, TypeVar

from torch import Tensor, nn

from nova_video.common.checks import AttentionKernels
from nova_video.common.devices import compile_every_variant
from nova_video.common.notices import warn_once
from nova_video.fast.blocks import (
    CompiledBlock,
    FastAdaLayerNorm,
    FastAttention,
    FastBlock,
    FastDenoiserBlock,
    FastVideoEncoder,
    TableTimeEmbed,
)
from nova_video.fast.known import has_hook, known_denoiser_parts, patched_function, unknown_part
from nova_video.model import NOVATransformer3DModel
from nova_video.model.denoiser import Denoiser, TimeCondEmbed
from nova_video.model.transformer import ImageEncoder, VideoEncoder
from nova_video.model.vit import Attention, Block, Mlp

M = TypeVar("M", bound=nn.Module)


def over(kind: type[M], part: nn.Module, **others: Any) -> M:
    """A module of class `kind` over the layers of `part`, with some attributes or parts replaced by `others`."""
    made = kind.__new__(kind)
    made.__dict__.update(vars(part), _modules=dict(part._modules))
    for name, value in others.items():
        setattr(made, name, value)
    return made


def arrange_for_sampling(model: NOVATransformer3DModel) -> NOVATransformer3DModel:
    """The model with compiled blocks in both encoders: for a model of known parts alone, on a GPU."""

    def compiled_blocks(encoder: Any) -> Any:
        return over(type(encoder), encoder, blocks=nn.ModuleList(over(CompiledBlock, each) for each in encoder.blocks))

    encoders = {name: compiled_blocks(getattr(model, name)) for name in ("video_encoder", "image_encoder")}
    return over(type(model), model, **encoders)


def arrange_for_training(
    model: NOVATransformer3DModel,
    timesteps: Tensor | None = None,
    compile: bool = False,
    kernels: AttentionKernels = "auto",
) -> NOVATransformer3DModel:
    """The model as a trainer computes it, which owns it: with kernels on a GPU, compiled or not.

    `timesteps` (K,) of a noise table, where the loss draws no others: each is then embedded once.
    """
    on_gpu = model.mask_embed.mask_token.is_cuda
    if on_gpu and (reason := unknown_part(model)) is not None:
        warn_once(f"{reason}: training calls it as it is, which is slower")
    if patched_function() is not None:
        return model
    video, image, denoiser = model.video_encoder, model.image_encoder, model.image_decoder
    if on_gpu:
        video, image = (with_fast_blocks(encoder, compile, kernels) for encoder in (video, image))
        if type(video) is VideoEncoder and all(reads_block_masks(block) for block in video.blocks):
            video = over(FastVideoEncoder, video)
    if type(denoiser) is Denoiser:
        denoiser = arrange_denoiser(denoiser, timesteps, on_gpu and compile)
    made = over(type(model), model, video_encoder=video, image_encoder=image, image_decoder=denoiser)
    if compile and on_gpu:
        compile_blocks(made)
    return made


def with_fast_blocks(encoder: Any, compile: bool, kernels: AttentionKernels) -> Any:
    """A copy of an encoder of a known class, whose known blocks have kernels; another encoder as it is."""
    if type(encoder) not in (VideoEncoder, ImageEncoder):
        return encoder
    blocks = []
    for block in encoder.blocks:
        known = ((block, Block), (getattr(block, "attn", None), Attention), (getattr(block, "mlp", None), Mlp))
        if any(type(part) is not kind or has_hook(part) for part, kind in known):
            blocks.append(block)
        elif compile:
            blocks.append(over(FastBlock, block, kernels=kernels))
        else:
            blocks.append(over(Block, block, attn=over(FastAttention, block.attn, kernels=kernels)))
    return over(type(encoder), encoder, blocks=nn.ModuleList(blocks))


def reads_block_masks(block: Any) -> bool:
    """True if the attention of a block is ours, which knows both forms of masks."""
    return isinstance(block, FastBlock) or isinstance(getattr(block, "attn", None), FastAttention)


def arrange_denoiser(denoiser: Denoiser, timesteps: Tensor | None, kernels: bool) -> Denoiser:
    """A copy of the denoiser that embeds the `timesteps` of a table once, and with kernels in known blocks."""
    parts: dict[str, Any] = {}
    if timesteps is not None and type(denoiser.time_cond_embed) is TimeCondEmbed:
        parts["time_cond_embed"] = over(TableTimeEmbed, denoiser.time_cond_embed, timesteps=timesteps)
    if kernels:
        unknown = [
            name for name, part, kind in known_denoiser_parts(denoiser) if type(part) is not kind or has_hook(part)
        ]
        if not unknown:
            parts["blocks"] = nn.ModuleList(over(FastDenoiserBlock, block) for block in denoiser.blocks)
            parts["norm"] = over(FastAdaLayerNorm, denoiser.norm)
    return over(Denoiser, denoiser, **parts)


def compile_blocks(model: NOVATransformer3DModel, backend: str = "inductor") -> None:
    """Compile the blocks of both encoders and of the denoiser, for any number of tokens.

    And the norm behind the denoiser's: on all noise draws of all tokens, uncompiled, it moves more memory than they.
    """
    compile_every_variant()
    # else inductor copies a sum for a kernel of ours, and sums up again for who reads it next
    options = {"triton_kernel_default_layout_constraint": "flexible_layout"} if backend == "inductor" else None
    for encoder in (model.video_encoder, model.image_encoder):
        for block in encoder.blocks:
            block.compile(dynamic=True, backend=backend, options=options)
    if isinstance(model.image_decoder, Denoiser):
        for part in (*model.image_decoder.blocks, model.image_decoder.norm):
            part.compile(dynamic=True, backend=backend)
