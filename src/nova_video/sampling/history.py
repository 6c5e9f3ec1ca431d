"""The past of a frame: what the temporal encoder reads of it, its key/value cache, and the remedies against drift.

Plain functions over a `SamplingState`; `context.py` has their settings and `generate.py` is the loop. Legend as there.
"""

import torch
from torch import Tensor

from nova_video.model import NOVATransformer3DModel
from nova_video.sampling.context import REFERENCE_FRAMES, Statistics, hold_statistics
from nova_video.sampling.engine import Engine
from nova_video.sampling.state import SamplingState


def encode_next_frame(engine: Engine, state: SamplingState) -> Tensor:
    """The condition (N * B, Lc, D) of the next frame, from the earlier frames that it may read."""
    model, segment = engine.model, state.segment_at(state.done)
    if state.num_frames == 1:  # no later frame reads a cache
        text, tokens = state.segments[segment].text, history_tokens(model, state, None, 0)
        state.anchor = engine.context(text, tokens, state.positions)
        return state.anchor
    read = state.context.read(state.done, state.segments[segment].begin)
    same_text = state.segments[segment].text is state.segments[state.cached_segment].text
    if state.cached is not None and same_text and read[:-1] == state.cached:
        feature = step_context(model, state, read[-1])
    else:
        feature = build_context(model, state, segment, read)
    assert state.anchor is not None
    return model.mix(state.anchor, feature) if read else feature


def build_context(model: NOVATransformer3DModel, state: SamplingState, segment: int, read: list[int]) -> Tensor:
    """Encode text, BOS and the frames `read` in one pass, into an emptied cache -> the last slot's feature."""
    state.cache.clear()
    tokens = [history_tokens(model, state, frame, slot) for slot, frame in enumerate([None, *read])]
    text = state.segments[segment].text
    features = model.encode_context(text, torch.stack(tokens, dim=1), state.positions, state.cache)
    state.cached, state.built, state.cached_segment = list(read), len(read), segment
    state.anchor = features[:, 0]
    return features[:, -1]


def step_context(model: NOVATransformer3DModel, state: SamplingState, frame: int) -> Tensor:
    """Encode one more frame behind those in the cache -> its slot's feature."""
    assert state.cached is not None
    slot = len(state.cached) + 1
    feature = model.encode_frame(history_tokens(model, state, frame, slot), slot, state.positions, state.cache)
    state.cached.append(frame)
    return feature


def restore_context(model: NOVATransformer3DModel, state: SamplingState) -> None:
    """Fill the cache of a state that was saved, by the very passes that had filled it."""
    cached, built = state.cached, state.built
    if cached is not None:
        build_context(model, state, state.cached_segment, cached[:built])
        for frame in cached[built:]:
            step_context(model, state, frame)


def history_tokens(model: NOVATransformer3DModel, state: SamplingState, frame: int | None, slot: int) -> Tensor:
    """The input of a slot in every pass (N * B, Lc, D); frame None is BOS."""
    latents = None if frame is None else read_frame(state, frame)
    parts = [model.embed_history(latents, slot, state.batch, state.positions)] * state.passes  # (B, Lc, D) each
    if state.passes == 3:  # the second pass goes without history: the bare token, at every frame
        parts[1] = model.embed_history(None, slot, state.batch, state.positions, bare=True)
    return torch.cat(parts)


def read_frame(state: SamplingState, frame: int) -> Tensor:
    """The earlier frame (B, C, h, w) as the temporal encoder reads it; its noise is drawn once."""
    latents = state.frames[frame]
    if state.context.history_noise == 0:
        return latents
    if frame not in state.noised_history:
        state.noised_history[frame] = latents + state.context.history_noise * state.random.normal(*latents.shape)
    return state.noised_history[frame]


def collect_statistics(state: SamplingState, latents: Tensor) -> None:
    """Add the next frame (B, C, h, w) to the statistics of a scene's first frames."""
    if state.context.hold_statistics == 0:
        return
    begin = state.segments[state.segment_at(state.done)].begin
    statistics = Statistics.of(latents, begin)
    if state.reference is None or state.reference.begin != begin:
        state.reference = statistics
    elif state.reference.count < REFERENCE_FRAMES:
        state.reference = state.reference.joined(statistics)


def draw_to_reference(state: SamplingState, latents: Tensor) -> Tensor:
    """The next frame (B, C, h, w), drawn to the statistics of the first ones where the request wants it."""
    strength, reference = state.context.hold_statistics, state.reference
    begin = state.segments[state.segment_at(state.done)].begin
    if strength == 0 or reference is None or reference.begin != begin or reference.count < REFERENCE_FRAMES:
        return latents
    return hold_statistics(latents, reference, strength)
