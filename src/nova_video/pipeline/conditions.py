"""From prompts to the condition tokens that steer a clip: text features, segments of the clip, guidance passes.

Legend: B pictures or clips of the call, N guidance passes, T text tokens, D width.
"""

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
from nova_video.sampling.state import Segment
from nova_video.text.features import PretrainedTextEncoder, TextEncoder, encode_texts
from nova_video.text.load import check_own_encoder


def prompt_features(parts: Parts, request: GenerateRequest, plan: Plan) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Features (tokens, width) of every prompt for each of its moments, and of a negative for each, if guided."""
    count, guided = request.num_prompts, plan.passes > 1
    prompts = [timeline.values for timeline in request.prompts or []]
    negatives = request.negative_prompts
    if negatives is None and prompts and request.negative_prompt_embeds is None:
        negatives = [""]
    moments = list(zip(*prompts, strict=True))  # sentences of all prompts, one moment after the other
    sentences = [text for moment in moments for text in moment]
    encoded = encode_prompts(parts, list(dict.fromkeys([*sentences, *((negatives or []) if guided else [])])))
    if request.prompt_embeds is not None:
        texts = [list(request.prompt_embeds)]
    else:
        texts = [[encoded[text] for text in moment] for moment in moments]
    if not guided:
        return texts, []
    if negatives is not None:
        null = [encoded[text] for text in negatives]
    else:  # features of one's own, without negatives: the padding table alone
        null = list(request.negative_prompt_embeds or [texts[0][0][:0]])
    return texts, null * count if len(null) == 1 else null


def encode_prompts(parts: Parts, texts: list[str]) -> dict[str, Tensor]:
    """Features (tokens, width) by sentence."""
    if not texts:
        return {}
    encoder, config = _text_encoder_of(parts), parts.transformer.config
    if encoder.width != config.text_token_dim:
        raise InputError(f"the text encoder's features are {encoder.width} wide: expected {config.text_token_dim}")
    features, lengths = encode_texts(encoder, texts, config.text_token_len)
    rows = zip(texts, features, lengths.tolist(), strict=True)
    return {text: row[:length] for text, row, length in rows}


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
    parts: Parts, request: GenerateRequest, plan: Plan, texts: list[list[Tensor]], negatives: list[Tensor]
) -> list[Segment]:
    """The segments of a clip, from one change of prompt, motion score or guidance to the next."""
    moments = Timeline((0.0,), (0,))  # of the prompts
    if request.timeline is not None:
        moments = Timeline(request.timeline.times, tuple(range(len(texts))))
    timelines: tuple[Timeline[Any], ...] = (moments, plan.motion, plan.guidance)
    starts = sorted({plan.latent_at(time) for timeline in timelines for time in timeline.times})
    conditions: dict[tuple[int, float], Tensor] = {}
    segments: list[Segment] = []
    before, begin = 0, 0
    for start in starts:
        moment, motion, guidance = (_from_frame(timeline, plan, start) for timeline in timelines)
        if any(text is not last for text, last in zip(texts[moment], texts[before], strict=True)):
            begin = max(0, start - plan.context.carry)
        before = moment
        if (moment, motion) not in conditions:
            conditions[moment, motion] = _condition(parts, request, plan, texts[moment], negatives, motion)
        segments.append(Segment(start, conditions[moment, motion], guidance, begin))
    return segments


def _condition(
    parts: Parts,
    request: GenerateRequest,
    plan: Plan,
    texts: list[Tensor],
    negatives: list[Tensor],
    motion: float,
) -> Tensor:
    """Condition tokens (N * B, T, D) of every pass, in the order of `guidance.py`."""
    model, device = parts.transformer, parts.device
    features = texts + negatives * (plan.passes - 1)
    lengths = torch.tensor([len(row) for row in features], device=device)
    padded = torch.nn.utils.rnn.pad_sequence(
        [row.to(device, model.dtype) for row in features], batch_first=True
    )  # (N * prompts, T', text_token_dim)
    score, fps = (torch.full((len(features),), float(value), device=device) for value in (motion, plan.fps))
    text = model.embed_condition(padded, lengths, score, fps)  # (N * prompts, T, D)
    return text.repeat_interleave(request.num_images_per_prompt, dim=0)


def _from_frame(timeline: Timeline[Any], plan: Plan, frame: int) -> Any:
    """The value at a latent frame. A value takes over with the first frame that begins at its time or later."""
    return [
        value for time, value in zip(timeline.times, timeline.values, strict=True) if plan.latent_at(time) <= frame
    ][-1]
