"""A generation in a file: all that another process needs to resume it, with the same result as never stopping.

A safetensors file: tensors are the latents, what was given, the frame in hand and the random generators; its metadata
has the plan and where things stand, as JSON. Keys and values of the temporal cache are not in it: they are computed
again by the passes that had computed them. Weights are not in it either, only a mark of the model they belong to.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nova_video.common.checks import quote
from nova_video.common.errors import InputError, first_line
from nova_video.common.timeline import Timeline
from nova_video.io.files import atomic_path
from nova_video.io.text import parse_json
from nova_video.model import NOVATransformer3DModel
from nova_video.pipeline.call_parts import Parts
from nova_video.pipeline.decoding import check_frames
from nova_video.pipeline.offload import bring
from nova_video.pipeline.own_parts import parts_again
from nova_video.pipeline.plan import plan_as_json
from nova_video.pipeline.progress import GivenPixels, RequestProgress
from nova_video.pipeline.records import read_record
from nova_video.pipeline.saved_facts import SavedFacts, check_facts
from nova_video.pipeline.sentences import Sentences
from nova_video.sampling.context import Statistics
from nova_video.sampling.guidance import CONDITIONAL, Guidance
from nova_video.sampling.history import restore_context
from nova_video.sampling.random import RandomState
from nova_video.sampling.state import GivenFrame, OpenFrame, SamplingState, Segment

KEY = "nova_generation"
FORMAT = 2
OPEN_TENSORS = ("condition", "tokens", "embedded", "order", "differences")  # of the frame in hand


def model_mark(model: NOVATransformer3DModel) -> str:
    """A hash of the model's settings and of a few small weights, which differs from other models'."""
    settings = {name: value for name, value in sorted(model.config.items()) if not name.startswith("_")}
    if settings["head"] is None:  # as a config of before there were own heads
        del settings["head"]
    digest = hashlib.sha256(json.dumps(settings, default=list).encode())
    last = [*model.image_decoder.parameters()][-1]  # of the paper's head, the output's bias
    for weight in (model.mask_embed.bos_token, model.mask_embed.mask_token, last):
        digest.update(weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_progress(progress: RequestProgress, model: NOVATransformer3DModel, path: Path) -> None:
    """Write the file, whole or not at all. The caller makes sure that no set is being made."""
    state = progress.state
    tensors: dict[str, Tensor] = {}
    for name, frames in (("frames", state.frames), ("heard", state.noised_history)):
        tensors |= {f"{name}.{frame}": latents for frame, latents in frames.items()}
    texts: list[Tensor] = []
    segments = []
    for segment in state.segments:
        if not any(segment.text is text for text in texts):
            texts.append(segment.text)
        text = next(index for index, text in enumerate(texts) if segment.text is text)
        guidance = segment.guidance if isinstance(segment.guidance, Guidance) else CONDITIONAL  # the plan names a rule
        segments.append({"start": segment.start, "begin": segment.begin, "text": text, "guidance": asdict(guidance)})
    tensors |= {f"text.{index}": text for index, text in enumerate(texts)}
    features: list[Tensor] = []
    words = progress.sentences
    for row in (row for rows in (*words.moments.values, words.negatives) for row in rows):
        if not any(row is feature for feature in features):
            features.append(row)
    numbers = {id(feature): index for index, feature in enumerate(features)}
    tensors |= {f"feature.{index}": feature for index, feature in enumerate(features)}
    given = {}
    for frame, part in state.given.items():
        if frame >= state.done:  # earlier ones are among the frames
            given[frame] = part.redraw
            tensors[f"given.{frame}.latents"] = part.latents
            if part.mask is not None:
                tensors[f"given.{frame}.known"] = part.mask
    facts: dict[str, Any] = {
        "format": FORMAT,
        "model": model_mark(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "plan": plan_as_json(progress.plan),
        "output_type": progress.output_type,
        "bare": progress.unbatched,
        "seeds": list(progress.seeds),
        "emitted": progress.emitted,
        "notes": progress.notes,
        "records": progress.records,
        "passes": state.passes,
        "segments": segments,
        "sentences": {
            "times": words.moments.times,
            "texts": [[numbers[id(row)] for row in rows] for rows in words.moments.values],
            "negatives": [numbers[id(row)] for row in words.negatives],
            "pictures": words.pictures,
        },
        "given": given,
        "cached": state.cached,
        "built": state.built,
        "cached_segment": state.cached_segment,
        "done": state.done,
        "step": state.step,
        "generators": [str(generator.device) for generator in state.random.generators],
    }
    if state.order is not None:
        tensors["order"] = state.order
    if state.reference is not None:
        facts["reference"] = {"begin": state.reference.begin, "count": state.reference.count}
        tensors |= {"reference.mean": state.reference.mean, "reference.deviation": state.reference.deviation}
    if state.open is not None:
        facts["open"] = {"known": state.open.num_given, "sizes": state.open.sizes, "sets": state.open.sets}
        held = {name: getattr(state.open, name) for name in OPEN_TENSORS}
        tensors |= {f"open.{name}": tensor for name, tensor in held.items() if tensor is not None}
    for index, generator in enumerate(state.random.generators):
        tensors[f"generator.{index}"] = generator.get_state()
    if progress.given is not None:
        tensors["pixels"] = progress.given.frames
        if progress.given.filled is not None:
            tensors["filled"] = progress.given.filled
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        with atomic_path(path) as part_path:
            save_file(own, part_path, metadata={KEY: json.dumps(facts)})
    except SafetensorError as error:  # what it makes of a full disk; an older file stays as it was
        raise InputError(f"the state {path} could not be written: {first_line(error)}") from None


def load_progress(parts: Parts, path: Path, own_parts: Mapping[str, Any] | None = None) -> RequestProgress:
    """Read what was saved with the same model, and fill its temporal cache again.

    `own_parts` are the user's own parts of sampling, by option, which the file only names.
    """
    facts, tensors = load_file_facts(path)
    model = parts.transformer
    mark, dtype = model_mark(model), str(model.dtype).removeprefix("torch.")
    if (other := facts.get("dtype")) != dtype:
        raise InputError(f"{path} was saved with a model in {_word(other)}: expected {dtype}, this one's precision")
    if (other := facts.get("model")) != mark:  # weights in another precision have another
        raise InputError(f"{path} was saved with another model (mark {_word(other)}): expected {mark}, this one's")
    try:
        return _restore(parts, facts, tensors, own_parts or {})
    except InputError as error:
        raise InputError(f"{path} cannot be gone on with: {error}") from None


def _restore(
    parts: Parts, values: dict[str, Any], tensors: dict[str, Tensor], own_parts: Mapping[str, Any]
) -> RequestProgress:
    model, device = parts.transformer, parts.device
    facts = read_record(SavedFacts, values, "its record")
    facts = replace(facts, plan=replace(facts.plan, **parts_again(facts.plan, own_parts)))
    rule: Any = facts.plan.guidance_rule
    if rule is not None:
        facts = replace(facts, segments=tuple(replace(part, guidance=rule) for part in facts.segments))
    check_facts(facts, tensors, parts)
    plan = facts.plan
    generators = [_generator(place, tensors[f"generator.{i}"], device) for i, place in enumerate(facts.generators)]
    moved = {
        name: tensor.to(device) for name, tensor in tensors.items() if not name.startswith(("generator", "pixels"))
    }
    segments = [Segment(part.start, moved[f"text.{part.text}"], part.guidance, part.begin) for part in facts.segments]
    state = SamplingState.create(
        model,
        segments,
        **plan.sampling,
        random=RandomState(generators, device, model.dtype),
        passes=plan.passes,
        given={
            int(frame): GivenFrame(moved[f"given.{frame}.latents"], moved.get(f"given.{frame}.known"), redraw)
            for frame, redraw in facts.given.items()
        },
    )
    state.frames, state.noised_history = (_by_number(name, moved) for name in ("frames", "heard"))
    state.order = moved.get("order")
    state.cached = None if facts.cached is None else list(facts.cached)
    state.built, state.cached_segment = facts.built, facts.cached_segment
    state.done, state.step = facts.done, facts.step
    if facts.reference is not None:
        state.reference = Statistics(
            facts.reference.begin, facts.reference.count, moved["reference.mean"], moved["reference.deviation"]
        )
    if facts.open is not None:
        held: dict[str, Any] = {name: moved.get(f"open.{name}") for name in OPEN_TENSORS}
        state.open = OpenFrame(**held, num_given=facts.open.known, sizes=list(facts.open.sizes), sets=facts.open.sets)
        if state.open.sizes != state.sizes(state.done):
            sizes = state.sizes(state.done)
            raise InputError(f"its open frame's sizes are {quote(state.open.sizes)}: expected {quote(sizes)}")
    bring(model)
    restore_context(model, state)
    progress = RequestProgress(
        plan,
        state,
        output_type=facts.output_type,
        unbatched=facts.bare,
        seeds=facts.seeds,
        sentences=_sentences(facts, moved),
        given=GivenPixels(tensors["pixels"], tensors.get("filled")) if "pixels" in tensors else None,
        emitted=facts.emitted,
        notes=facts.notes,
        records=list(facts.records),
    )
    check_frames(parts, progress)
    return progress


def _sentences(facts: SavedFacts, tensors: dict[str, Tensor]) -> Sentences:
    """The features of the sentences; those that were one tensor are one again."""
    words = facts.sentences
    texts = tuple(tuple(tensors[f"feature.{index}"] for index in row) for row in words.texts)
    negatives = tuple(tensors[f"feature.{index}"] for index in words.negatives)
    return Sentences(Timeline(words.times, texts), negatives, words.pictures)


def _generator(place: str, state: Tensor, device: torch.device) -> torch.Generator:
    """A generator that stands where it stood, on the processor or on the model's kind of device."""
    try:
        if torch.device(place).type not in ("cpu", device.type):
            raise InputError(f"its random numbers are drawn on {place}: expected a model on such a device")
        generator = torch.Generator(place)
        generator.set_state(state)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"its generator on {quote(place)} cannot be restored: {first_line(error)}") from None
    return generator


def read_notes(path: str | Path) -> dict[str, Any]:
    """The `Generation.notes` in a file, without the model."""
    notes = load_file_facts(Path(path))[0].get("notes")
    if not isinstance(notes, dict):
        raise InputError(f"{path} has {quote(notes)} for notes: expected an object")
    return notes


def load_file_facts(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise InputError(f"there is no file {path}: expected a saved generation")
    try:
        with safe_open(path, framework="pt") as file:
            facts = parse_json((file.metadata() or {}).get(KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()} if facts else {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a saved generation: {first_line(error)}") from None
    if not isinstance(facts, dict):
        raise InputError(f"{path} is a safetensors file, but not a saved generation")
    if facts.get("format") != FORMAT:
        older = facts.get("format") == 1
        instead = "finish it with nova-video 0.1, or start anew" if older else "this version's"
        raise InputError(f"{path} was saved in format {quote(facts.get('format'))}: expected {FORMAT}, {instead}")
    return facts, tensors


def _word(value: object) -> str:
    return value if isinstance(value, str) and len(value) < 40 else quote(value)


def _by_number(name: str, tensors: dict[str, Tensor]) -> dict[int, Tensor]:
    """Tensors `name.0`, `name.1`, ... by number, in order."""
    numbers = sorted(int(key.removeprefix(f"{name}.")) for key in tensors if key.startswith(f"{name}."))
    return {number: tensors[f"{name}.{number}"] for number in numbers}
