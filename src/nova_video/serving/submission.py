"""Checks of a request before it is queued. All that is wrong with it is found here.

Settings are those of `GenerateRequest`, by their names, as JSON has them. Media are files in the job's folder.
"""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch

from nova_video.common.checks import check_number, quote
from nova_video.common.errors import InputError, unknown
from nova_video.common.option_fields import check_option, option_fields, values_of, without_aliases
from nova_video.io.decode import PICTURES, VIDEOS
from nova_video.io.media import load_image
from nova_video.pipeline.options import Options
from nova_video.pipeline.own_parts import CHECKS
from nova_video.pipeline.pipeline import NovaPipeline
from nova_video.pipeline.plan import Plan, size_problem
from nova_video.pipeline.request import GenerateRequest, check_prompt
from nova_video.serving.jobs import Job, Kind
from nova_video.serving.serve_settings import ServeSettings

MEDIA = ("image", "video", "mask_image")
SERVERS_OWN = ("output_type", "memory_gb", "negative_prompt_embeds", "prompt_embeds")
"""Fields of a request that are the server's to choose, or not for JSON."""
SEEDS = 2**31  # a seed that is drawn is below it: every client's JSON holds it


@dataclass(frozen=True, eq=False)
class Upload:
    """A picture or clip that came with a request."""

    data: bytes
    suffix: str = ""
    """The extension of its name, which tells its kind where the content does not."""

    @property
    def safe_suffix(self) -> str:
        """The extension, if it is one of pictures or clips."""
        suffix = PurePath(f"x{self.suffix}").suffix.lower()
        return suffix if suffix in (*PICTURES, *VIDEOS) else ""


def checked_options(kind: Kind, options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under their own names, with a seed; InputError for what a request may not say."""
    known = [name for name in option_fields(GenerateRequest) if name not in (*SERVERS_OWN, *CHECKS)]
    values = without_aliases(GenerateRequest, options)
    for name in values:
        if name in CHECKS:
            raise InputError(f"{name} is {values[name]!r}: expected none, a server runs no code that a request names")
        if name not in known:
            raise unknown("setting", name, known)
    values = {name: value for name, value in values.items() if value is not None}
    if kind == "image" and values.setdefault("num_frames", 1) != 1:
        raise InputError(f"num_frames is {values['num_frames']}: expected 1 of a picture")
    values.setdefault("seed", secrets.randbelow(SEEDS))
    return values


def as_json(options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that JSON can hold: no end is the word inf."""
    return {name: "inf" if value == math.inf else value for name, value in options.items()}


def request_of(options: Mapping[str, Any], paths: Mapping[str, Path]) -> GenerateRequest:
    """The request of settings as JSON has them, and of files."""
    values: dict[str, Any] = {name: math.inf if value == "inf" else value for name, value in options.items()}
    media: dict[str, Any] = {name: path for name, path in paths.items() if name != "image"}
    if "image" in paths:
        media["image"] = load_image(paths["image"])
    return GenerateRequest(**values, **media, output_type="np")


def generators_of(request: GenerateRequest, device: torch.device) -> list[torch.Generator] | None:
    """One generator for each of several pictures, with the next seeds. Each picture is the one it is alone."""
    count = request.num_prompts * request.num_images_per_prompt
    if count == 1:
        return None
    return [torch.Generator(device).manual_seed((request.seed or 0) + number) for number in range(count)]


def check_request(pipe: NovaPipeline, kind: Kind, settings: ServeSettings, request: GenerateRequest) -> Plan:
    """The plan of a request. InputError for what this model or this server does not do."""
    plan = request.resolve(pipe.defaults, pipe.capabilities)
    if plan.height * plan.width > settings.max_pixels:
        raise InputError(
            f"size is {plan.width}x{plan.height}: expected at most {settings.max_pixels:,} pixels on this server"
        )
    if plan.num_frames is None and kind != "session":
        raise InputError("num_frames is inf: expected a number of frames; only a live session has no end")
    if plan.num_frames is not None and plan.num_frames > settings.max_frames:
        raise InputError(f"num_frames is {plan.num_frames}: expected at most {settings.max_frames:,} on this server")
    if kind == "image" and plan.num_frames != 1:
        raise InputError(f"the result has {plan.num_frames} frames: expected 1 of a picture")
    if kind != "image" and plan.batch != 1:
        raise InputError(f"the request asks for {plan.batch} clips: expected one; several are requests of their own")
    if kind == "image":
        plan.check_pixels()
    return plan


def check_change(job: Job, values: Mapping[str, Any], frame: int | None) -> None:
    """Raises InputError for a change that this job cannot have."""
    if job.status.ended or job.kind == "image":
        state = "a picture" if job.kind == "image" else str(job.status)
        raise InputError(f"{job.id} is {state}: expected a video that is being made")
    if not values:
        raise InputError("got none of prompt, motion_flow and guidance_scale: expected at least one of them to change")
    for name, value in values.items():
        if name == "prompt":
            if not isinstance(value, str):
                raise InputError(f"prompt is {quote(value)}: expected a sentence")
            check_prompt(value)
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{name} is {quote(value)}: expected a number")
        else:
            check_option(Options, name, value)
    if frame is None:
        return
    check_number("frame", frame, job.frames, integer=True)
    end = job.settings["num_frames"]
    if end != "inf" and end is not None and frame >= end:
        raise InputError(f"frame is {frame}: expected less than {end}, the frames of the video")


def settings_of(plan: Plan) -> dict[str, Any]:
    """All settings of a plan, as JSON has them."""
    values = {name: value for name, value in values_of(plan, Options).items() if name not in CHECKS}
    return as_json(values)


def sentence_of(request: GenerateRequest) -> str:
    """The sentence, or those of a timeline or of several prompts, for lists."""
    prompts = request.prompts or []
    return "; ".join(", then ".join(map(str, timeline.values)) for timeline in prompts)


def warnings_of(pipe: NovaPipeline, request: GenerateRequest, plan: Plan) -> list[str]:
    """One line for a size that is not the model's own, and one for each unknown word of the prompts."""
    size, vocabulary = size_problem(plan, pipe.capabilities), pipe.settings.vocabulary
    found = [] if size is None else [size]
    if vocabulary is None:
        return found
    texts: Sequence[str] = [text for timeline in request.prompts or [] for text in timeline.values]
    return [*found, *vocabulary.check(texts, request.negative_prompts or [], picture=plan.num_frames == 1)]
