"""The `nova generate` or `nova edit` command that makes what a job made."""

import math
import shlex
from collections.abc import Mapping
from typing import Any

from nova_video.common.option_fields import facts_of, is_timed, key_of, option_fields
from nova_video.pipeline.options import Options
from nova_video.serving.jobs import Job

OWN_MODEL = "emoji"
START_FLAGS = {"image": "--image", "video": "--continue"}
"""Inputs that a clip begins with -> their flags."""
CHANGEABLE = ("prompt", "motion_flow", "guidance_scale")
"""Settings that may change while a job runs."""
LENGTHS = ("num_frames", "seconds")


def command_line(job: Job) -> str | None:
    """A line for a shell, in which uploads are files of their names. None: no one command makes the same."""
    request = {name: value for name, value in job.request.items() if value is not None}
    if "prompt" not in request:
        return None
    for name in CHANGEABLE:
        request[name] = _with_changes(job, name, request.get(name))
    pairs = request["prompt"]
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        return None
    edits = "mask_image" in job.inputs or "strength" in request
    if edits and len(pairs) > 1:
        return None
    given = next((name for name in START_FLAGS if name in job.inputs), None)
    words = ["nova", "edit" if edits else "generate"]
    if edits and given is not None:
        words.append(job.inputs[given])
    words.append(pairs[0][1])
    for seconds, sentence in pairs[1:]:
        words += ["--prompt-at", _number(seconds), sentence]
    if "mask_image" in job.inputs:
        words += ["--mask", job.inputs["mask_image"]]
    if given is not None and not edits:
        words += [START_FLAGS[given], job.inputs[given]]
    if job.model != OWN_MODEL:
        words += ["--model", job.model]
    if (count := request.get("num_images_per_prompt", 1)) != 1:
        words += ["-n", str(count)]
    if negative := request.get("negative_prompt"):
        words += ["--negative", negative]
    if job.stopped:
        request = _stopped_request(job, request)
    return shlex.join([*words, *option_words(request)])


def _with_changes(job: Job, name: str, value: Any) -> Any:
    """A setting with what was changed on the way, as (seconds, value) pairs. None: it was never set."""
    held = [each for each in job.steps if each.state == "in_effect" and each.frame is not None]
    changes = [(each.frame, each.values[name]) for each in held if name in each.values]
    if value is None and changes:
        value = job.settings[name]
    if value is None or (isinstance(value, list) and not changes) or (name != "prompt" and not changes):
        return value
    pairs = [(0.0, value)] if not isinstance(value, list | tuple) else [(each[0], each[1]) for each in value]
    for frame, new in changes:
        assert frame is not None
        seconds = frame / job.settings["fps"]
        pairs = [pair for pair in pairs if pair[0] < seconds] + [(seconds, new)]
    return pairs


def _stopped_request(job: Job, request: Mapping[str, Any]) -> dict[str, Any]:
    """The request for as many frames as a job was stopped at. Without end, it has a context of its own."""
    context = {"context_frames": job.settings["context_frames"]} if "inf" in request.values() else {}
    kept = {name: value for name, value in request.items() if name not in LENGTHS}
    return context | kept | {"num_frames": job.frames}


def option_words(request: Mapping[str, Any]) -> list[str]:
    """The flags of a request's settings that are not as by default."""
    words: list[str] = []
    for name, each in option_fields(Options).items():
        value = request.get(name, each.default)
        if value is None or value == each.default or (not facts_of(each).recorded and name not in LENGTHS):
            continue
        flag = f"--{key_of(each).replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif is_timed(each) and isinstance(value, list | tuple):
            words += [flag, _number(value[0][1])]
            for seconds, later in value[1:]:
                words += [f"{flag}-at", _number(seconds), _number(later)]
        else:
            words += [flag, value if isinstance(value, str) else _number(value)]
    return words


def _number(value: float) -> str:
    whole = isinstance(value, float) and math.isfinite(value) and value == int(value)
    return str(int(value)) if whole else str(value)
