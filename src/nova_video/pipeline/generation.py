"""One request while it is computed: sampled set by set, decoded piece by piece, saved and resumed.

`NovaPipeline.start` makes a `Generation`. Calls run it to the end; streams hand out its frames as they become final.
Both decode through the same pieces (`decoding.py`) and so give the same pixels. `saving.py` writes it to a file.

Legend: B clips, F latent frames, T pixel frames, C latent channels, h w latent grid, H W pixels, L tokens of a frame.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from nova_video.common.checks import quote
from nova_video.common.errors import InputError
from nova_video.common.fair_lock import FairLock
from nova_video.io.pixels import output_form
from nova_video.io.prefetch import prefetch
from nova_video.model import unpatchify
from nova_video.pipeline.call_parts import Parts
from nova_video.pipeline.change import change_request, next_frame
from nova_video.pipeline.decoding import FrameDecoder, picture_of, unit_pixels, untouched_pixels
from nova_video.pipeline.events import Event, FrameReady, LatentPreview, PartialFrame
from nova_video.pipeline.offload import bring
from nova_video.pipeline.progress import RequestProgress
from nova_video.pipeline.result import GenerateResult
from nova_video.pipeline.saving import save_progress
from nova_video.sampling.generate import Sampler, SetDone, fix_set, make_sets, open_set
from nova_video.text.vocabulary import warn_of_words

T = TypeVar("T")

StepCallback = Callable[[Any, int, int, dict[str, Tensor]], object]
"""(pipe, step, frame, tensors) after every set; returning False stops. `step` counts the sets of the whole call,
`frame` is the latent frame, and tensors are `latents` (B, C, h, w), zero where nothing is revealed yet, and `revealed`,
(B, h / 2, w / 2) bool."""
STEP_TENSORS = ("latents", "revealed")
"""Names of the tensors that a callback may see."""
CURRENT: ContextVar["Generation | None"] = ContextVar("calling", default=None)
"""The generation whose callback runs in this thread."""


class Interrupts:
    """Counts how often all running calls of a pipeline were told to stop: each stops when the count changes."""

    def __init__(self) -> None:
        self.count = 0

    def interrupt(self) -> None:
        self.count += 1


@dataclass(frozen=True, eq=False)
class Surroundings:
    """The things that a generation needs besides the parts of the model."""

    caller: object
    """The first argument of callbacks."""
    progress_bar: Callable[..., AbstractContextManager[Any]]
    free_parts: Callable[[], None]
    """Called at the end of a run or stream: under CPU offload parts go back."""
    interrupts: Interrupts
    turns: FairLock
    """Held by whoever uses a part, where parts take turns on the device."""


class SetMaker(Protocol):
    """Makes the sets of several generations."""

    def make_next(self, generation: "Generation") -> None:
        """Make the next set of a generation, and perhaps of others; each finds its own in `waiting`."""
        ...


class Generation(RequestProgress):
    """One request while it is computed. One consumer at a time runs or streams it; any thread may save it."""

    def __init__(
        self,
        progress: RequestProgress,
        parts: Parts,
        surroundings: Surroundings,
        warnings: tuple[str, ...] = (),
    ) -> None:
        super().__init__(**vars(progress))
        self.parts = parts
        self.surroundings = surroundings
        self.scheduler = parts.request_scheduler(self.plan.flow_shift)
        self.warnings = warnings
        """Words of the prompts that the model does not know, one line each."""
        self.lock = surroundings.turns if parts.is_offloaded else FairLock()
        """Held while a set is made: between two of them the state is whole."""
        self.group: SetMaker | None = None
        """The maker of the sets, with those of others (`together.py`); None: they are made here."""
        self.waiting: SetDone | Exception | None = None
        """A set that the group has made, or why it could not, until it is asked for here."""
        self.hands_out = False
        """A stream has more frames to hand out before it needs another set."""
        self.runs_ahead = False
        """A stream makes its sets in a thread of its own, before they are asked for."""
        self._interrupted = False
        self._sampler: Sampler | None = None

    def save(self, path: str | Path) -> None:
        """Write what `NovaPipeline.resume` needs to go on from here, with the same result as never stopping."""
        with self.lock:
            if self.state.random.device.type == "cuda":  # streams sample on a CUDA stream of their own
                torch.cuda.synchronize(self.state.random.device)
            save_progress(self, self.parts.transformer, Path(path))

    @property
    def next_change(self) -> int:
        """The first pixel frame that a change could be of now, if the clip has one left."""
        return self.plan.first_pixel(next_frame(self.state))

    @torch.no_grad()
    def change(
        self,
        prompt: str | Sequence[str] | None = None,
        motion_flow: float | None = None,
        guidance_scale: float | None = None,
        at: int | None = None,
    ) -> int:
        """Change the sentence, the motion or the guidance of a clip from its next latent frame on; from any thread.

        `prompt` is one sentence for all prompts, or one each. With `at` the change holds from that pixel frame on. The
        answer is the first pixel frame that it is of. It holds up to the next change that the request has on its
        timelines, and the clip is the one whose timelines had said so from the start; its records say so too.
        """
        numbers = {"motion_flow": motion_flow, "guidance_scale": guidance_scale}
        device = self.state.random.device
        with self.lock:
            if device.type == "cuda":  # streams sample on a CUDA stream of their own
                torch.cuda.synchronize(device)
            first, unknown = change_request(self, self.parts, self.sampler.engine.model, prompt, numbers, at)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        if unknown := tuple(line for line in unknown if line not in self.warnings):
            warn_of_words(unknown)
            self.warnings = (*self.warnings, *unknown)
        return first

    # To the end -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, callback_on_step_end: StepCallback | None = None, show_progress: bool = True) -> GenerateResult:
        """Compute all frames that no stream has handed out yet."""
        if self.plan.num_frames is None:
            raise InputError("num_frames is inf: expected a whole number, or pipe.stream, which goes on without end")
        check_callback(callback_on_step_end)
        if self.output_type != "latent":
            self.plan.check_pixels()
        last: SetDone | None = None
        try:
            bars = self.surroundings.progress_bar(total=self.total_steps) if show_progress else nullcontext()
            with bars as bar:
                if bar is not None:
                    bar.update(self.state.step)
                for done in self._sets(callback_on_step_end):
                    last = done
                    if bar is not None:
                        bar.update()
            partial = None
            if not self.state.frames and last is not None:  # none is finished: the first frame so far
                partial = self._shown(last)["latents"]
            with self._turn():
                made = self._latents(partial) if self.output_type == "latent" else self._pixels(partial)
        finally:
            with self._turn():
                self.surroundings.free_parts()
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
        pieces = untouched_pixels(self)
        if partial is not None:
            pieces.append(unit_pixels(self.parts.vae, self.parts.decode_picture(partial).unsqueeze(2)))
        else:
            decoder = FrameDecoder(self.parts, self)
            pieces += [*decoder.push(self.state.done), *decoder.finish()]
        return output_form(torch.cat(pieces, dim=1), self.output_type)

    # Frame by frame ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def stream(
        self, preview: bool = False, callback_on_step_end: StepCallback | None = None, ahead: bool | None = None
    ) -> Iterator[Any]:
        """Frames as they become final, in the form of `output_type`; with `preview`, events (`events.py`).

        `ahead`: sample the next frames in a thread, on a GPU in a CUDA stream of its own, while these are decoded and
        used. None: on a GPU, unless parts of the model take turns on it or the generation is in a group; on a CPU both
        would only share its cores.
        Closing the iterator, as leaving a loop over it does, stops the sampling.
        """
        check_callback(callback_on_step_end)
        device = self.state.random.device
        if ahead and self.group is not None:
            raise InputError("ahead is True for a generation in a group: expected False, or that it leaves the group")
        if ahead is None:
            ahead = device.type == "cuda" and not self.parts.is_offloaded and self.group is None
        self.runs_ahead = ahead
        own = torch.cuda.Stream(device) if ahead and device.type == "cuda" else None
        if own is not None:
            own.wait_stream(torch.cuda.current_stream(device))  # for the work that `start` began
            for given in self.state.given.values():
                given.latents.record_stream(own)
        sets = self._streamed(callback_on_step_end, own)
        depth = 2 * len(self.state.sizes_of(self.state.num_tokens))  # sets of two latent frames
        inside = nullcontext() if own is None else torch.cuda.stream(own)
        try:
            with prefetch(sets, depth, inside) if ahead else nullcontext(sets) as ready:
                for event in self._events(ready, preview):
                    yield event if preview else event.frame
        finally:
            self.runs_ahead = self.hands_out = False
            if own is not None:  # its last kernels may still read memory that is reused from here on
                torch.cuda.current_stream(device).wait_stream(own)
            with self._turn():
                self.surroundings.free_parts()

    def _events(self, sets: Iterator["_StreamedSet"], preview: bool) -> Iterator[Event]:
        latent = self.output_type == "latent"
        decoder: FrameDecoder | None = None  # made when given frames are in their place, before the first new one
        for piece in [] if latent else untouched_pixels(self):
            yield from self._hand_out(piece)
        for made in sets:
            frame = made.set.frame
            if not made.set.frame_done:
                if preview:
                    made.wait()
                    yield PartialFrame(frame, made.set.step, **self._shown(made.set), decode=self._picture)
                continue
            made.wait()
            self.hands_out = True
            if decoder is None and not latent:
                decoder = FrameDecoder(self.parts, self)
            if preview and not latent:
                yield LatentPreview(frame, self.state.frames[frame], decode=self._picture)
            yield from self._final(decoder, frame + 1)
        if decoder is None and not latent:
            decoder = FrameDecoder(self.parts, self)
        yield from self._final(decoder, self.state.done)
        for piece in self._in_turns(iter(()) if decoder is None else decoder.finish()):
            yield from self._hand_out(piece)

    def _final(self, decoder: FrameDecoder | None, stop: int) -> Iterator[FrameReady]:
        """Frames that are final once the latent frames before `stop` are there."""
        if decoder is None:
            while self.emitted < stop:
                self.hands_out = self.emitted + 1 < stop
                self.emitted += 1  # before it is handed out: the consumer may save, or never come back
                latents = self.state.frames[self.emitted - 1]
                yield FrameReady(self.emitted - 1, latents[0] if self.unbatched else latents)
                self._forget(self.emitted)
            self.hands_out = False
            return
        for piece, more in with_more(self._in_turns(decoder.push(stop))):
            yield from self._hand_out(piece, more)
            if not more:  # else the decoder is a piece further than what was handed out
                self._forget(decoder.first_needed)
        self.hands_out = False

    def _hand_out(self, piece: Tensor, more: bool = False) -> Iterator[FrameReady]:
        """Frames (B, T, 3, H, W), the first of them number `emitted`, one at a time; `more` pieces are there."""
        made = output_form(piece, self.output_type)
        for index in range(piece.shape[1]):
            frame = [clip[index] for clip in made] if isinstance(made, list) else made[:, index]
            self.hands_out = more or index + 1 < piece.shape[1]
            self.emitted += 1
            yield FrameReady(self.emitted - 1, frame[0] if self.unbatched else frame)

    def _forget(self, before: int) -> None:
        """Drop latent frames that nothing needs again."""
        with self.lock:
            self.state.forget(before)

    def _picture(self, latents: Tensor) -> Any:
        """Latents (B, C, h, w) decoded by themselves, in the form of `output_type`."""
        with self._turn():
            pictures = picture_of(self.parts, latents, self.output_type)
        return pictures[0] if self.unbatched else pictures

    def _turn(self) -> AbstractContextManager[None]:
        """To use a part besides the transformer: where parts take turns, nobody else uses one meanwhile."""
        return self.lock if self.parts.is_offloaded else nullcontext()

    def _in_turns(self, items: Iterator[T]) -> Iterator[T]:
        """The items, each of them made in a turn of its own."""
        while True:
            with self._turn():
                found = [*islice(items, 1)]
            if not found:
                return
            yield found[0]

    # Sampling ---------------------------------------------------------------------------------------------------------

    def _sets(self, callback_on_step_end: StepCallback | None) -> Iterator[SetDone]:
        """The sets that remain, until the end or until the callback stops them."""
        self._sampler = None  # the engine is that of now: weights may have changed since another run
        interrupts = self.surroundings.interrupts
        self._interrupted, count = False, interrupts.count
        while (done := self._next_set()) is not None:
            yield done
            if callback_on_step_end is not None and not self._call(callback_on_step_end, done):
                return
            if self._interrupted or interrupts.count != count:
                return

    def _next_set(self) -> SetDone | None:
        """The next set; None at the end."""
        if self.waiting is None and self.state.finished:  # no part has to come to the device for it
            return None
        if self.waiting is None and self.group is not None:
            self.group.make_next(self)
        elif self.waiting is None:
            with self.lock:
                bring(self.parts.transformer)
                opened = open_set(self.sampler)
                return None if opened is None else fix_set(opened, *make_sets([opened]))
        done, self.waiting = self.waiting, None
        if isinstance(done, Exception):
            raise done
        return done

    @property
    def sampler(self) -> Sampler:
        """The maker of the sets of the present run or stream."""
        if self._sampler is None:
            engine = self.parts.engine(self.plan.compile, bool(self.plan.fp8))
            self._sampler = Sampler(engine, self.scheduler, self.state, self.parts.stopwatch)
        return self._sampler

    def _call(self, callback: StepCallback, done: SetDone) -> bool:
        """Show a set to the callback; False if it stops the call."""
        shown = self._shown(done)
        before = CURRENT.set(self)
        try:
            made = callback(self.surroundings.caller, done.step, done.frame, dict(shown))
        finally:
            CURRENT.reset(before)
        for name, tensor in made.items() if isinstance(made, dict) else ():
            if tensor is not shown.get(name):
                raise InputError(f"callback_on_step_end returned another {name}: expected what it got, sets are final")
        return made is not False

    @property
    def interrupted(self) -> bool:
        """True if `interrupt` was called since the run or stream began."""
        return self._interrupted

    def interrupt(self) -> None:
        """Stop after the present set; another run or stream goes on from there."""
        self._interrupted = True

    def _streamed(
        self, callback_on_step_end: StepCallback | None, own: torch.cuda.Stream | None
    ) -> Iterator["_StreamedSet"]:
        """The sets that remain, each with the event after which the consumer's CUDA stream may read it."""
        for done in self._sets(callback_on_step_end):
            frames = (self.state.frames[done.frame],) if done.frame_done else ()
            yield _StreamedSet(done, (done.tokens, done.ids, *frames), None if own is None else own.record_event())

    def _shown(self, done: SetDone) -> dict[str, Tensor]:
        """A set's tensors for callbacks and events."""
        patch, grid = self.parts.transformer.patch_size, self.state.grid
        revealed = torch.zeros(done.tokens.shape[:2], dtype=torch.bool, device=done.tokens.device)
        revealed = revealed.scatter(1, done.ids, True).view(-1, grid[0] // patch, grid[1] // patch)
        return {"latents": unpatchify(done.tokens, patch, grid), "revealed": revealed}


def with_more(items: Iterator[T]) -> Iterator[tuple[T, bool]]:
    """Each item, and whether another one follows."""
    before: list[T] = []
    for item in items:
        if before:
            yield before.pop(), True
        before.append(item)
    for item in before:
        yield item, False


def check_callback(callback: object) -> None:
    """Raises InputError for a callback that cannot be called."""
    if callback is not None and not callable(callback):
        raise InputError(
            f"callback_on_step_end is {quote(callback)}: expected a function of (pipe, step, frame, tensors)"
        )


def with_tensors(callback: StepCallback | None, names: Sequence[str] | None) -> StepCallback | None:
    """The callback with those tensors alone that it wants; None: all."""
    check_callback(callback)
    if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        names = callback.tensor_inputs
    if unknown := [name for name in names or () if name not in STEP_TENSORS]:
        expected = " and ".join(STEP_TENSORS)
        raise InputError(f"callback_on_step_end_tensor_inputs has {unknown[0]!r}: expected of {expected}")
    if callback is None or names is None:
        return callback

    def chosen(pipe: Any, step: int, frame: int, tensors: dict[str, Tensor]) -> object:
        return callback(pipe, step, frame, {name: tensors[name] for name in names})

    return chosen


@dataclass(frozen=True, eq=False)
class _StreamedSet:
    """A set, perhaps made on another CUDA stream than its consumer's."""

    set: SetDone
    tensors: tuple[Tensor, ...]
    """The tensors that the consumer may read."""
    event: torch.cuda.Event | None
    """After it the tensors are there; None: they were made on the consumer's own stream."""

    def wait(self) -> None:
        """Make the consumer's stream wait for the tensors, and keep their memory until it has read them."""
        if self.event is not None:
            current = torch.cuda.current_stream(self.set.tokens.device)
            current.wait_event(self.event)
            for tensor in self.tensors:
                tensor.record_stream(current)
