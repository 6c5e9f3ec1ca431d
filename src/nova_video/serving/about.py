"""Facts about the loaded model for pages and clients: its words, defaults, bounds and settings, from its own files."""

import re
from dataclasses import asdict
from itertools import cycle
from typing import TYPE_CHECKING, Any

from nova_video import __version__
from nova_video.common.option_fields import json_schema, option_fields, values_of
from nova_video.pipeline.options import (
    ContextOptions,
    GuidanceOptions,
    LengthOptions,
    PresetOptions,
    StepOptions,
)
from nova_video.pipeline.own_parts import CHECKS
from nova_video.pipeline.request import GenerateRequest
from nova_video.sampling.presets import PRESETS, SpeedOptions
from nova_video.serving.serve_settings import ServeSettings
from nova_video.text.vocabulary import TEMPLATE, Vocabulary

if TYPE_CHECKING:
    from nova_video.pipeline.pipeline import NovaPipeline

GROUPS = (LengthOptions, StepOptions, PresetOptions, GuidanceOptions, SpeedOptions, ContextOptions)
"""Records of settings that a request may have. Each is a group of a form. Those of the machine are the server's own."""
LIMITS_SHOWN = ("body_mb", "max_pixels", "max_frames", "max_session", "keep_days")
EXAMPLES = 8


def about_model(pipe: "NovaPipeline", settings: ServeSettings, name: str) -> dict[str, Any]:
    """The facts about a model, in types that JSON has."""
    model, vocabulary = pipe.capabilities, pipe.settings.vocabulary
    height, width = model.image_size
    sizes = {"width": width, "height": height, "size_multiple": model.size_multiple, "any_size": model.any_size}
    bounds = values_of(settings)
    return {
        "model": name,
        "version": __version__,
        "video": model.video and model.temporal_stride > 1,
        "temporal_stride": model.temporal_stride,
        "sizes": sizes,
        "defaults": {"width": width, "height": height, **asdict(pipe.defaults)},
        "limits": {name: bounds[name] for name in LIMITS_SHOWN},
        "presets": {name: values_of(preset) for name, preset in PRESETS.items()},
        "groups": [_group(record) for record in GROUPS],
        "request": json_schema(GenerateRequest),
        "words": None if vocabulary is None else about_words(vocabulary),
    }


def about_words(vocabulary: Vocabulary) -> dict[str, Any]:
    """The words of a small model, and sentences made of them."""
    return {
        "lists": [asdict(each) for each in vocabulary.words],
        "clips": vocabulary.clips,
        "pictures": vocabulary.pictures,
        "examples": example_sentences(vocabulary),
    }


def example_sentences(vocabulary: Vocabulary, count: int = EXAMPLES) -> list[str]:
    """Sentences for clips, each of other words of the lists, and each one that the model knows."""
    if not vocabulary.clips:
        return []
    phrases = {kind: cycle(_spread(vocabulary, kind, count)) for kind in {each.kind for each in vocabulary.words}}
    template = re.sub(r" ?\[[^\[\]]*\](?=\])|[\[\]]", "", vocabulary.clips[0])  # of nested parts, the outer one
    return [
        TEMPLATE.sub(lambda match: next(phrases[match[1]]) if match[1] else match[0], template) for _ in range(count)
    ]


def _spread(vocabulary: Vocabulary, kind: str, count: int) -> list[str]:
    """So many phrases of a kind, from all over its lists."""
    lists = [each.phrases for each in vocabulary.words if each.kind == kind]
    found = [
        phrases[(2 * index + 1) * len(phrases) // (2 * count) % len(phrases)]
        for index in range(count)
        for phrases in lists
    ]
    return list(dict.fromkeys(found))


def prompt_problems(vocabulary: Vocabulary | None, prompts: list[str], negative: str, picture: bool) -> tuple[str, ...]:
    """The parts of sentences that a model does not know, one line each. A model of any text knows them all."""
    return () if vocabulary is None else vocabulary.check(prompts, [negative] if negative else [], picture)


def _group(record: type[Any]) -> dict[str, Any]:
    title = (record.__doc__ or "").partition(".")[0]
    return {"title": title, "names": [name for name in option_fields(record) if name not in CHECKS]}
