"""Turns the settings of `GenerateRequest` into widgets of ComfyUI, and the values of widgets back into settings.

A widget always has a value. Where the model has its own default, -1 or the first choice leaves the setting to it.
"""

from collections.abc import Container, Mapping
from typing import Any

from comfy_api.latest import io

from nova_video import GenerateRequest, InputError
from nova_video.common.option_fields import check_option, choices_of, facts_of, kind_of, option_fields
from nova_video.pipeline.options import ContextOptions
from nova_video.pipeline.own_parts import CHECKS

UNSET = -1
LEAVE = "as the model has it"
SEED = "seed"
EXACT = 2**53 - 1
"""The largest whole number that a browser holds exactly."""
STEP = 0.01

FIELDS = option_fields(GenerateRequest)
NO_WIDGET = {*CHECKS, "output_type"}
"""Settings without a widget: a workflow from a stranger must not name code to run, and nodes fix the output."""
OF_CLIPS = {"num_frames", "seconds", "fps", "motion_flow", "image_guidance_scale", *option_fields(ContextOptions)}
"""Settings that a single picture has no use for."""
COMMON = {"prompt", "negative_prompt", "width", "height", "num_frames", "fps", "seed", "sets", "guidance_scale"}
COMMON |= {"motion_flow", "strength", "preset", "num_images_per_prompt"}
"""Settings that every user meets; ComfyUI hides the others behind "show advanced inputs"."""


def setting_inputs(without: Container[str] = ()) -> list[io.Input]:
    """The widgets of all settings but those named, the prompt first."""
    names = [name for name in FIELDS if name not in NO_WIDGET and name not in without]
    return [setting_input(name) for name in sorted(names, key=lambda name: name != "prompt")]


def setting_input(name: str) -> io.Input:
    """The widget of one setting."""
    each, facts, kind = FIELDS[name], facts_of(FIELDS[name]), kind_of(FIELDS[name])
    left = f" {{}}: {facts.unset or 'none'}."
    common = {"optional": name != "prompt", "extra_dict": {} if name in COMMON else {"advanced": True}}
    if name == SEED:
        return io.Int.Input(
            name, tooltip=facts.help, default=0, min=0, max=EXACT, control_after_generate=True, **common
        )
    if choices := choices_of(kind):
        tooltip = facts.help + left.format(LEAVE)
        return io.Combo.Input(name, options=[LEAVE, *choices], default=LEAVE, tooltip=tooltip, **common)
    if kind is bool and each.default is None:
        tooltip = facts.help + left.format(LEAVE)
        return io.Combo.Input(name, options=[LEAVE, "on", "off"], default=LEAVE, tooltip=tooltip, **common)
    if kind is bool:
        return io.Boolean.Input(name, default=each.default, tooltip=facts.help, **common)
    if kind is str:
        return io.String.Input(name, multiline=True, default="", tooltip=facts.help, **common)
    unset = each.default is None
    number: dict[str, Any] = {
        "default": UNSET if unset else each.default,
        "min": UNSET if unset else facts.low,
        "max": EXACT if facts.high is None else min(facts.high, EXACT),
        "tooltip": facts.help + (left.format(UNSET) if unset else ""),
    }
    if kind is int:
        return io.Int.Input(name, **number, **common)
    return io.Float.Input(name, **number, step=STEP, **common)


def settings_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the widgets say, by the names of `GenerateRequest`."""
    found = {}
    for name, value in values.items():
        each = FIELDS[name]
        left = each.default is None and value in (None, UNSET, LEAVE)
        if left or (name == "negative_prompt" and value == ""):
            continue
        found[name] = value == "on" if kind_of(each) is bool and isinstance(value, str) else value
    return found


def problem_of(values: Mapping[str, Any]) -> str | None:
    """The first fault of the widgets' values, as one line; None if there is none."""
    try:
        settings = settings_of({name: value for name, value in values.items() if name in FIELDS})
        for name, value in settings.items():
            check_option(GenerateRequest, name, value)
        together = {name: value for name, value in settings.items() if name not in ("prompt", "strength")}
        GenerateRequest(settings.get("prompt") or "", **together)
    except InputError as error:
        return str(error)
    return None
