"""The loop: frame by frame in time, set by set in space. One set a turn, so that a caller can stop, show or save.

Per frame: one step of the temporal encoder (or one pass over its context, where that does not just grow by a frame),
then for each set the spatial encoder once, the denoiser's steps on the set's tokens, and those tokens are fixed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nova_video.common.errors import InputError
from nova_video.model import NOVATransformer3DModel, masking, patchify, unpatchify
from nova_video.model.finite import first_not_finite
from nova_video.model.patches import gather_tokens, scatter_tokens
from nova_video.sampling.context import REFERENCE_FRAMES, Statistics, hold_statistics
from nova_video.sampling.diffusion import Schedule, SetNoise
from nova_video.sampling.engine import Engine, PlainEngine
from nova_video.sampling.guidance import UNGUIDED
from nova_video.sampling.presets import second_order
from nova_video.sampling.side_stream import beside
from nova_video.sampling.state import OpenFrame, SamplingState
from nova_video.sampling.timing import Stopwatch, span


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


def generate_sets(
    model: NOVATransformer3DModel,
    scheduler: Any,
    state: SamplingState,
    engine: Engine | None = None,
    stopwatch: Stopwatch | None = None,
) -> Iterator[SetDone]:
    """Advance `state` to its end, one set a turn. `scheduler` is the request's own copy; None: the plain engine."""
    engine = engine or PlainEngine(model)
    if state.shortcuts.solver == "dpm++":
        scheduler = second_order(scheduler)
    schedules: dict[int, Schedule] = {}  # by number of steps
    while not state.finished:
        if state.open is None:
            given = state.given.get(state.done)
            if given is not None and given.redraw == 0:
                finish_frame(model, state, given.latents)
                continue
            with span(stopwatch, "temporal"):
                condition = encode_next_frame(engine, state)
            state.open = open_frame(model, state, condition)
        frame = state.open
        steps = state.shortcuts.steps_of(frame.sets, len(frame.sizes), state.num_diffusion_steps)
        if steps not in schedules:
            schedules[steps] = Schedule.of(scheduler, steps, state.random.device)
        yield reveal_set(model, engine, schedules[steps], state, frame, stopwatch)


# In time --------------------------------------------------------------------------------------------------------------


def encode_next_frame(engine: Engine, state: SamplingState) -> Tensor:
    """What the spatial encoder is told of the next frame (N * B, Lc, D), from the earlier frames it may read."""
    model, segment = engine.model, state.segment_at(state.done)
    if state.num_frames == 1:  # nothing is cached for others
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
    """One more frame behind those in the cache -> its slot's feature."""
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
    """A slot's input in every pass (N * B, Lc, D); frame None is BOS."""
    latents = None if frame is None else read_frame(state, frame)
    parts = [model.embed_history(latents, slot, state.batch, state.positions)] * state.passes  # (B, Lc, D) each
    if state.passes == 3:  # the second pass goes without history: the bare token, at every frame
        parts[1] = model.embed_history(None, slot, state.batch, state.positions, bare=True)
    return torch.cat(parts)


def read_frame(state: SamplingState, frame: int) -> Tensor:
    """An earlier frame (B, C, h, w) as the temporal encoder reads it; its noise is drawn once."""
    latents = state.frames[frame]
    if state.context.history_noise == 0:
        return latents
    if frame not in state.heard:
        state.heard[frame] = latents + state.context.history_noise * state.random.normal(*latents.shape)
    return state.heard[frame]


# In space -------------------------------------------------------------------------------------------------------------


def open_frame(model: NOVATransformer3DModel, state: SamplingState, condition: Tensor) -> OpenFrame:
    """The next frame, empty but for what is given of it. The first one draws the order of revelation, for all."""
    count = state.num_tokens
    if state.order is None:
        grid = (state.grid[0] // model.patch_size, state.grid[1] // model.patch_size)
        state.order = masking.draw_order(state.order_rule, state.random.uniform(state.batch, count, 1), grid)
    values = model.patch_size**2 * state.noise.shape[1]
    frame = OpenFrame(
        condition,
        tokens=condition.new_zeros(state.batch, count, values),
        embedded=condition.new_zeros(state.batch, count, condition.shape[-1]),
        order=state.order,
        known=0,
        sizes=state.sizes(state.done),
    )
    given = state.given.get(state.done)
    if given is not None:
        if given.known is not None:
            frame.order = known_first(state.order, given.known)
        frame.known = count - given.redraw
        if frame.known:
            ids = frame.revealed(0)
            reveal(model, frame, ids, gather_tokens(patchify(given.latents, model.patch_size), ids))
    return frame


def known_first(order: Tensor, known: Tensor) -> Tensor:
    """order (B, L) with the tokens of `known` (L,) moved to the front; else as it was."""
    unknown = ~known[order]
    return order.gather(1, unknown.byte().argsort(dim=1, stable=True))


def reveal(model: NOVATransformer3DModel, frame: OpenFrame, ids: Tensor, values: Tensor) -> None:
    """Fix the tokens `ids` (B, S) at `values` (B, S, P)."""
    frame.tokens = scatter_tokens(frame.tokens, ids, values)
    frame.embedded = scatter_tokens(frame.embedded, ids, model.embed_tokens(values))


def reveal_set(
    model: NOVATransformer3DModel,
    engine: Engine,
    schedule: Schedule,
    state: SamplingState,
    frame: OpenFrame,
    stopwatch: Stopwatch | None,
) -> SetDone:
    """Predict the next set of the open frame and fix it; the last set closes the frame."""
    guidance = state.segments[state.segment_at(state.done)].guidance
    if not state.shortcuts.guides(frame.sets, len(frame.sizes)):
        guidance = UNGUIDED
    visible = frame.revealed(frame.sets)  # (B, V)
    ids = frame.revealed(frame.sets + 1)[:, visible.shape[1] :]  # (B, S)
    with (
        beside(state.random.device, partial(SetNoise.draw, schedule, guidance, state.noise, ids)) as drawn,
        span(stopwatch, "spatial"),
    ):
        features = set_features(engine, state, frame, visible, ids, guidance.passes)  # (N * B, S, D)
    with span(stopwatch, "denoiser"):
        noise = SetNoise(*drawn)
        values = engine.denoise(features, ids, schedule, guidance, noise, state.random.generators)
    reveal(model, frame, ids, values.to(features.dtype))
    frame.sets += 1
    whole = frame.sets == len(frame.sizes)
    done = SetDone(state.step, state.done, whole, frame.tokens, frame.revealed(frame.sets))
    state.step += 1
    if whole:
        latents = unpatchify(frame.tokens, model.patch_size, state.grid)
        finish_frame(model, state, latents if state.done in state.given else held(state, latents))
        state.open = None
    return done


def set_features(
    engine: Engine, state: SamplingState, frame: OpenFrame, visible: Tensor, ids: Tensor, passes: int
) -> Tensor:
    """Spatial features of the tokens `ids` (B, S) in the first `passes` passes, (N * B, S, D)."""
    batch, every = len(ids), state.shortcuts.guidance_every
    condition, following = frame.condition[: passes * batch], ids
    if passes > 1 and every > 1:
        if frame.sets % every:
            assert frame.differences is not None
            cond = engine.features(condition[:batch], frame.embedded, visible, ids, state.positions)  # (B, S, D)
            others, frame.differences = frame.differences.tensor_split([ids.shape[1]], dim=1)
            return torch.cat([cond, (others.unflatten(0, (-1, batch)) + cond).flatten(0, 1)])
        following = frame.revealed(frame.sets + every)[:, visible.shape[1] :]  # this set's tokens and the next ones'
    features = engine.features(condition, frame.embedded, visible, following, state.positions)
    if following is not ids:
        later = features[:, ids.shape[1] :].unflatten(0, (passes, batch))
        frame.differences = (later[1:] - later[:1]).flatten(0, 1)  # ((N - 1) * B, S of the next sets, D)
    return features[:, : ids.shape[1]]


def finish_frame(model: NOVATransformer3DModel, state: SamplingState, latents: Tensor) -> None:
    """The next frame (B, C, h, w) is whole. Raises InputError for values that are not finite: nothing is made of them.

    On a GPU this waits for the frame, once a frame.
    """
    if not bool(latents.isfinite().all()):
        raise InputError(f"latent frame {state.done} has values that are not finite: {why_not_finite(model, state)}")
    begin = state.segments[state.segment_at(state.done)].begin
    if state.context.hold_statistics > 0:
        statistics = Statistics.of(latents, begin)
        if state.reference is None or state.reference.begin != begin:
            state.reference = statistics
        elif state.reference.count < REFERENCE_FRAMES:
            state.reference = state.reference.joined(statistics)
    state.frames[state.done] = latents
    state.done += 1
    if state.finished:  # nothing reads it again, and decoding needs the room
        state.cache.release()
        state.cached = None


def why_not_finite(model: NOVATransformer3DModel, state: SamplingState) -> str:
    """The likeliest reason, for a message."""
    if (name := first_not_finite(model)) is not None:
        return f"expected finite weights, but the transformer's {name} is not"
    given = state.given.get(state.done)
    if given is not None and not bool(given.latents.isfinite().all()):
        return "expected finite latents of what is given; the autoencoder may need float32"
    texts = (segment.text for segment in state.segments)
    if not all(bool(text.isfinite().all()) for text in texts):
        return "expected finite features of the prompt; the text encoder may need float32"
    if model.dtype == torch.float16:
        return "expected another precision, since float16 overflows: bfloat16 or float32"
    return "expected smaller guidance, noise or adapter scales"


def held(state: SamplingState, latents: Tensor) -> Tensor:
    """A new frame, drawn to the statistics of the first ones where that is asked for and those are known."""
    strength, reference = state.context.hold_statistics, state.reference
    begin = state.segments[state.segment_at(state.done)].begin
    if strength == 0 or reference is None or reference.begin != begin or reference.count < REFERENCE_FRAMES:
        return latents
    return hold_statistics(latents, reference, strength)
