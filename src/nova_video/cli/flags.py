"""Command-line flags made of options: one for each field, with the field's help, bounds and other names."""

from collections.abc import Collection, Iterable
from dataclasses import Field, fields
from typing import Annotated, Any

from tyro.conf import UseAppendAction, arg
from tyro.constructors import PrimitiveConstructorSpec

from nova_video.common.option_fields import choices_of, facts_of, is_timed, key_of, kind_of, option_fields


def flag_fields(record: type[Any], names: Iterable[str] | None = None) -> list[tuple[str, Any, Any]]:
    """Name, type and default of each flag of a record's options, for `make_dataclass`. None: the flag is not given.

    A number that may change in time has a second flag, NAME_at, for its later values; not where `names` choose.
    """
    found: list[tuple[str, Any, Any]] = []
    keys = {key_of(each) for each in option_fields(record).values()}
    for name, each in option_fields(record).items():
        if names is not None and name not in names:
            continue
        found.append((name, flag_type(each, keys), unset_flag(each)))
        if is_timed(each) and names is None:
            found.append((at_name(each), later_values(f"Another --{key_of(each)} from this second on."), ()))
    return found


def flag_type(each: "Field[Any]", keys: Collection[str] = ()) -> Any:
    """The type of an option's flag, as tyro reads it; `keys` are names that no alias takes."""
    facts, kind, key = facts_of(each), kind_of(each), key_of(each).replace("_", "-")
    names = [name.replace("_", "-") for name in (each.name, *facts.aliases) if name not in keys]
    aliases = [*facts.flags, *(f"--{name}" for name in names if name != key)]
    hint = facts.unset or ("" if each.default is None else _shown_default(each.default))
    hint = f"(default: {hint})" if hint else ""
    if kind is bool:
        return Annotated[bool, arg(name=key, aliases=aliases, help=facts.help, help_behavior_hint="")]
    if choices := choices_of(kind):
        return Annotated[kind | None, one_of(choices), arg(help=facts.help, help_behavior_hint=hint, aliases=aliases)]
    metavar = facts.metavar or "TEXT"
    settings = arg(name=key, aliases=aliases, metavar=metavar, help=facts.help, help_behavior_hint=hint)
    return Annotated[kind | None, settings]


def _shown_default(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def unset_flag(each: "Field[Any]") -> Any:
    """The value of an option's flag that is not given."""
    return bool(each.default) if kind_of(each) is bool else None


def at_name(each: "Field[Any]") -> str:
    """The name of the flag with an option's later values."""
    return f"{key_of(each)}_at"


def later_values(help: str) -> Any:
    """The type of a flag that may be repeated, with a second and a number."""
    settings = arg(metavar="SECONDS VALUE", help=help, help_behavior_hint="(repeatable)")
    return Annotated[UseAppendAction[tuple[tuple[float, float], ...]], settings]


def one_of(choices: tuple[str, ...]) -> PrimitiveConstructorSpec[Any]:
    """The choices of `Literal[...] | None`: by itself, tyro calls None a choice too, and lists them in any order."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(choices) + "}",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: value is None or value in choices,
        str_from_instance=lambda value: [str(value)],
        choices=choices,
    )


def given_options(command: Any, record: type[Any], names: Collection[str] | None = None) -> dict[str, Any]:
    """The options (or those of `names`) that a command's flags give; those not given are left to their defaults."""
    found = {name: each for name, each in option_fields(record).items() if names is None or name in names}
    return {name: value for name, each in found.items() if (value := getattr(command, name)) != unset_flag(each)}


def typed_words(command: Any, record: type[Any], without: Collection[str] = ()) -> list[str]:
    """The flags of a command that are not as by default, as words of a command line."""
    words: list[str] = []
    options = option_fields(record)
    for each in fields(command):
        value = getattr(command, each.name)
        if each.name in without or value == each.default:
            continue
        option = options.get(each.name)
        name = (each.name if option is None else key_of(option)).replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words
