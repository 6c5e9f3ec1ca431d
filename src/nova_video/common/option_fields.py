"""Options: a setting is one field of a frozen record, with its default, bounds and help beside it.

Everything else is derived from the fields: checks, command-line flags, keys of scripts, records in files, saved states
and the JSON schema. Its name may be typed where the setting is used, and nowhere else.

    @with_aliases
    @dataclass(frozen=True, kw_only=True)
    class Blur(Options):
        radius: float = option(0.0, "Radius of the blur in pixels.", low=0, high=64, metavar="PIXELS")
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from operator import attrgetter
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from nova_video.common.checks import check_number, check_whether, quote
from nova_video.common.errors import InputError
from nova_video.common.timeline import Timeline

T = TypeVar("T")

KEY = "option"
Number = float | Sequence[tuple[float, float]]
"""A number, or one that changes in time: (seconds, value) pairs."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """The facts about a setting besides its name, type and default."""

    help: str
    low: float | None = None
    """Least number allowed; None: the value is no number."""
    high: float | None = None
    above: bool = False
    """More than `low` is needed."""
    endless: bool = False
    """Infinity is allowed, too."""
    unset: str = ""
    """The meaning of None, such as "the model's own"."""
    aliases: tuple[str, ...] = ()
    """Other names of the same setting, everywhere."""
    flags: tuple[str, ...] = ()
    """More names on the command line, as typed there."""
    key: str = ""
    """Its name on the command line, in scripts and in records, where that is not the field's name."""
    metavar: str = ""
    hint: str = ""
    """Text behind an error about it."""
    recorded: bool = True
    """It decides the result, so that records keep it."""

    def check(self, name: str, value: object, kind: Any) -> None:
        """Raise InputError for a value that is not of the type `kind` or out of bounds."""
        if choices := choices_of(kind):
            if value not in choices:
                listed = " or ".join(choices) if len(choices) == 2 else f"one of {', '.join(choices)}"
                raise InputError(f"{name} is {quote(value)}: expected {listed}{self.hint}")
        elif kind is bool:
            check_whether(name, value)
        elif self.low is not None and not (self.endless and isinstance(value, float) and value == math.inf):
            whole = kind is int
            check_number(name, value, self.low, integer=whole, above=self.above, high=self.high, hint=self.hint)


def option(default: Any, help: str, **facts: Any) -> Any:
    """Return a dataclass field that is a setting; `facts` are the fields of `Option`."""
    return field(default=default, metadata={KEY: Option(help=help, **facts)})


def option_fields(record: Any) -> "dict[str, Field[Any]]":
    """The fields of a record, or of its class, that are settings: by name."""
    return {each.name: each for each in fields(record) if is_option(each)}


def is_option(each: "Field[Any]") -> bool:
    return KEY in each.metadata


def facts_of(each: "Field[Any]") -> Option:
    found: Option = each.metadata[KEY]
    return found


def key_of(each: "Field[Any]") -> str:
    """The setting's name on the command line, in scripts and in records."""
    return facts_of(each).key or each.name


def values_of(record: Any, kind: type[Any] | None = None) -> dict[str, Any]:
    """The settings of a record by name: all, or those that the class `kind` has, too."""
    return {name: getattr(record, name) for name in option_fields(record if kind is None else kind)}


def kind_of(each: "Field[Any]") -> Any:
    """The type of a setting's value: without None, and float for numbers that may change in time."""
    kinds = [kind for kind in get_args(each.type) if kind is not NoneType]
    return kinds[0] if get_origin(each.type) in (Union, UnionType) else each.type


def choices_of(kind: Any) -> tuple[str, ...]:
    return get_args(kind) if get_origin(kind) is Literal else ()


def is_timed(each: "Field[Any]") -> bool:
    """True for a number that may change in time."""
    return Sequence[tuple[float, float]] in get_args(each.type)


def check_options(record: Any) -> None:
    """Raise InputError for the first setting of a record that is out of its bounds. None is a default of its own."""
    for name in option_fields(record):
        check_option(record, name, getattr(record, name))


def check_option(record: Any, name: str, value: object) -> None:
    """Raise InputError if `value` is none for the setting `name` of a record or its class."""
    each = option_fields(record)[name]
    if value is None and each.default is None:
        return
    for moment in Timeline.of(name, value).values if is_timed(each) else (value,):
        facts_of(each).check(name, moment, kind_of(each))


# Aliases --------------------------------------------------------------------------------------------------------------


def aliases_of(record: Any) -> dict[str, str]:
    """Aliases -> the names that they stand for."""
    return {alias: name for name, each in option_fields(record).items() for alias in facts_of(each).aliases}


def without_aliases(record: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values under the names of the record's fields; one setting under two names is an error."""
    names, found = aliases_of(record), dict(values)
    for alias in [key for key in values if key in names]:
        name, value = names[alias], found.pop(alias)
        if value is None:
            continue
        if found.get(name) not in (None, option_fields(record)[name].default, value):
            raise InputError(f"got {name} {quote(found[name])} and {alias} {quote(value)}: expected one of them")
        found[name] = value
    return found


def with_aliases(record: type[T]) -> type[T]:
    """Let a record be made by the aliases of its settings as well, and let them be read."""
    construct = record.__init__

    @functools.wraps(construct)
    def construct_by_aliases(self: Any, *args: Any, **values: Any) -> None:
        construct(self, *args, **without_aliases(record, values))

    record.__init__ = construct_by_aliases  # type: ignore[method-assign]
    for alias, name in aliases_of(record).items():
        setattr(record, alias, property(attrgetter(name)))
    return record


# Schema ---------------------------------------------------------------------------------------------------------------


def json_schema(record: type[Any]) -> dict[str, Any]:
    """The JSON schema of a record's settings: types, bounds, defaults and descriptions."""
    properties = {}
    for name, each in option_fields(record).items():
        facts = facts_of(each)
        bounds: dict[str, Any] = {}
        if facts.low is not None:
            bounds = {"exclusiveMinimum" if facts.above else "minimum": facts.low}
        if facts.high is not None:
            bounds["maximum"] = facts.high
        text = f"{facts.help} None: {facts.unset}." if facts.unset else facts.help
        kind = each.type
        if kind_of(each) is int and facts.endless:  # JSON has no infinity: the numbers left are whole
            kind = int | None
        properties[name] = {**_schema_of(kind, bounds), "default": each.default, "description": text}
    title = record.__name__
    return {"title": title, "type": "object", "properties": properties, "additionalProperties": False}


def _schema_of(kind: Any, bounds: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of one type; `bounds` are those of its numbers."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return {"anyOf": [_schema_of(part, bounds) for part in arguments if part is not Any]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:  # a pair of seconds and value
        parts = [_schema_of(arguments[0], {"minimum": 0}), _schema_of(arguments[1], bounds)]
        return {"type": "array", "prefixItems": parts, "minItems": 2, "maxItems": 2}
    if origin is Sequence:
        return {"type": "array", "items": _schema_of(arguments[0], bounds), "minItems": 1}
    names = {int: "integer", float: "number", bool: "boolean", str: "string", NoneType: "null"}
    return {"type": names[kind], **(bounds if kind in (int, float) else {})}
