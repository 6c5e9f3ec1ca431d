"""From prompts to the condition tokens that steer a clip: text features, segments of the clip, guidance passes.

Legend: B pictures or clips of the call, N guidance passes, T text tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nova_video.common.errors import InputError
from nova_video.common.extensions import names_extension
from nova_video.common.timeline import Timeline
from nova_video.pipeline.call_parts import Parts
from nova_video.pipeline.loading import is_own_part
from nova_video.pipeline.offload import bring
from nova_video.pipeline.plan import Plan
from nova_video.pipeline.request import GenerateRequest
from nova_video.pipeline.sentences import Sentences
from nova_video.sampling.state import Segment
from nova_video.text.features import PretrainedTextEncoder, TextEncoder, encode_texts
from nova_video.text.load import check_own_encoder


def sentences_of(parts: Parts, request: GenerateRequest, plan: Plan) -> Sentences:
    """The features of every prompt for each of its moments, and of a negative for each, if guided."""
    count, guided = request.num_prompts, plan.passes > 1
    prompts = [timeline.values for timeline in request.prompts or []]
    negatives = request.negative_prompts
    if negatives is None and prompts and request.negative_prompt_embeds is None:
        negatives = [""]
    moments = list(zip(*prompts, strict=True))  # sentences of all prompts, one moment after the other
    sentences = [text for moment in moments for text in moment]
    encoded = encode_prompts(parts, list(dict.fromkeys([*sentences, *((negatives or []) if guided else [])])))
    if request.prompt_embeds is not None:
        texts = Timeline((0.0,), (tuple(request.prompt_embeds),))
    else:
        assert request.timeline is not None
        said = tuple(tuple(encoded[text] for text in moment) for moment in moments)
        texts = Timeline(request.timeline.times, said)
    null = list(request.negative_prompt_embeds or [])
    if guided and negatives is not None:
        null = [encoded[text] for text in negatives]
    elif guided and not null:  # features of one's own, without negatives: the padding table alone
        null = [texts.values[0][0][:0]]
    return Sentences(texts, tuple(null * count if len(null) == 1 else null), request.num_images_per_prompt)


def encode_prompts(parts: Parts, texts: list[str]) -> dict[str, Tensor]:
    """Features (tokens, width) by sentence. On a processor each is encoded alone, the same beside any others."""
    if not texts:
        return {}
    encoder, config = _text_encoder_of(parts), parts.transformer.config
    if encoder.width != config.text_token_dim:
        raise InputError(f"the text encoder's features are {encoder.width} wide: expected {config.text_token_dim}")
    encoded: dict[str, Tensor] = {}
    for part in [[text] for text in texts] if parts.device.type == "cpu" else [texts]:
        features, lengths = encode_texts(encoder, part, config.text_token_len)
        rows = zip(part, features, lengths.tolist(), strict=True)
        encoded |= {text: row[:length] for text, row, length in rows}
    return encoded


def _text_encoder_of(parts: Parts) -> TextEncoder:
    """The checkpoint's own text encoder or the one its settings name, loaded when a call first needs it."""
    model, tokenizer, name = parts.text_encoder, parts.tokenizer, parts.settings.text_encoder
    if is_own_part("text_encoder", model):
        own: TextEncoder = check_own_encoder(model)
        return own
    if model is None or tokenizer is None:
        if name is None or model is not None or tokenizer is not None:
            missing = "text_encoder/" if model is None else "tokenizer/"
            raise InputError(f"the checkpoint has no {missing}: expected prompt_embeds instead of a prompt")
        if names_extension(name):
            raise InputError(
                f"the checkpoint's nova.json names the text encoder {name!r}, which is no part of it: expected it"
                " to be given as text_encoder"
            )
        try:
            tokenizer, model = parts.named_encoder.load(name, parts.dtype, parts.device)
        except InputError as error:
            raise InputError(
                f"{error}; the checkpoint's nova.json names it: expected another name there, or text_encoder/ and"
                " tokenizer/ beside it"
            ) from None
    bring(model)
    return PretrainedTextEncoder(tokenizer, model, parts.device)


def segments_of(
    parts: Parts, plan: Plan, sentences: Sentences, before: Sequence[Segment] = (), start: int = 0
) -> list[Segment]:
    """The segments of a clip, from one change of prompt, motion score or guidance to the next.

    Those of `before` stay, with as many passes as the plan has, and the others begin at the latent frame `start`.
    """
    conditions = Conditions(parts, plan, sentences)
    if before and len(before[0].text) == plan.passes * plan.batch:
        conditions.made.update({conditions.key(segment.start): segment.text for segment in before})
    segments = [replace(segment, text=conditions.at(segment.start)) for segment in before]
    timelines: tuple[Timeline[Any], ...] = (sentences.moments, plan.motion, plan.guidance)
    changes = {plan.latent_at(time) for timeline in timelines for time in timeline.times}
    for frame in sorted({start, *(change for change in changes if change > start)}):
        begin = 0
        if segments:
            texts, others = (value_at(sentences.moments, plan, each) for each in (frame, segments[-1].start))
            changed = any(text is not other for text, other in zip(texts, others, strict=True))
            begin = max(0, frame - plan.context.carry) if changed else segments[-1].begin
        segments.append(Segment(frame, conditions.at(frame), value_at(plan.guidance, plan, frame), begin))
    return segments


@dataclass(frozen=True, eq=False)
class Conditions:
    """The condition tokens of a clip's frames: frames of one sentence and motion score have the same tensor."""

    parts: Parts
    plan: Plan
    sentences: Sentences
    made: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    def key(self, frame: int) -> tuple[object, ...]:
        """The sentences and the motion score of a latent frame."""
        texts = value_at(self.sentences.moments, self.plan, frame)
        return (*map(id, texts), value_at(self.plan.motion, self.plan, frame))

    def at(self, frame: int) -> Tensor:
        """Condition tokens (N * B, T, D) of every pass, in the order of `guidance.py`."""
        key = self.key(frame)
        if key not in self.made:
            self.made[key] = self._embed(frame)
        return self.made[key]

    def _embed(self, frame: int) -> Tensor:
        model, device, plan = self.parts.transformer, self.parts.device, self.plan
        motion = value_at(plan.motion, plan, frame)
        features = [*value_at(self.sentences.moments, plan, frame), *self.sentences.negatives * (plan.passes - 1)]
        lengths = torch.tensor([len(row) for row in features], device=device)
        padded = torch.nn.utils.rnn.pad_sequence(
            [row.to(device, model.dtype) for row in features], batch_first=True
        )  # (N * prompts, T', text_token_dim)
        score, fps = (torch.full((len(features),), float(value), device=device) for value in (motion, plan.fps))
        text = model.embed_condition(padded, lengths, score, fps)  # (N * prompts, T, D)
        return text.repeat_interleave(self.sentences.pictures, dim=0)


def value_at(timeline: Timeline[Any], plan: Plan, frame: int) -> Any:
    """The value at a latent frame. A value takes over with the first frame that begins at its time or later."""
    return [
        value for time, value in zip(timeline.times, timeline.values, strict=True) if plan.latent_at(time) <= frame
    ][-1]
