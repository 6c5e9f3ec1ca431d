"""Changes of the sentence, the motion or the guidance of a clip while it is made.

A change takes effect with a latent frame that is not begun. The request is then the one that had said so from the
start, on its timelines: the frames that are there are those of both, and so are the later ones.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nova_video.common.checks import check_number, quote
from nova_video.common.errors import InputError
from nova_video.common.option_fields import check_option
from nova_video.common.timeline import Timeline
from nova_video.model import NOVATransformer3DModel
from nova_video.pipeline.call_parts import Parts
from nova_video.pipeline.conditions import encode_prompts, segments_of
from nova_video.pipeline.offload import bring
from nova_video.pipeline.options import Options
from nova_video.pipeline.plan import Plan, check_plan
from nova_video.pipeline.progress import RequestProgress
from nova_video.pipeline.request import check_prompt
from nova_video.pipeline.sentences import Sentences
from nova_video.sampling.history import restore_context
from nova_video.sampling.state import SamplingState

NUMBERS = {"motion_flow": "motion", "guidance_scale": "guidance"}
"""Numbers that may change -> their keys in records."""


def next_frame(state: SamplingState) -> int:
    """The first latent frame that is not begun."""
    return state.done + (state.open is not None)


def change_request(
    progress: RequestProgress,
    parts: Parts,
    model: NOVATransformer3DModel,
    prompt: str | Sequence[str] | None,
    numbers: dict[str, float | None],
    at: int | None,
) -> tuple[int, tuple[str, ...]]:
    """Change a request that is being made -> the pixel frame from which it differs, and unknown words of the sentence.

    `numbers` are of `NUMBERS`, and `model` is the one that computes. An InputError leaves everything as it was.
    """
    given = {name: value for name, value in numbers.items() if value is not None}
    if prompt is None and not given:
        raise InputError("got none of prompt, motion_flow and guidance_scale: expected at least one of them to change")
    said = [] if prompt is None else _new_sentences(progress, prompt)
    frame = _frame_of(progress, at)
    first = progress.plan.first_pixel(frame)
    seconds = first / progress.plan.fps
    plan = _changed_plan(progress.plan, given, seconds)
    check_plan(plan, parts.capabilities)
    sentences = _changed_sentences(progress, parts, plan, said, seconds)
    bring(parts.transformer)
    sentences, changed = _changed_state(parts, plan, sentences, progress.state, frame)
    if plan.passes != progress.state.passes:
        changed = _with_passes(model, changed, plan)
    unknown = [parts.unknown_words([Timeline((0.0,), (text,))], [], plan) for text in said]
    progress.records = _changed_records(progress, said, unknown, given, seconds)
    progress.plan, progress.sentences = plan, sentences
    for name in ("segments", "cached_segment", "cache", "anchor", "open"):
        setattr(progress.state, name, getattr(changed, name))
    return first, tuple(dict.fromkeys(line for lines in unknown for line in lines))


# The parts of a change ------------------------------------------------------------------------------------------------


def _new_sentences(progress: RequestProgress, prompt: str | Sequence[str]) -> list[str]:
    """The new sentence of every prompt."""
    count = progress.sentences.prompts
    said = [prompt] * count if isinstance(prompt, str) else list(prompt) if isinstance(prompt, Sequence) else []
    if len(said) != count or not all(isinstance(text, str) for text in said):
        raise InputError(f"prompt is {quote(prompt)}: expected a sentence{f' or {count} of them' if count > 1 else ''}")
    check_prompt(said)
    if any(record.get("prompt") is None for record in progress.records):
        raise InputError("prompt cannot change in a clip that was begun with prompt_embeds: expected one of sentences")
    return said


def _frame_of(progress: RequestProgress, at: int | None) -> int:
    """The latent frame that a change takes effect with."""
    plan, earliest = progress.plan, next_frame(progress.state)
    if plan.num_frames == 1:
        raise InputError("num_frames is 1: expected a clip, since a picture has no later frame that could change")
    if at is not None:
        check_number("at", at, 0, integer=True, high=plan.num_frames, below=True)
    frame = earliest if at is None else plan.latent_at(at / plan.fps)
    if plan.latent_frames is not None and max(frame, earliest) >= plan.latent_frames:
        last = plan.first_pixel(plan.latent_frames - 1)
        if earliest >= plan.latent_frames:
            raise InputError(f"nothing can change any more: the clip's last frames, from {last} on, are begun")
        raise InputError(f"at is {at}: expected at most {last}, where the last frames that are made at once begin")
    if frame < earliest:
        raise InputError(f"at is {at}: expected at least {plan.first_pixel(earliest)}, the first frame not begun")
    return frame


def _changed_plan(plan: Plan, numbers: dict[str, float], seconds: float) -> Plan:
    if "guidance_scale" in numbers and plan.guidance_rule is not None:
        raise InputError("guidance_scale cannot change: this clip has a guidance_rule of its own")
    for name, value in numbers.items():
        if isinstance(value, Sequence | Timeline):
            raise InputError(f"{name} is {quote(value)}: expected a number")
        check_option(Options, name, value)
    return replace(plan, **{name: _later(name, getattr(plan, name), seconds, new) for name, new in numbers.items()})


def _changed_sentences(
    progress: RequestProgress, parts: Parts, plan: Plan, said: Sequence[str], seconds: float
) -> Sentences:
    """The sentences with the new sentences, and with negatives where guidance is new."""
    sentences = progress.sentences
    if said:
        known = _known_features(progress)
        known |= encode_prompts(parts, [text for text in dict.fromkeys(said) if text not in known])
        texts = tuple(known[text] for text in said)
        sentences = replace(sentences, moments=sentences.moments.changed(seconds, texts))
    if plan.passes > 1 and not sentences.negatives:
        records = progress.records[:: sentences.pictures]
        if any(record.get("prompt") is None for record in records):  # the padding table alone
            return replace(sentences, negatives=tuple(texts[:0] for texts in sentences.moments.values[0]))
        negatives = [record.get("negative") or "" for record in records]
        encoded = encode_prompts(parts, list(dict.fromkeys(negatives)))
        sentences = replace(sentences, negatives=tuple(encoded[text] for text in negatives))
    return sentences


def _known_features(progress: RequestProgress) -> dict[str, Tensor]:
    """The features of all that the request has said."""
    sentences, known = progress.sentences, {}
    for index, record in enumerate(progress.records[:: sentences.pictures]):
        said = Timeline.of("prompt", record["prompt"])
        for time, texts in zip(sentences.moments.times, sentences.moments.values, strict=True):
            known[said.at(time)] = texts[index]
    return known


def _changed_state(
    parts: Parts, plan: Plan, sentences: Sentences, state: SamplingState, frame: int
) -> tuple[Sentences, SamplingState]:
    """The state with new segments from `frame` on, and both without what is not read again."""
    used = min(state.cached_segment, state.segment_at(max(state.done - 1, 0)))
    before = [segment for segment in state.segments[used:] if segment.start < frame]
    if used:
        sentences = sentences.since(plan.first_pixel(before[0].start) / plan.fps)
    segments = segments_of(parts, plan, sentences, before, frame)
    return sentences, replace(state, segments=segments, cached_segment=state.cached_segment - used)


def _with_passes(model: NOVATransformer3DModel, state: SamplingState, plan: Plan) -> SamplingState:
    """The state with as many guidance passes as the plan has now: its cache is filled anew."""
    state = replace(state, cache=model.new_cache(plan.passes * plan.batch, state.positions))
    if state.open is not None:  # whose guidance has a single pass, before and after
        condition = torch.cat([state.open.condition[: plan.batch]] * plan.passes)
        state = replace(state, open=replace(state.open, condition=condition))
    restore_context(model, state)
    return state


def _changed_records(
    progress: RequestProgress,
    said: Sequence[str],
    unknown: Sequence[tuple[str, ...]],
    numbers: dict[str, float],
    seconds: float,
) -> list[dict[str, Any]]:
    """The records of a request that had said it all from the start."""
    records = []
    for index, before in enumerate(progress.records):
        record = {**before, "settings": dict(before["settings"])}
        if said:
            number = index // progress.sentences.pictures
            record["prompt"] = _later("prompt", before["prompt"], seconds, said[number])
            if lines := list(dict.fromkeys([*before.get("warnings", []), *unknown[number]])):
                record["warnings"] = lines
        for name, value in numbers.items():
            key = NUMBERS[name]
            record["settings"][key] = _later(name, before["settings"][key], seconds, value)
        records.append(record)
    return records


def _later(name: str, value: Any, seconds: float, new: Any) -> Any:
    """A constant or (seconds, value) pairs with another value from then on, as lists, which JSON has."""
    changed = Timeline.of(name, value).changed(seconds, new)
    if changed.is_constant:
        return changed.values[0]
    return [list(pair) for pair in zip(changed.times, changed.values, strict=True)]
