"""One request while it is carried out: sampled set by set, decoded piece by piece, saved and gone on with.

`NovaPipeline.start` makes a `Generation`; calls run it to the end, streams hand out its frames as they become final.
Both decode through the same pieces and so give the same pixels. What is saved (`saving.py`) is the sampler's state,
with the plan and what was given.

Legend: B clips, F latent frames, T pixel frames, C latent channels, h w latent grid, H W pixels, L tokens of a frame.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nova_video.autoencoders import StreamDecoder, adapt, unscale_latents
from nova_video.common.checks import shown
from nova_video.common.errors import InputError
from nova_video.io.pixels import output_form, unit_frames
from nova_video.io.prefetch import prefetch
from nova_video.model import unpatchify
from nova_video.model.finite import first_not_finite
from nova_video.pipeline.plan import Plan
from nova_video.pipeline.result import GenerateResult
from nova_video.sampling.generate import SetDone, generate_sets
from nova_video.sampling.state import SamplingState
from nova_video.sampling.timing import span

if TYPE_CHECKING:
    from nova_video.pipeline.pipeline import NovaPipeline

StepCallback = Callable[["NovaPipeline", int, int, dict[str, Tensor]], object]
"""(pipe, step, frame, tensors) after every set; returning False stops. `step` counts the sets of the whole call,
`frame` is the latent frame, and tensors are `latents` (B, C, h, w), zero where nothing is revealed yet, and `revealed`,
(B, h / 2, w / 2) bool."""
CALLING: ContextVar["Generation | None"] = ContextVar("calling", default=None)
"""The generation whose callback runs in this thread."""


@dataclass(frozen=True, eq=False)
class GivenPixels:
    """Leading frames as they were given, at the size and rate of the plan."""

    frames: Tensor
    """(1 or B, T, H, W, 3), uint8 or float32 in [0, 1]."""
    filled: Tensor | None = None
    """(T, H, W) bool: pixels that are made anew. None: all stay."""

    def over(self, made: Tensor, first: int) -> Tensor:
        """Decoded frames (B, T, 3, H, W) in [0, 1], the first of them number `first`, with given pixels put back."""
        stop = min(self.frames.shape[1], first + made.shape[1])
        if stop <= first:
            return made
        part = self.part(first, stop, made.shape[0]).to(made.device)
        if self.filled is not None:
            filled = self.filled[first:stop, None].to(made.device)  # (T, 1, H, W)
            part = torch.where(filled, made[:, : stop - first], part)
        return torch.cat([part, made[:, stop - first :]], dim=1)

    def part(self, first: int, stop: int, batch: int) -> Tensor:
        """Frames `first` to `stop` as (B, T, 3, H, W) float32 in [0, 1]."""
        frames = self.frames[:, first:stop]
        unit = frames.float() / 255 if frames.dtype == torch.uint8 else frames
        return unit.permute(0, 1, 4, 2, 3).expand(batch, -1, -1, -1, -1)


# Events of a stream ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FrameReady:
    """A pixel frame that is final."""

    index: int
    frame: Any
    """In the form of `output_type`; with output_type "latent", of a latent frame, and `index` counts those."""


@dataclass(frozen=True, eq=False)
class LatentPreview:
    """The newest latent frame, decoded by itself before its pixels are final."""

    latent_frame: int
    frame: Any


@dataclass(frozen=True, eq=False)
class PartialFrame:
    """The latent frame in hand, one more set of it revealed."""

    latent_frame: int
    step: int
    """Counts the sets of the whole request."""
    latents: Tensor
    """(B, C, h, w), zero where nothing is revealed."""
    revealed: Tensor
    """(B, h / 2, w / 2) bool."""
    decode: Callable[[Tensor], Any] = field(repr=False)

    @property
    def frame(self) -> Any:
        """A picture of it as far as it is, decoded when asked for."""
        return self.decode(self.latents)


Event = FrameReady | LatentPreview | PartialFrame


class Generation:
    """One request while it is carried out. One consumer at a time runs or streams it; any thread may save it."""

    def __init__(
        self,
        pipe: "NovaPipeline",
        plan: Plan,
        state: SamplingState,
        scheduler: Any,
        *,
        output_type: str,
        bare: bool,
        seeds: tuple[int, ...],
        given: GivenPixels | None = None,
        emitted: int = 0,
        notes: dict[str, Any] | None = None,
        warnings: tuple[str, ...] = (),
        records: list[dict[str, Any]] | None = None,
    ) -> None:
        self.pipe = pipe
        self.plan = plan
        self.state = state
        self.scheduler = scheduler
        self.output_type = output_type
        self.bare = bare
        """One clip of one prompt: streams yield its frames as they are, not in a list of one."""
        self.seeds = seeds
        self.given = given
        self.emitted = emitted
        """Frames handed out by streams: pixel frames or, with output_type "latent", latent frames."""
        self.notes: dict[str, Any] = notes or {}
        """Anything that JSON can hold; saved with the state."""
        self.warnings = warnings
        """What of the prompts the model does not know, one line each."""
        self.records = records or []
        """How each picture or clip is made, for the files that the result is saved to."""
        self._interrupted = False
        self._lock = threading.Lock()  # held while a set is made: between two of them the state is whole

    @property
    def total_steps(self) -> int | None:
        """Sets of the whole request; None: without end."""
        return self.state.total_steps

    def save(self, path: str | Path) -> None:
        """Write what `NovaPipeline.resume` needs to go on from here, with the same result as never stopping."""
        from nova_video.pipeline.saving import save_generation

        with self._lock:
            if self.state.random.device.type == "cuda":  # what a stream samples, it samples on a CUDA stream of its own
                torch.cuda.synchronize(self.state.random.device)
            save_generation(self, Path(path))

    # To the end -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, callback_on_step_end: StepCallback | None = None, show_progress: bool = True) -> GenerateResult:
        """All frames; of a generation that a stream has begun, those that it has not handed out."""
        if self.plan.num_frames is None:
            raise InputError("num_frames is inf: expected a whole number, or pipe.stream, which goes on without end")
        check_callback(callback_on_step_end)
        if self.output_type != "latent":
            self.plan.check_pixels()
        last: SetDone | None = None
        try:
            with self.pipe.progress_bar(total=self.total_steps) if show_progress else nullcontext() as bar:
                if bar is not None:
                    bar.update(self.state.step)
                for done in self._sets(callback_on_step_end):
                    last = done
                    if bar is not None:
                        bar.update()
            partial = None
            if not self.state.frames and last is not None:  # nothing is whole: the first frame as far as it is
                partial = self._shown(last)["latents"]
            made = self._latents(partial) if self.output_type == "latent" else self._pixels(partial)
        finally:
            self.pipe.maybe_free_model_hooks()
        images, frames = None, made
        if self.plan.num_frames == 1:
            images, frames = made, None
            if self.output_type != "latent":
                images = [clip[0] for clip in made] if isinstance(made, list) else made[:, 0]
        stopped = not self.state.finished
        return GenerateResult(
            images=images,
            frames=frames,
            fps=self.plan.fps,
            seeds=self.seeds,
            stopped=stopped,
            generation=self if stopped else None,
            records=self.records,
        )

    def _latents(self, partial: Tensor | None) -> Tensor:
        """(B, C, F, h, w) as the sampler has them."""
        frames = self.state.frames
        kept = [frames[f] for f in range(self.emitted, self.state.done)] if partial is None else [partial]
        return torch.stack(kept, dim=2)

    def _pixels(self, partial: Tensor | None) -> Any:
        pieces = self._untouched()
        if partial is not None:
            pieces.append(self._unit(self.pipe.decode_picture(partial).unsqueeze(2)))
        else:
            decoder = self._decoder()
            pieces += [*self._push(decoder, self.state.done), *self._finish(decoder)]
        return output_form(torch.cat(pieces, dim=1), self.output_type)

    # Frame by frame ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def stream(
        self, preview: bool = False, callback_on_step_end: StepCallback | None = None, ahead: bool | None = None
    ) -> Iterator[Any]:
        """Frames as they become final, in the form of `output_type`; with `preview`, events (see above).

        `ahead`: sample the next frames in a thread, on a GPU in a CUDA stream of its own, while these are decoded and
        used. None: on a GPU, unless parts of the model take turns on it; on a CPU both would only share its cores.
        Closing the iterator, as leaving a loop over it does, stops the sampling.
        """
        check_callback(callback_on_step_end)
        device = self.state.random.device
        if ahead is None:
            ahead = device.type == "cuda" and not self.pipe.is_offloaded
        own = torch.cuda.Stream(device) if ahead and device.type == "cuda" else None
        if own is not None:
            own.wait_stream(torch.cuda.current_stream(device))  # all that `start` was given to do
            for given in self.state.given.values():
                given.latents.record_stream(own)
        sets = self._marked(callback_on_step_end, own)
        depth = 2 * len(self.state.sizes_of(self.state.num_tokens))  # sets of two latent frames
        inside = nullcontext() if own is None else torch.cuda.stream(own)
        try:
            with prefetch(sets, depth, inside) if ahead else nullcontext(sets) as marked:
                yield from self._events(marked, preview) if preview else self._frames(marked)
        finally:
            if own is not None:  # memory that its last kernels read must not be used again before
                torch.cuda.current_stream(device).wait_stream(own)
            self.pipe.maybe_free_model_hooks()

    def _frames(self, sets: Iterator["_Marked"]) -> Iterator[Any]:
        for event in self._events(sets, preview=False):
            assert isinstance(event, FrameReady)
            yield event.frame

    def _events(self, sets: Iterator["_Marked"], preview: bool) -> Iterator[Event]:
        latent = self.output_type == "latent"
        decoder: _Decoder | None = None  # made when given frames are in their place, before the first new one
        for piece in [] if latent else self._untouched():
            yield from self._hand_out(piece)
        for made in sets:
            frame = made.set.frame
            if not made.set.frame_done:
                if preview:
                    made.wait()
                    yield PartialFrame(frame, made.set.step, **self._shown(made.set), decode=self._picture)
                continue
            made.wait()
            if decoder is None and not latent:
                decoder = self._decoder()
            if preview and not latent:
                yield LatentPreview(frame, self._picture(self.state.frames[frame]))
            yield from self._final(decoder, frame + 1)
        if decoder is None and not latent:
            decoder = self._decoder()
        yield from self._final(decoder, self.state.done)
        for piece in [] if decoder is None else self._finish(decoder):
            yield from self._hand_out(piece)

    def _final(self, decoder: "_Decoder | None", stop: int) -> Iterator[FrameReady]:
        """What is final once the latent frames before `stop` are there."""
        if decoder is None:
            while self.emitted < stop:
                self.emitted += 1  # before it is handed out: the consumer may save, or never come back
                latents = self.state.frames[self.emitted - 1]
                yield FrameReady(self.emitted - 1, latents[0] if self.bare else latents)
                self._forget(self.emitted)
            return
        for piece in self._push(decoder, stop):
            yield from self._hand_out(piece)
            self._forget(decoder.first_needed)

    def _hand_out(self, piece: Tensor) -> Iterator[FrameReady]:
        """Frames (B, T, 3, H, W), the first of them number `emitted`, one at a time."""
        made = output_form(piece, self.output_type)
        for index in range(piece.shape[1]):
            frame = [clip[index] for clip in made] if isinstance(made, list) else made[:, index]
            self.emitted += 1
            yield FrameReady(self.emitted - 1, frame[0] if self.bare else frame)

    def _forget(self, before: int) -> None:
        """Let go of latent frames that nothing needs again."""
        with self._lock:
            self.state.forget(before)

    # Sampling ---------------------------------------------------------------------------------------------------------

    def _sets(self, callback_on_step_end: StepCallback | None) -> Iterator[SetDone]:
        """The sets that remain, until the end or until the callback stops them."""
        pipe = self.pipe
        engine = pipe.engine(self.plan.compile, self.plan.shortcuts.fp8)
        sets = generate_sets(engine.model, self.scheduler, self.state, engine, pipe.stopwatch)
        self._interrupted, interruptions = False, pipe.interruptions
        while not self.state.finished:
            with self._lock:
                self.pipe.bring(self.pipe.transformer)
                done = next(sets, None)
            if done is None:
                return
            yield done
            if callback_on_step_end is not None and not self._call(callback_on_step_end, done):
                return
            if self._interrupted or pipe.interruptions != interruptions:
                return

    def _call(self, callback: StepCallback, done: SetDone) -> bool:
        """Show a set to the callback; False if it stops the call."""
        shown = self._shown(done)
        before = CALLING.set(self)
        try:
            made = callback(self.pipe, done.step, done.frame, dict(shown))
        finally:
            CALLING.reset(before)
        for name, tensor in made.items() if isinstance(made, dict) else ():
            if tensor is not shown.get(name):
                raise InputError(f"callback_on_step_end returned another {name}: expected what it got, sets are final")
        return made is not False

    @property
    def interrupted(self) -> bool:
        """Told to stop after the set in hand."""
        return self._interrupted

    def interrupt(self) -> None:
        """Stop after the set in hand; another run or stream goes on from there."""
        self._interrupted = True

    def _marked(self, callback_on_step_end: StepCallback | None, own: torch.cuda.Stream | None) -> Iterator["_Marked"]:
        """The same, each with what tells the consumer's CUDA stream that it is there, if it is made on another."""
        for done in self._sets(callback_on_step_end):
            frames = (self.state.frames[done.frame],) if done.frame_done else ()
            yield _Marked(done, (done.tokens, done.ids, *frames), None if own is None else own.record_event())

    def _shown(self, done: SetDone) -> dict[str, Tensor]:
        """A set's tensors for callbacks and events."""
        patch, grid = self.pipe.transformer.patch_size, self.state.grid
        revealed = torch.zeros(done.tokens.shape[:2], dtype=torch.bool, device=done.tokens.device)
        revealed = revealed.scatter(1, done.ids, True).view(-1, grid[0] // patch, grid[1] // patch)
        return {"latents": unpatchify(done.tokens, patch, grid), "revealed": revealed}

    # Pixels -----------------------------------------------------------------------------------------------------------

    @property
    def _untouched_latents(self) -> int:
        """Leading latent frames that need no decoding, since their pixels were given and stay."""
        if self.given is None or self.plan.edits:
            return 0
        return (self.plan.given_frames - self.plan.offset - 1) // self.plan.temporal_stride + 1

    def _untouched(self) -> list[Tensor]:
        """Given frames that come back without decoding, as far as they were not handed out: one piece or none."""
        if self.given is None or self.plan.edits or self.emitted >= self.plan.given_frames:
            return []
        given = self.given.part(self.emitted, self.plan.given_frames, self.state.batch)
        return [given.to(self.state.random.device)]  # where the others will be

    def _decoder(self) -> "_Decoder":
        """A decoder that stands at the piece of the next frame to hand out."""
        return _Decoder(self, self._untouched_latents)

    @torch.no_grad()
    def check_frames(self) -> None:
        """Raises InputError if a finished frame that has to be decoded yet is not there: of a state that was saved."""
        if self.output_type == "latent" or self.pipe.vae is None:
            return
        try:
            first = self._decoder().pushed
        except KeyError as error:
            raise InputError(f"it lacks the latent frame {error}, which is needed to decode later ones") from None
        missing = [frame for frame in range(first, self.state.done) if frame not in self.state.frames]
        if missing:
            raise InputError(f"it lacks the latent frame {missing[0]}, which is not decoded yet: expected it")

    def _push(self, decoder: "_Decoder", stop: int) -> Iterator[Tensor]:
        """Latent frames up to `stop` to the decoder -> pieces (B, T, 3, H, W) in [0, 1], given pixels put back."""
        while decoder.pushed < stop:
            with span(self.pipe.stopwatch, "vae"):
                pieces = decoder.push(self.state.frames[decoder.pushed])
            for piece in pieces:
                yield self._finished(decoder, piece)

    def _finish(self, decoder: "_Decoder") -> Iterator[Tensor]:
        with span(self.pipe.stopwatch, "vae"):
            pieces = decoder.finish()
        for piece in pieces:
            yield self._finished(decoder, piece)

    def _finished(self, decoder: "_Decoder", pixels: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W) of a piece -> its frames that were not handed out and were asked for."""
        first = decoder.first_pixel
        decoder.first_pixel += pixels.shape[2]
        frames = self._unit(pixels)
        if self.given is not None:
            frames = self.given.over(frames, first)
        last = decoder.first_pixel if self.plan.num_frames is None else self.plan.num_frames
        return frames[:, max(self.emitted - first, 0) : max(last - first, 0)]

    def _unit(self, pixels: Tensor) -> Tensor:
        """The autoencoder's pixels (B, 3, T, H, W) -> (B, T, 3, H, W) in [0, 1]. Raises InputError for what is not
        finite, which would be black."""
        if not bool(pixels.isfinite().all()):
            vae = self.pipe.require_vae("decoding")
            name = first_not_finite(vae)
            cause = "a smaller scale, or another precision such as float32" if name is None else "finite weights"
            known = "" if name is None else f", but its {name} is not"
            raise InputError(f"the autoencoder's pixels are not finite: expected {cause}{known}")
        return unit_frames(pixels)

    @torch.no_grad()
    def _picture(self, latents: Tensor) -> Any:
        """Latents (B, C, h, w) decoded by themselves, in the form of `output_type` ("pt" for "latent")."""
        frames = self._unit(self.pipe.decode_picture(latents).unsqueeze(2))
        made = output_form(frames, "pt" if self.output_type == "latent" else self.output_type)
        pictures = [clip[0] for clip in made] if isinstance(made, list) else made[:, 0]
        return pictures[0] if self.bare else pictures


def check_callback(callback: object) -> None:
    """Raises InputError for a callback that cannot be called."""
    if callback is not None and not callable(callback):
        raise InputError(
            f"callback_on_step_end is {shown(callback)}: expected a function of (pipe, step, frame, tensors)"
        )


class _Decoder:
    """Latent frames to pixels, for one consumer of a generation: knows where in the clip it stands."""

    def __init__(self, generation: Generation, untouched: int) -> None:
        vae, plan, state = adapt(generation.pipe.require_vae("decoding")), generation.plan, generation.state
        self.pipe = generation.pipe
        self.vae = vae
        self.pushed = 0 if vae.decodes_whole_clips else untouched
        """Latent frames that went in."""
        while plan.first_pixel(self.pushed + vae.decode_piece(self.pushed)) <= generation.emitted:
            self.pushed += vae.decode_piece(self.pushed)
        before = range(max(self.pushed - vae.decode_context, 0), self.pushed)
        scaled = [unscale_latents(vae.vae, state.frames[frame].to(vae.dtype)) for frame in before]
        self.pieces = StreamDecoder(vae, scaled, decoded=self.pushed, fast=generation.pipe.decodes_fast(plan))
        self.first_pixel = plan.first_pixel(self.pushed)
        """Of the next piece."""

    @property
    def first_needed(self) -> int:
        """First latent frame that going on from here, in another process too, takes."""
        return self.pushed - self.pieces.needs

    def push(self, latents: Tensor) -> list[Tensor]:
        """The next latent frame (B, C, h, w) -> pieces of pixels (B, 3, T, H, W) in [-1, 1] that are final with it."""
        self.pushed += 1
        return self.pieces.push(unscale_latents(self.vae.vae, latents.to(self.vae.dtype)))

    def finish(self) -> list[Tensor]:
        """No more latent frames: what had waited for a whole piece."""
        return self.pieces.finish()


@dataclass(frozen=True, eq=False)
class _Marked:
    """A set, perhaps made on another CUDA stream than its consumer's."""

    set: SetDone
    tensors: tuple[Tensor, ...]
    """What its consumer may read."""
    event: torch.cuda.Event | None
    """After which they are there; None: made on the consumer's own stream."""

    def wait(self) -> None:
        """The consumer's stream goes on when they are there; their memory is not used again before it has read them."""
        if self.event is not None:
            current = torch.cuda.current_stream(self.set.tokens.device)
            current.wait_event(self.event)
            for tensor in self.tensors:
                tensor.record_stream(current)
