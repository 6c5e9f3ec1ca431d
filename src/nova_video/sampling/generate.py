"""The paper's two loops: frame by frame in time (section 3.1), set by set in space (3.2).

For each frame the temporal encoder makes one step (`history.py`). For each set of the frame's tokens the spatial
encoder runs once and the denoiser takes its steps on these tokens alone, which are then fixed. One set is made a turn,
so that a caller can stop, show or save between two. Sets of several requests can be made in one batch.

Legend: B batch, N guidance passes, L tokens of a frame, V of them revealed, S tokens of the set, Lc temporal tokens of
the frame, C latent channels, h w latent grid, D width, P values of a token.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nova_video.common.errors import InputError
from nova_video.model import NOVATransformer3DModel, masking, patchify, unpatchify
from nova_video.model.finite import first_not_finite
from nova_video.model.patches import gather_tokens, scatter_tokens
from nova_video.sampling.diffusion import Schedule, SetNoise
from nova_video.sampling.engine import Engine, PlainEngine
from nova_video.sampling.guidance import CONDITIONAL, Guidance, GuidanceRule
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


@dataclass(frozen=True, eq=False)
class Sampler:
    """The things that make the sets of one request: an engine, a noise schedule, and the state that they advance."""

    engine: Engine
    scheduler: Any
    """The request's own copy."""
    state: SamplingState
    stopwatch: Stopwatch | None = None
    schedules: dict[int, Schedule] = field(default_factory=dict)
    """By number of steps, filled as they are needed."""

    def schedule(self, steps: int) -> Schedule:
        """The schedule of so many steps."""
        if steps not in self.schedules:
            second = self.state.speed.solver == "dpm++"
            scheduler = second_order(self.scheduler) if second else self.scheduler
            self.schedules[steps] = Schedule.of(scheduler, steps, self.state.random.device)
        return self.schedules[steps]


@dataclass(frozen=True, eq=False)
class OpenSet:
    """The next set of a request, which is still to be made."""

    sampler: Sampler
    frame: OpenFrame
    schedule: Schedule
    guidance: GuidanceRule
    visible: Tensor
    """(B, V) tokens that are there."""
    ids: Tensor
    """(B, S) tokens of the set."""
    passes: int
    """Passes that the spatial encoder makes."""
    encoded: Tensor
    """(B, S') tokens that it encodes: the set's, and those of later sets whose differences are kept."""

    @property
    def key(self) -> Hashable:
        """Equal keys: the sets can be made in one batch. None: this one can only be made by itself."""
        if type(self.guidance) is not Guidance or self.schedule.rows is None:
            return None
        engine, sizes = self.sampler.engine, [each.shape[1] for each in (self.visible, self.ids, self.encoded)]
        grid = self.sampler.state.grid
        return (id(engine.model), type(engine), grid, *sizes, self.passes, self.schedule.key, self.guidance)


class SetValues(NamedTuple):
    """A set that is made, but not fixed yet."""

    values: Tensor
    """(B, S, P) float32."""
    differences: Tensor | None
    """The `OpenFrame.differences` from now on."""


def generate_sets(
    model: NOVATransformer3DModel,
    scheduler: Any,
    state: SamplingState,
    engine: Engine | None = None,
    stopwatch: Stopwatch | None = None,
) -> Iterator[SetDone]:
    """Advance `state` to its end, one set a turn. `scheduler` is the request's own copy; None: the plain engine."""
    sampler = Sampler(engine or PlainEngine(model), scheduler, state, stopwatch)
    while (opened := open_set(sampler)) is not None:
        yield fix_set(opened, *make_sets([opened]))


def open_set(sampler: Sampler) -> OpenSet | None:
    """The next set to make, of a new frame if none is open; None at the end."""
    state, model = sampler.state, sampler.engine.model
    while state.open is None and not state.finished:
        given = state.given.get(state.done)
        if given is not None and given.redraw == 0:
            finish_frame(model, state, given.latents)
            continue
        with span(sampler.stopwatch, "temporal"):
            condition = encode_next_frame(sampler.engine, state)
        state.open = open_frame(model, state, condition)
    frame = state.open
    if frame is None:
        return None
    guidance = state.segments[state.segment_at(state.done)].guidance
    if not state.speed.guides(frame.sets, len(frame.sizes)):
        guidance = CONDITIONAL
    steps = state.speed.steps_of(frame.sets, len(frame.sizes), state.num_diffusion_steps)
    visible = frame.revealed(frame.sets)  # (B, V)
    ids = frame.revealed(frame.sets + 1)[:, visible.shape[1] :]  # (B, S)
    passes, encoded, every = guidance.passes, ids, state.speed.guidance_every or 1
    if passes > 1 and every > 1:
        if frame.sets % every:
            passes = 1
        else:  # this set's tokens and the next ones'
            encoded = frame.revealed(frame.sets + every)[:, visible.shape[1] :]
    return OpenSet(sampler, frame, sampler.schedule(steps), guidance, visible, ids, passes, encoded)


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


def make_sets(sets: Sequence[OpenSet]) -> list[SetValues]:
    """Compute one set of each of several requests, in one batch; their keys are equal.

    The generators draw in this function alone. If it fails, they stand where they stood before.
    """
    first = sets[0].sampler
    generators = [generator for each in sets for generator in each.sampler.state.random.generators]
    before = [generator.get_state() for generator in generators]
    try:
        with (
            beside(first.state.random.device, partial(draw_noise, sets)) as drawn,
            span(first.stopwatch, "spatial"),
        ):
            made = set_features(sets)
        with span(first.stopwatch, "denoiser"):
            features = join_rows([each for each, _ in made], sets[0].guidance.passes)
            ids, noise = join([each.ids for each in sets]), SetNoise(*drawn)
            values = first.engine.denoise(features, ids, sets[0].schedule, sets[0].guidance, noise, generators)
    except BaseException:
        for generator, stood in zip(generators, before, strict=True):
            generator.set_state(stood)
        raise
    shares = values.split([len(each.ids) for each in sets])
    return [SetValues(share, kept) for share, (_, kept) in zip(shares, made, strict=True)]


def draw_noise(sets: Sequence[OpenSet]) -> SetNoise:
    """The random numbers of each set, from its own generators."""
    drawn = [SetNoise.draw(each.schedule, each.guidance, each.sampler.state.noise, each.ids) for each in sets]
    return SetNoise(
        join([each.start for each in drawn]),
        join([each.fresh for each in drawn], dim=1),
        join([each.outside for each in drawn]),
    )


def set_features(sets: Sequence[OpenSet]) -> list[tuple[Tensor, Tensor | None]]:
    """Spatial features (N * B, S, D) of each set's tokens, and the differences that are kept with them."""
    first, batches = sets[0], [len(each.ids) for each in sets]
    conditions = [each.frame.condition[: first.passes * batch] for each, batch in zip(sets, batches, strict=True)]
    features = first.sampler.engine.features(
        join_rows(conditions, first.passes),
        join([each.frame.embedded for each in sets]),
        join([each.visible for each in sets]),
        join([each.encoded for each in sets]),
        first.sampler.state.positions,
    )
    shares = [features]
    if len(sets) > 1:
        shares = [share.flatten(0, 1) for share in features.unflatten(0, (first.passes, -1)).split(batches, dim=1)]
    return [guided_features(each, share) for each, share in zip(sets, shares, strict=True)]


def guided_features(opened: OpenSet, features: Tensor) -> tuple[Tensor, Tensor | None]:
    """Features (N * B, S, D) of a set in every pass, from those that were encoded, and the differences kept."""
    (batch, size), kept = opened.ids.shape, opened.frame.differences
    if opened.passes < opened.guidance.passes:
        assert kept is not None
        others, kept = kept.tensor_split([size], dim=1)
        return torch.cat([features, (others.unflatten(0, (-1, batch)) + features).flatten(0, 1)]), kept
    if opened.encoded is not opened.ids:
        later = features[:, size:].unflatten(0, (opened.passes, batch))
        kept = (later[1:] - later[:1]).flatten(0, 1)  # ((N - 1) * B, S of the next sets, D)
    return features[:, :size], kept


def join(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The parts in one batch; a single part as it is."""
    return parts[0] if len(parts) == 1 else torch.cat([*parts], dim=dim)


def join_rows(parts: Sequence[Tensor], passes: int) -> Tensor:
    """Parts (N * B, ...) of `passes` passes in one batch, again pass by pass."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.unflatten(0, (passes, -1)) for part in parts], dim=1).flatten(0, 1)


def fix_set(opened: OpenSet, made: SetValues) -> SetDone:
    """Fix a set that was made; the last set of a frame closes the frame."""
    state, frame, model = opened.sampler.state, opened.frame, opened.sampler.engine.model
    reveal(model, frame, opened.ids, made.values.to(frame.embedded.dtype))
    frame.differences = made.differences
    frame.sets += 1
    whole = frame.sets == len(frame.sizes)
    done = SetDone(state.step, state.done, whole, frame.tokens, frame.revealed(frame.sets))
    state.step += 1
    if whole:
        latents = unpatchify(frame.tokens, model.patch_size, state.grid)
        finish_frame(model, state, latents if state.done in state.given else draw_to_reference(state, latents))
        state.open = None
    return done


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
