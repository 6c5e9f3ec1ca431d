"""The records inside the results: as `nova generate` writes them, so that `nova generate --like` makes them again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nova_video.io.files import file_mark
from nova_video.pipeline.generation import Generation
from nova_video.pipeline.saving import model_mark
from nova_video.serving.jobs import Job

NAMES = {"image": "image", "video": "continue", "mask_image": "mask"}
"""Inputs -> the settings that name them in records; of what is edited, the setting is `edited`."""


def complete_records(generation: Generation, job: Job, paths: Mapping[str, Path]) -> list[dict[str, Any]]:
    """The records of a generation with the names and marks of what was uploaded, and the mark of the model."""
    plan, state = generation.plan, generation.state
    names = {
        "edited" if plan.edits and kind != "mask_image" else NAMES[kind]: name for kind, name in job.inputs.items()
    }
    facts: dict[str, Any] = {"weights": model_mark(generation.parts.transformer)}
    if paths:
        facts["inputs"] = {path.name: file_mark(path) for path in paths.values()}
    own = {"sets_made": len(state.sizes_of(state.num_tokens)), **names}
    return [{**record, **facts, "settings": {**record["settings"], **own}} for record in generation.records]


def sentence_of_record(record: Mapping[str, Any]) -> str:
    """The sentence of a record, or those of its timeline, for lists."""
    prompt = record["prompt"]
    return prompt if isinstance(prompt, str) else ", then ".join(str(sentence) for _, sentence in prompt)


def with_length(record: dict[str, Any], frames: int) -> dict[str, Any]:
    """The record of a clip with the length that it has: it may have been stopped."""
    settings = record["settings"]
    if settings["num_frames"] in (frames, 1):
        return record
    return {**record, "settings": {**settings, "num_frames": frames}}
