"""Typed records from what JSON holds: every key, type and finite number checked, wherever the file comes from."""

import dataclasses
import typing
from collections.abc import Sequence
from types import UnionType
from typing import Any, Literal, TypeVar, Union

from nova_video.common.checks import is_finite, quote, shorten
from nova_video.common.errors import InputError

T = TypeVar("T")

MOST = 2**64
"""Integers are below it: seeds are the largest."""


def read_record(kind: type[T], values: object, where: str) -> T:
    """The dataclass that `values` describe; InputError names the key that is wrong."""
    if not isinstance(values, dict):
        raise InputError(f"{where} is {quote(values)}: expected an object")
    hints = typing.get_type_hints(kind)
    known = {field.name: field for field in dataclasses.fields(typing.cast(Any, kind))}
    for key in values:
        if key not in known:
            raise InputError(f"{where} has the key {quote(key)}: expected one of {shorten(', '.join(known))}")
    for key, field in known.items():
        if key not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise InputError(f"{where} lacks {key}: expected it")
    found = {key: read_value(hints[key], value, f"{where}.{key}") for key, value in values.items()}
    try:
        return kind(**found)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def read_value(hint: Any, value: object, where: str) -> Any:
    """A value of the type that a field says."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        kinds = [kind for kind in arguments if kind is not type(None)]
        if value is None and len(kinds) < len(arguments):
            return None
        lists = [kind for kind in kinds if typing.get_origin(kind) is Sequence and isinstance(value, list)]
        return read_value((lists or kinds)[0], value, where)
    if dataclasses.is_dataclass(hint):
        return read_record(typing.cast(type[Any], hint), value, where)
    if origin in (tuple, Sequence):
        several = origin is Sequence or arguments[-1] is ...
        if not isinstance(value, list) or not (several or len(arguments) == len(value)):
            raise InputError(f"{where} is {quote(value)}: expected a list")
        each = arguments[:1] * len(value) if several else arguments
        return tuple(read_value(kind, item, where) for kind, item in zip(each, value, strict=True))
    if origin is dict:
        if not isinstance(value, dict):
            raise InputError(f"{where} is {quote(value)}: expected an object")
        return {key: read_value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is Literal:
        if value not in arguments:
            raise InputError(f"{where} is {quote(value)}: expected one of {', '.join(map(str, arguments))}")
        return value
    if hint is float and type(value) in (int, float) and is_finite(value):
        return float(typing.cast(float, value))
    if hint is not float and type(value) is hint and not (hint is int and abs(typing.cast(int, value)) >= MOST):
        return value
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}
    raise InputError(f"{where} is {quote(value)}: expected {names.get(hint, hint)}")
