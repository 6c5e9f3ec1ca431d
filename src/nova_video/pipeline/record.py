"""The record inside a file, which tells how a picture or clip was made."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nova_video import __version__
from nova_video.common.option_fields import facts_of, key_of, option_fields
from nova_video.common.timeline import is_timeline
from nova_video.model.lora import active_adapters
from nova_video.pipeline.options import Options
from nova_video.pipeline.own_parts import part_names

if TYPE_CHECKING:
    from nova_video.pipeline.generation import Generation
    from nova_video.pipeline.request import GenerateRequest


def make_record(
    request: "GenerateRequest", generation: "Generation", given: Mapping[str, Any], origin: Mapping[str, Any]
) -> dict[str, Any]:
    """The record of a file: how it was made.

    `given` is what there was beside a sentence, and `origin` names the model and its adapters.
    """
    plan, parts = generation.plan, generation.parts
    recorded = {name: each for name, each in option_fields(Options).items() if facts_of(each).recorded}
    del recorded["seed"]  # each picture of a call has its own
    settings = {
        **{key_of(each): getattr(plan, name) for name, each in recorded.items()},
        **{name: value for name, value in part_names(plan).items() if value is not None},
        **({} if plan.guidance_rule is None else {"guidance": None}),  # a setting of the paper's rule
        **given,
        "device": str(parts.device),
        "dtype": str(parts.dtype).removeprefix("torch."),
    }
    record = {"prompt": request.prompt, "negative": request.negative_prompt, "seed": request.seed}
    unknown = parts.unknown_words(request.prompts or [], request.negative_prompts or [], plan)
    said = {"warnings": list(unknown)} if unknown else {}
    return {**record, **origin, **said, "settings": settings, "nova_video": __version__}


def make_records(request: "GenerateRequest", generation: "Generation") -> list[dict[str, Any]]:
    """The record of every picture or clip of a call from Python."""
    plan, parts = generation.plan, generation.parts
    others = {
        "scheduler": type(parts.scheduler).__name__,
        "given_frames": plan.given_frames or None,
        "edited": True if plan.edits else None,
    }
    given = {name: value for name, value in others.items() if value is not None}
    origin: dict[str, Any] = {"model": parts.name}
    if adapters := active_adapters(parts.transformer):
        origin["adapters"] = adapters
    whole = make_record(request, generation, given, origin)
    several = isinstance(request.prompt, list | tuple) and not is_timeline(request.prompt)
    several = several and len(request.prompts or []) == len(request.prompt or "")
    records = []
    for index in range(plan.batch):
        number = index // request.num_images_per_prompt
        negatives: Sequence[str | None] = request.negative_prompts or (None,)
        seeds = generation.seeds
        own: dict[str, Any] = {
            "prompt": request.prompt[number] if several and request.prompt is not None else request.prompt,
            "negative": negatives[number % len(negatives)],
            "seed": seeds[index % len(seeds)],
        }
        if plan.batch > 1 and len(seeds) == 1:  # one generator draws for all of them
            own |= {"picture": index + 1, "pictures": plan.batch}
        records.append({**whole, **own})
        if several and "warnings" in whole:  # those of this picture's own prompt
            prompts = (request.prompts or [])[number : number + 1]
            negative = [own["negative"]] if own["negative"] else []
            records[-1]["warnings"] = list(parts.unknown_words(prompts, negative, plan))
    made: list[dict[str, Any]] = json.loads(json.dumps(records, default=_plain))
    return made


def _plain(value: Any) -> Any:
    """Converts values for JSON: NumPy's numbers to Python's, and any other value to its name."""
    return value.item() if hasattr(value, "item") else str(value)
