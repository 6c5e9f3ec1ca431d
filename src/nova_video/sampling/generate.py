"""The loop: frame by frame in time, set by set in space. One set a turn, so that a caller can stop, show or save.

Per frame: one step of the temporal encoder, then for each set the spatial encoder once, the denoiser's steps on the
set's tokens, and those tokens are fixed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nova_video.model import NOVATransformer3DModel, random_order, unpatchify
from nova_video.model.patches import gather_tokens, scatter_tokens
from nova_video.sampling.diffusion import denoise_set
from nova_video.sampling.state import OpenFrame, SamplingState


@dataclass(frozen=True)
class SetDone:
    """One more set is fixed."""

    step: int
    """Counts the sets of the whole request, from 0."""
    frame: int
    """Latent frame it belongs to."""
    frame_done: bool
    """It was the frame's last."""
    tokens: Tensor
    """(B, L, P) values of the frame so far, zero where not revealed."""
    ids: Tensor
    """(B, V) tokens revealed so far, in that order."""


def generate_sets(model: NOVATransformer3DModel, scheduler: Any, state: SamplingState) -> Iterator[SetDone]:
    """Advance `state` to its end, one set a turn. `scheduler` is the request's own copy."""
    while len(state.frames) < state.num_frames:
        if state.open is None:
            condition = encode_next_frame(model, state)
            if len(state.frames) < len(state.given):
                state.frames.append(state.given[len(state.frames)])
                continue
            state.open = open_frame(model, state, condition)
        yield reveal_set(model, scheduler, state, state.open)


def generate_frames(model: NOVATransformer3DModel, scheduler: Any, state: SamplingState) -> Iterator[Tensor]:
    """Advance `state` to its end, one frame (B, C, h, w) a turn, given ones left out."""
    for done in generate_sets(model, scheduler, state):
        if done.frame_done:
            yield state.frames[-1]


def encode_next_frame(model: NOVATransformer3DModel, state: SamplingState) -> Tensor:
    """The temporal encoder's step for the next frame -> what the spatial encoder is told of it (N * B, Lc, D)."""
    frame, batch, passes = len(state.frames), state.batch, state.guidance.passes
    latest = state.frames[-1] if state.frames else None
    history = model.embed_history(latest, frame, batch, state.positions)  # (B, Lc, D)
    parts = [history] * passes
    if passes == 3:  # the second pass goes without history: the bare token, at every frame
        parts[1] = model.embed_history(None, frame, batch, state.positions, bare=True)
    text = state.text if frame == 0 else None
    feature = model.encode_frame(text, torch.cat(parts), frame, state.positions, state.cache)
    if state.first is None:
        state.first = feature
        return feature
    return model.mix(state.first, feature)


def open_frame(model: NOVATransformer3DModel, state: SamplingState, condition: Tensor) -> OpenFrame:
    """An empty frame. The first one of a request draws the order of revelation, for all frames."""
    count = sum(state.sizes)
    if state.order is None:
        state.order = random_order(state.random.uniform(state.batch, count, 1))
    values = model.patch_size**2 * state.noise.shape[1]
    tokens = condition.new_zeros(state.batch, count, values)
    return OpenFrame(condition, tokens, condition.new_zeros(state.batch, count, condition.shape[-1]))


def reveal_set(model: NOVATransformer3DModel, scheduler: Any, state: SamplingState, frame: OpenFrame) -> SetDone:
    """Predict the next set of the open frame and fix it; the last set closes the frame."""
    passes = state.guidance.passes
    visible = state.revealed(frame.sets)  # (B, V)
    ids = state.revealed(frame.sets + 1)[:, visible.shape[1] :]  # (B, S)
    z = model.encode_tokens(
        frame.condition, frame.embedded.repeat(passes, 1, 1), visible.repeat(passes, 1), state.positions
    )  # (N * B, L, D)
    features = gather_tokens(z, ids.repeat(passes, 1))  # (N * B, S, D)
    values = denoise_set(model, scheduler, features, ids, state.num_diffusion_steps, state.guidance, state.noise)
    values = values.to(features.dtype)
    frame.tokens = scatter_tokens(frame.tokens, ids, values)
    frame.embedded = scatter_tokens(frame.embedded, ids, model.embed_tokens(values))
    frame.sets += 1
    done = SetDone(
        state.step,
        len(state.frames),
        frame.sets == len(state.sizes),
        frame.tokens,
        state.revealed(frame.sets),
    )
    state.step += 1
    if done.frame_done:
        state.frames.append(unpatchify(frame.tokens, model.patch_size, state.grid))
        state.open = None
    return done
