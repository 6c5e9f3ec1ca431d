"""Parts of sampling that may be the user's own: made from their names, checked, and named in what is saved."""

from collections.abc import Mapping
from typing import Any

from nova_video.common.errors import InputError
from nova_video.common.extensions import extension_name, make_extension
from nova_video.model.masking import check_order
from nova_video.sampling.guidance import check_rule

CHECKS = {"order": check_order, "guidance_rule": check_rule}
"""Options whose value is such a part -> what checks it."""


def own_part(name: str, value: Any) -> Any:
    """The object that is given for an option, or that `module:Class` names; None stays None."""
    part = make_extension(value, name) if isinstance(value, str) else value
    if part is not None:
        CHECKS[name](part)
    return part


def part_names(record: Any) -> dict[str, str | None]:
    """The options of a record that are such parts, by the names that files hold."""
    parts = {name: getattr(record, name) for name in CHECKS}
    return {name: None if part is None else extension_name(part) for name, part in parts.items()}


def parts_again(saved: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that the user gives again for what was saved with their names. Others are an InputError."""
    parts = {name: own_part(name, given.get(name)) for name in CHECKS}
    for name, part in parts.items():
        before, now = getattr(saved, name), None if part is None else extension_name(part)
        if before != now:
            raise InputError(f"its {name} is {before}: expected the same to be given, got {now or 'none'}")
    return parts
