"""Makes requests and a pipeline of typed flags, for single runs and batches. No heavy import before it is used."""

import logging
import os
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nova_video.cli.arguments import CommonFlags, model_of
from nova_video.cli.console import checkpoint_defaults, outline_pipeline, size_of
from nova_video.cli.flags import given_options
from nova_video.cli.script import OPTIONS, TIMELINE_KEYS
from nova_video.common.errors import InputError
from nova_video.common.option_fields import key_of
from nova_video.pipeline.options import Options

if TYPE_CHECKING:
    from nova_video.pipeline.plan import Plan
    from nova_video.pipeline.request import GenerateRequest

log = logging.getLogger(__name__)


def text_of(name: str, typed: str) -> str:
    """The typed text. Bytes that the terminal's encoding does not have are read as UTF-8."""
    if not any("\ud800" <= letter <= "\udfff" for letter in typed):
        return typed
    try:
        return os.fsencode(typed).decode()
    except UnicodeError:
        raise InputError(f"{name} is {typed!r}: expected text in UTF-8 or in the terminal's encoding") from None


def flag_of(name: str) -> str:
    """How a field of a command is typed."""
    if name == "prompt":
        return "a sentence"
    each = OPTIONS.get(name)
    key = {"video": "continue"}.get(name, name) if each is None else key_of(each)
    return f"--{'no-' if each is not None and each.default is True else ''}{key.replace('_', '-')}"


def seed_of(args: CommonFlags) -> int:
    return secrets.randbelow(2**32) if args.seed is None else args.seed


def request_of(args: CommonFlags, prompt: str, **media: Any) -> "GenerateRequest":
    """The request of a command, without a seed."""
    from nova_video.pipeline.request import GenerateRequest

    return GenerateRequest(prompt=prompt, output_type="np", **media, **settings_of(args))


def settings_of(args: CommonFlags) -> dict[str, Any]:
    """The settings of a request that a command's flags give, by their names."""
    if args.size is not None and (args.width is not None or args.height is not None):
        raise InputError("got --size with --width or --height: expected one way to say the size")
    options = given_options(args, Options)
    if args.size is not None:
        options["height"], options["width"] = size_of(args.size)
    for key, name in TIMELINE_KEYS.items():
        if later := getattr(args, f"{key}_at"):
            first = options[name] if name in options else getattr(checkpoint_defaults(model_of(args)), name)
            options[name] = [(0.0, first), *later]
    if args.negative is not None:
        options["negative_prompt"] = text_of("--negative", args.negative)
    return options


def check_requests(args: CommonFlags, requests: "Sequence[GenerateRequest]") -> "list[Plan]":
    """Say what is wrong with any request before the model's weights are read."""
    from nova_video.pipeline.plan import size_problem

    outline = outline_pipeline(model_of(args), args.head)
    can = outline.capabilities
    plans = [request.resolve(outline.defaults, can) for request in requests]
    if (problem := size_problem(plans[0], can)) is not None:
        log.warning("%s", problem)
    return plans
