"""The paper's two loops: frame by frame in time (section 3.1), set by set in space (3.2).

For each frame the temporal encoder makes one step (`history.py`). For each set of the frame's tokens the spatial
encoder runs once and the denoiser takes its steps on these tokens alone, which are then fixed. One set is made a turn,
so that a caller can stop, show or save between two.

Legend: B batch, N guidance passes, L tokens of a frame, V of them revealed, S tokens of the set, Lc temporal tokens of
the frame, C latent channels, h w latent grid, D width, P values of a token.
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
from nova_video.sampling.diffusion import Schedule, SetNoise
from nova_video.sampling.engine import Engine, PlainEngine
from nova_video.sampling.guidance import CONDITIONAL
from nova_video.sampling.history import collect_statistics, draw_to_reference, encode_next_frame
from nova_video.sampling.schedulers import second_order
from nova_video.sampling.side_stream import beside
from nova_video.sampling.state import OpenFrame, SamplingState
from nova_video.sampling.stopwatch import Stopwatch, span


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
    if state.speed.solver == "dpm++":
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
        steps = state.speed.steps_of(frame.sets, len(frame.sizes), state.num_diffusion_steps)
        if steps not in schedules:
            schedules[steps] = Schedule.of(scheduler, steps, state.random.device)
        yield reveal_set(model, engine, schedules[steps], state, frame, stopwatch)


def open_frame(model: NOVATransformer3DModel, state: SamplingState, condition: Tensor) -> OpenFrame:
    """The next frame, empty but for its given tokens. The first one draws the order of revelation, for all frames."""
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
        num_given=0,
        sizes=state.sizes(state.done),
    )
    given = state.given.get(state.done)
    if given is not None:
        if given.mask is not None:
            frame.order = given_first(state.order, given.mask)
        frame.num_given = count - given.redraw
        if frame.num_given:
            ids = frame.revealed(0)
            reveal(model, frame, ids, gather_tokens(patchify(given.latents, model.patch_size), ids))
    return frame


def given_first(order: Tensor, mask: Tensor) -> Tensor:
    """The order (B, L) with the tokens of the mask (L,) moved to the front; else unchanged."""
    return order.gather(1, (~mask[order]).byte().argsort(dim=1, stable=True))


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
    if not state.speed.guides(frame.sets, len(frame.sizes)):
        guidance = CONDITIONAL
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
        finish_frame(model, state, latents if state.done in state.given else draw_to_reference(state, latents))
        state.open = None
    return done


def set_features(
    engine: Engine, state: SamplingState, frame: OpenFrame, visible: Tensor, ids: Tensor, passes: int
) -> Tensor:
    """Spatial features of the tokens `ids` (B, S) in the first `passes` passes, (N * B, S, D)."""
    batch, every = len(ids), state.speed.guidance_every or 1
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
    """Take a whole frame (B, C, h, w) as the next one. On a GPU this waits for it, once a frame.

    Raises InputError for values that are not finite: nothing is made of them.
    """
    if not bool(latents.isfinite().all()):
        raise InputError(f"latent frame {state.done} has values that are not finite: {why_not_finite(model, state)}")
    collect_statistics(state, latents)
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
