"""The record of how a picture or clip was made, which files carry inside: of the command line and of Python."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from nova_video import __version__
from nova_video.model.lora import active_adapters

if TYPE_CHECKING:
    from nova_video.pipeline.generation import Generation
    from nova_video.pipeline.request import GenerateRequest
    from nova_video.pipeline.timeline import Timeline

T = TypeVar("T")

SHORTCUTS = ("solver", "last_steps", "guided_sets", "guidance_every", "fp8")  # a preset's sets and steps are numbers


def make_record(
    request: "GenerateRequest", generation: "Generation", given: Mapping[str, Any], origin: Mapping[str, Any]
) -> dict[str, Any]:
    """What a file says of how it was made.

    `given` is what there was beside a sentence, and `origin` names the model and its adapters.
    """
    plan, parts = generation.plan, generation.parts
    read, kept = plan.context.frames, plan.context.sink  # latent frames
    stride = plan.temporal_stride
    settings = {
        "width": plan.width,
        "height": plan.height,
        "num_frames": plan.num_frames,
        "fps": plan.fps,
        **given,
        "sets": plan.num_inference_steps,
        "diffusion_steps": plan.num_diffusion_steps,
        "preset": request.preset or "exact",
        **{name: getattr(plan.shortcuts, name) for name in SHORTCUTS},
        "guidance": _as_json(plan.guidance, lambda guidance: guidance.scale),
        "motion": _as_json(plan.motion_flow, float),
        "context_frames": None if read is None else stride * (read - 1) + 1,
        "sink_frames": None if read is None else stride * (kept - 1) + 1,
        "reanchor_frames": stride * (plan.context.reanchor or 0),
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
    guidance = plan.guidance.values[0]
    others = {
        "scheduler": type(parts.scheduler).__name__,
        "guidance_trunc": guidance.trunc,
        "guidance_renorm": guidance.renorm,
        "image_guidance": guidance.image_scale,
        "flow_shift": plan.flow_shift,
        "given_frames": plan.given_frames or None,
        "edited": True if plan.edits else None,
        "strength": request.strength,
        "history_noise": plan.context.history_noise,
        "hold_statistics": plan.context.hold_statistics,
    }
    given = {name: value for name, value in others.items() if value is not None}
    origin: dict[str, Any] = {"model": parts.name}
    if adapters := active_adapters(parts.transformer):
        origin["adapters"] = adapters
    whole = make_record(request, generation, given, origin)
    several = isinstance(request.prompt, list | tuple) and request.prompts is not None
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
    """What JSON lacks: NumPy's numbers as Python's, and any other value by its name."""
    return value.item() if hasattr(value, "item") else str(value)


def _as_json(timeline: "Timeline[T]", value: Callable[[T], float]) -> float | list[list[float]]:
    """A number, or (seconds, number) pairs."""
    if timeline.is_constant:
        return value(timeline.values[0])
    return [[at, value(moment)] for at, moment in zip(timeline.times, timeline.values, strict=True)]
