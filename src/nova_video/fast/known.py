"""The classes and methods that the fast ways were written for; whatever is another one runs plainly.

The fast ways read weights and replay graphs, so that what a subclass, a hook or a patched method does would go unseen.
`unknown_part` finds it, and the caller then runs plainly.
"""

from collections.abc import Hashable, Iterator
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

from nova_video.model import attention, denoiser, embeddings, patches, transformer, vit
from nova_video.model.denoiser import AdaLayerNorm, Denoiser, DenoiserBlock, Projection, TimeCondEmbed
from nova_video.model.patches import PatchEmbed
from nova_video.model.transformer import ImageEncoder, NOVATransformer3DModel, VideoEncoder
from nova_video.model.vit import Attention, Block, Mlp
from nova_video.sampling import diffusion, guidance

SOURCES = (attention, denoiser, embeddings, patches, transformer, vit, diffusion, guidance)
"""Modules whose functions and methods the fast ways copy."""


def functions_of(owner: type | ModuleType) -> dict[str, Any]:
    """Functions and properties that a class or module defines itself."""
    return {
        name: value
        for name, value in vars(owner).items()
        if isinstance(value, FunctionType | property | classmethod | staticmethod)
    }


def owners() -> Iterator[type | ModuleType]:
    """The modules, and the classes that they define."""
    for module in SOURCES:
        yield module
        yield from (
            value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__
        )


ORIGINALS = {owner: functions_of(owner) for owner in owners()}
"""Functions as they were when this module was imported."""


def patched_function() -> str | None:
    """Name of a function or method that is another one than at import, or None."""
    for owner, originals in ORIGINALS.items():
        found = functions_of(owner)
        if found != originals:
            names = [name for name in {**originals, **found} if found.get(name) is not originals.get(name)]
            if names:
                return f"{owner.__name__.removeprefix('nova_video.')}.{names[0]}"
    return None


def unknown_part(model: NOVATransformer3DModel) -> str | None:
    """The first thing about a model that the fast ways would not follow, in words for a message, or None.

    Layers within blocks may be replaced (adapters, 8 bit weights): they are called, not read.
    """
    if (name := patched_function()) is not None:
        return f"{name} is patched"
    for name, part, known in known_parts(model):
        if type(part) is not known:
            return f"{name} is a {type(part).__name__}, a class of its own"
    for name, part in model.named_modules():
        if has_hook(part):
            return f"{name or 'the transformer'} ({type(part).__name__}) has a hook or a method of its own"
    return None


def fingerprint(model: nn.Module) -> tuple[Hashable, ...]:
    """Everything about a model that a captured graph relies on: its modules, their hooks, and where weights lie.

    One walk over the modules, because it is made for every call.
    """
    found: list[Hashable] = []
    for module in model.modules():
        found.append((id(module), type(module), has_hook(module)))
        for tensors in (module._parameters, module._buffers):
            found += [None if tensor is None else tensor.data_ptr() for tensor in tensors.values()]
    return tuple(found)


def known_parts(model: NOVATransformer3DModel) -> Iterator[tuple[str, nn.Module, type[nn.Module]]]:
    """Parts of a model with their names, and the classes that they have to be."""
    yield "transformer", model, NOVATransformer3DModel
    yield "video_encoder", model.video_encoder, VideoEncoder
    yield "image_encoder", model.image_encoder, ImageEncoder
    for name, encoder in (("video_encoder", model.video_encoder), ("image_encoder", model.image_encoder)):
        block: Any
        for index, block in enumerate(encoder.blocks):
            place = f"{name}.blocks.{index}"
            yield place, block, Block
            yield f"{place}.attn", block.attn, Attention
            yield f"{place}.mlp", block.mlp, Mlp
            for norm in ("norm1", "norm2"):
                yield f"{place}.{norm}", getattr(block, norm), nn.LayerNorm
    yield from known_denoiser_parts(model.image_decoder)


def known_denoiser_parts(head: Denoiser) -> Iterator[tuple[str, nn.Module, type[nn.Module]]]:
    """Parts of the denoiser, likewise."""
    yield "image_decoder", head, Denoiser
    yield "image_decoder.patch_embed", head.patch_embed, PatchEmbed
    yield "image_decoder.time_cond_embed", head.time_cond_embed, TimeCondEmbed
    yield "image_decoder.norm", head.norm, AdaLayerNorm
    block: Any
    for index, block in enumerate(head.blocks):
        place = f"image_decoder.blocks.{index}"
        yield place, block, DenoiserBlock
        yield f"{place}.norm1", block.norm1, AdaLayerNorm
        yield f"{place}.proj", block.proj, Projection
        yield f"{place}.norm2", block.norm2, nn.LayerNorm


METHODS = {owner: frozenset(originals) | {"forward"} for owner, originals in ORIGINALS.items()}
FORWARD = frozenset({"forward"})


def has_hook(part: nn.Module) -> bool:
    """True if calling the module does more than its class says. Hooks of libraries that only move weights do not."""
    own = vars(part)
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return True
    if METHODS.get(type(part), FORWARD).isdisjoint(own):
        return False
    return not ("_hf_hook" in own or "_diffusers_hook" in own)
