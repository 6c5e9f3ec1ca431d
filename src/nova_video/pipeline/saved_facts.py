"""Checks the facts of a saved generation: nothing of the file is believed before it fits the model.

`saving.py` writes and reads the file. A file that was cut, edited or made by somebody else is an `InputError` of one
line that names the entry. Legend as in `sampling/state.py`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nova_video.common.checks import LIMITS, check_number, quote
from nova_video.common.errors import InputError
from nova_video.model.masking import set_sizes_of
from nova_video.pipeline.call_parts import Parts
from nova_video.pipeline.plan import Plan, check_plan
from nova_video.pipeline.request import OUTPUT_TYPES
from nova_video.sampling.guidance import Guidance

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class SegmentFacts:
    start: int
    begin: int
    text: int
    guidance: Guidance


@dataclass(frozen=True)
class SentenceFacts:
    """The moments of the sentences, with the numbers of their features."""

    times: tuple[float, ...]
    texts: tuple[tuple[int, ...], ...]
    negatives: tuple[int, ...]
    pictures: int


@dataclass(frozen=True)
class OpenFacts:
    known: int
    sizes: tuple[int, ...]
    sets: int


@dataclass(frozen=True)
class ReferenceFacts:
    begin: int
    count: int


@dataclass(frozen=True)
class SavedFacts:
    """The file's JSON: a generation without its tensors."""

    format: int
    model: str
    dtype: str
    plan: Plan
    output_type: str
    bare: bool
    seeds: tuple[int, ...]
    emitted: int
    notes: dict[str, Any]
    passes: int
    segments: tuple[SegmentFacts, ...]
    sentences: SentenceFacts
    given: dict[str, int]
    cached: tuple[int, ...] | None
    built: int
    cached_segment: int
    done: int
    step: int
    generators: tuple[str, ...]
    records: tuple[dict[str, Any], ...] = ()
    reference: ReferenceFacts | None = None
    open: OpenFacts | None = None


def check_facts(facts: SavedFacts, tensors: dict[str, Tensor], parts: Parts) -> None:
    """Raises InputError for the first entry that does not fit the model, the plan or another entry."""
    check_plan(facts.plan, parts.capabilities)
    _check_numbers(facts)
    _check_sentences(facts)
    _check_places(facts)
    expected = _TensorCheck(facts, tensors, parts)
    for name in tensors:
        if name not in expected.shapes:
            raise InputError(f"its tensor {quote(name)} belongs to nothing in it: expected another generation's file")
    for name, (shape, dtypes) in expected.shapes.items():
        if name not in tensors:
            if name in expected.optional:
                continue
            raise InputError(f"it lacks the tensor {name}: expected one of shape {_of(shape)}")
        _check_tensor(name, tensors[name], shape, dtypes)
    _check_order(facts, tensors, expected)
    if not facts.plan.given_frames and not facts.given:  # every frame has as many sets
        sets = len(set_sizes_of(facts.plan.order_rule, expected.tokens, facts.plan.sets))
        made = facts.done * sets + (0 if facts.open is None else facts.open.sets)
        if facts.step != made:
            raise InputError(f"its step is {facts.step}: expected {made}, the sets of its frames")


def _check_numbers(facts: SavedFacts) -> None:
    plan = facts.plan
    frames = 2**40 if plan.latent_frames is None else plan.latent_frames
    check_number("its done", facts.done, 0, integer=True, high=frames)
    most = facts.done if facts.output_type == "latent" else max(plan.first_pixel(facts.done), plan.given_frames)
    check_number("its emitted", facts.emitted, 0, integer=True, high=most)
    check_number("its step", facts.step, 0, integer=True, high=(facts.done + 1) * plan.sets)
    check_number("its passes", facts.passes, 1, integer=True, high=3)
    if facts.passes != plan.passes:
        raise InputError(f"its passes are {facts.passes}: expected {plan.passes}, those of its plan's guidance")
    if facts.output_type not in OUTPUT_TYPES:
        raise InputError(f"its output_type is {quote(facts.output_type)}: expected one of {', '.join(OUTPUT_TYPES)}")
    if facts.bare and plan.batch != 1:
        raise InputError(f"its bare is true with {plan.batch} clips: expected one")
    for name, count in (("generators", len(facts.generators)), ("seeds", len(facts.seeds))):
        if count not in (1, plan.batch) or count != len(facts.generators):
            raise InputError(f"its {name} are {count}: expected 1 or {plan.batch}, one a clip")
    for seed in facts.seeds:
        check_number("its seed", seed, 0, integer=True, high=2**64, below=True)


def _check_sentences(facts: SavedFacts) -> None:
    words, plan = facts.sentences, facts.plan
    check_number("its sentences' pictures", words.pictures, 1, integer=True, high=plan.batch)
    prompts = plan.batch // words.pictures
    if prompts * words.pictures != plan.batch or any(len(row) != prompts for row in words.texts):
        raise InputError(f"its sentences are not of {plan.batch} clips: expected {prompts} texts at every moment")
    if not words.times or len(words.times) != len(words.texts) or list(words.times) != sorted(set(words.times)):
        raise InputError(f"its sentences' times are {quote(list(words.times))}: expected one a moment, in order")
    check_number("its sentences' first time", words.times[0], 0)
    if len(words.negatives) not in ((prompts,) if plan.passes > 1 else (0, prompts)):
        raise InputError(f"its sentences' negatives are {len(words.negatives)}: expected {prompts}, one a prompt")
    for index in (index for row in (*words.texts, words.negatives) for index in row):
        check_number(
            "a feature of its sentences", index, 0, integer=True, high=prompts * (len(words.times) + 1), below=True
        )


def _check_places(facts: SavedFacts) -> None:
    """Numbers of frames, sets and texts, which point into the rest."""
    plan, frames = facts.plan, facts.plan.latent_frames
    first = min(plan.latent_at(facts.sentences.times[0]), facts.done)
    if not facts.segments or facts.segments[0].start != first:
        raise InputError(f"its segments do not begin at frame {first}: expected one that does")
    before = -1
    for segment in facts.segments:
        if segment.start <= before:
            raise InputError(f"a segment starts at frame {segment.start}: expected frames of the clip, in order")
        check_number("a segment's begin", segment.begin, 0, integer=True, high=segment.start)
        check_number("a segment's text", segment.text, 0, integer=True, high=len(facts.segments), below=True)
        if segment.guidance not in plan.guidance.values:
            raise InputError("a segment has another guidance than the plan: expected one of the plan's")
        before = segment.start
    for name in facts.given:
        if not name.isdecimal() or (frames is not None and int(name) >= frames) or int(name) < facts.done:
            raise InputError(f"its given frame is {quote(name)}: expected frames that are not done")
    check_number("its cached_segment", facts.cached_segment, 0, integer=True, high=len(facts.segments), below=True)
    cached = facts.cached or ()
    most = LIMITS.frames if facts.cached is None else len(cached)  # it is left as it was when the cache is emptied
    check_number("its built", facts.built, 0, integer=True, high=most)
    if list(cached) != sorted(set(cached)) or any(not 0 <= frame < facts.done for frame in cached):
        raise InputError(f"its cached frames are {quote(list(cached))}: expected finished frames, in order")
    if len(cached) + 1 > plan.context.slots(frames):
        raise InputError(f"its cached frames are {len(cached)}: expected fewer than its context has places")
    if facts.reference is not None:
        check_number("its reference's begin", facts.reference.begin, 0, integer=True, high=facts.done)
        check_number("its reference's count", facts.reference.count, 1, integer=True, high=max(facts.done, 1))


class _TensorCheck:
    """Names, shapes and types of the tensors that a file with these facts has. None in a shape: any size."""

    def __init__(self, facts: SavedFacts, tensors: dict[str, Tensor], parts: Parts) -> None:
        model, plan = parts.transformer, facts.plan
        batch, (height, width) = plan.batch, plan.grid
        rows, floats = facts.passes * batch, (model.dtype,)
        self.tokens = (height // model.patch_size) * (width // model.patch_size)
        latents = (batch, int(model.config.image_dim), height, width)
        values = model.patch_size**2 * int(model.config.image_dim)
        text = model.text_embed.token_len + (2 if model.has_motion else 0)
        self.optional: set[str] = set()
        self.shapes: dict[str, tuple[tuple[int | None, ...], tuple[torch.dtype, ...]]] = {}
        needed = self._needed(facts)
        self.shapes |= {f"frames.{frame}": (latents, floats) for frame in needed}
        for name in tensors:  # others that are still there
            kind, _, number = name.partition(".")
            heard = kind == "heard" and plan.context.history_noise > 0
            if (kind == "frames" or heard) and _is_below(number, facts.done):
                self.shapes[name] = (latents, floats)
                self.optional |= set() if kind == "frames" and int(number) in needed else {name}
        for segment in facts.segments:
            self.shapes[f"text.{segment.text}"] = ((rows, text, model.width), floats)
        most = int(model.config.text_token_len)
        for index in (index for row in (*facts.sentences.texts, facts.sentences.negatives) for index in row):
            name = f"feature.{index}"
            length = min(len(tensors[name]), most) if name in tensors and tensors[name].dim() else None
            self.shapes[name] = ((length, int(model.config.text_token_dim)), FLOATS)
        for given, redraw in facts.given.items():
            check_number(f"its given frame {given}", redraw, 0, integer=True, high=self.tokens)
            self.shapes[f"given.{given}.latents"] = (latents, floats)
            self.shapes[f"given.{given}.known"] = ((self.tokens,), (torch.bool,))
            self.optional.add(f"given.{given}.known")
        self.shapes["order"] = ((batch, self.tokens), (torch.int64,))
        if facts.step == 0 and facts.open is None:
            self.optional.add("order")
        if facts.reference is not None:
            self.shapes |= {f"reference.{name}": ((batch, latents[1], 1, 1), FLOATS) for name in ("mean", "deviation")}
        if facts.open is not None:
            self._add_open(facts, facts.open, rows, (batch, values, model.width), floats)
        for index in range(len(facts.generators)):
            self.shapes[f"generator.{index}"] = ((None,), (torch.uint8,))
        if plan.given_frames:
            size = (plan.given_frames, plan.height, plan.width)
            self.shapes["pixels"] = ((None, *size, 3), (torch.uint8, torch.float32))
            self.shapes["filled"] = (size, (torch.bool,))
            self.optional |= {"pixels", "filled"}

    @staticmethod
    def _needed(facts: SavedFacts) -> set[int]:
        """Finished frames that later ones or latent results are made from; pixels are the decoder's to ask for."""
        plan = facts.plan
        begin = max((s.begin for s in facts.segments if s.start <= facts.done), default=0)
        needed = set(facts.cached or ())
        if plan.latent_frames is None or facts.done < plan.latent_frames:
            needed |= set(plan.context.read(facts.done, begin))
        if facts.output_type == "latent":
            needed |= set(range(facts.emitted, facts.done))
        return needed

    def _add_open(
        self,
        facts: SavedFacts,
        frame: OpenFacts,
        rows: int,
        sizes: tuple[int, int, int],
        floats: tuple[torch.dtype, ...],
    ) -> None:
        batch, values, width = sizes
        check_number("its open frame's known", frame.known, 0, integer=True, high=self.tokens)
        check_number("its open frame's sets", frame.sets, 0, integer=True, high=max(len(frame.sizes) - 1, 0))
        if any(size < 1 for size in frame.sizes) or frame.known + sum(frame.sizes) != self.tokens:
            counts = quote(list(frame.sizes))
            raise InputError(f"its open frame's sizes are {counts}: expected {self.tokens} tokens in all")
        if str(facts.done) not in facts.given and frame.known:
            raise InputError(f"its open frame's known is {frame.known}: expected 0, nothing is given of the frame")
        if facts.plan.latent_frames is not None and facts.done >= facts.plan.latent_frames:
            raise InputError("it has an open frame behind the last one: expected none")
        self.shapes |= {
            "open.condition": ((rows, self.tokens // 4, width), floats),
            "open.tokens": ((batch, self.tokens, values), floats),
            "open.embedded": ((batch, self.tokens, width), floats),
            "open.order": ((batch, self.tokens), (torch.int64,)),
        }
        every = facts.plan.guidance_every or 1
        passes = [part.guidance.passes for part in facts.segments if part.start <= facts.done][-1]
        if passes == 1 or every == 1:
            return
        later = None
        if (part := frame.sets % every) and facts.plan.guides(frame.sets, len(frame.sizes)):
            later = sum(frame.sizes[frame.sets : frame.sets - part + every])
        else:  # what is left of the last guided sets is not read again
            self.optional.add("open.differences")
        self.shapes["open.differences"] = (((passes - 1) * batch, later, width), floats)


def _check_tensor(name: str, value: Tensor, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    fits = len(value.shape) == len(shape) and all(
        size in (None, own) for size, own in zip(shape, value.shape, strict=True)
    )
    if not fits or value.dtype not in dtypes:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = f"{str(value.dtype).removeprefix('torch.')} {_of(tuple(value.shape))}"
        raise InputError(f"its tensor {name} is {got}: expected {kinds} {_of(shape)}")
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise InputError(f"its tensor {name} has values that are not finite: expected finite ones")


def _check_order(facts: SavedFacts, tensors: dict[str, Tensor], expected: _TensorCheck) -> None:
    """Orders of revelation have every token once; pixels are of one clip or of each, within [0, 1]."""
    every = torch.arange(expected.tokens)
    for name in ("order", "open.order"):
        if name in tensors and not bool((tensors[name].sort(dim=1).values == every).all()):
            raise InputError(f"its tensor {name} is no order: expected every token once")
    pixels = tensors.get("pixels")
    if pixels is not None:
        if pixels.shape[0] not in (1, facts.plan.batch):
            raise InputError(f"its pixels are of {pixels.shape[0]} clips: expected 1 or {facts.plan.batch}")
        if pixels.is_floating_point() and (bool((pixels < 0).any()) or bool((pixels > 1).any())):
            raise InputError("its pixels are outside of 0 to 1: expected pixels within")
    if "filled" in tensors and pixels is None:
        raise InputError("it has filled without pixels: expected both or none")


def _is_below(number: str, stop: int) -> bool:
    """True for the plain decimal number of a frame before `stop`."""
    return (
        number.isascii()
        and number.isdecimal()
        and len(number) < 16
        and str(int(number)) == number
        and int(number) < stop
    )


def _of(shape: tuple[int | None, ...]) -> str:
    return "x".join("any" if size is None else str(size) for size in shape) or "()"
