"""Options stated once, as the fields of a dataclass: from these come the command's options, the docs and the checks.

    keep: float = field(default=0.7, metadata=option("Kept neurons / all neurons.", group=SIZE, check=share()))
    cancel: Cancel | None = field(default=None, metadata=keyword("Ends the generation once it is set.", check=ANY))

What a field's type says is not repeated: a Literal's words are its choices, a bool is a pair of switches, a tuple or
a sequence is an option that repeats, and None is allowed where the type has it.
"""

import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import Field, dataclass, fields
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from .checks import Check, instance_of, one_of, or_word

__all__ = [
    "FieldType",
    "Option",
    "field_problems",
    "command_help_of",
    "help_of",
    "keyword",
    "name_of",
    "option",
    "option_of",
    "switch_of",
    "type_of",
]

_KEY = "option"
Problems = Callable[[str, Any], Iterable[str]]
"""From an option's name and value to what is wrong, where one `Check` cannot say it."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """What a field says about itself as an option, in addition to its name, type and default.

    Attributes:
        help: for the command's help and the docs.
        group: heading under which the help shows it; None where a command has no headings.
        check: of the value; None where the type says all.
        problems: what finds problems instead of `check`.
        unset: what None, or nothing, as the default stands for.
        switches: on the command line; () for `--` and the field's name. A single one of a bool sets the contrary of its
            default.
        switch_help: for the command's help instead of `help`, where the switch says the contrary of the field.
        metavar: placeholder of the value in the help; None for the type's.
        parse: makes the value of the text that a command gets; None where the type does.
        in_command: whether a command has it at all.
    """

    help: str
    group: str | None = None
    check: Check | None = None
    problems: Problems | None = None
    unset: str | None = None
    switches: tuple[str, ...] = ()
    switch_help: str | None = None
    metavar: str | None = None
    parse: Callable[[str], Any] | None = None
    in_command: bool = True


def option(
    help: str,  # noqa: A002 - as click has it
    *,
    group: str | None = None,
    check: Check | None = None,
    problems: Problems | None = None,
    unset: str | None = None,
    switches: tuple[str, ...] = (),
    switch_help: str | None = None,
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
) -> dict[str, Option]:
    """Make a dataclass field's metadata; see `Option`."""
    stated = Option(
        help=help,
        group=group,
        check=check,
        problems=problems,
        unset=unset,
        switches=switches,
        switch_help=switch_help,
        metavar=metavar,
        parse=parse,
    )
    return {_KEY: stated}


def keyword(
    help: str,  # noqa: A002 - as in `option`
    *,
    check: Check | None = None,
    problems: Problems | None = None,
    unset: str | None = None,
) -> dict[str, Option]:
    """Make the metadata of a field that no command has; see `Option`."""
    return {_KEY: Option(help=help, check=check, problems=problems, unset=unset, in_command=False)}


def option_of(item: "Field[Any]") -> Option:
    """Return what `option` made."""
    found: Option = item.metadata[_KEY]
    return found


def help_of(options: type, name: str) -> str:
    """Return what a field's option is for."""
    return _option_named(options, name).help


def command_help_of(options: type, name: str) -> str:
    """Return what a field's option is for, and what its absence means, for a command that shows no default of it."""
    found = _option_named(options, name)
    return found.help if found.unset is None else f"{found.help}  [default: {found.unset}]"


def _option_named(options: type, name: str) -> Option:
    return next(option_of(item) for item in fields(options) if item.name == name)


def name_of(item: "Field[Any]") -> str:
    """Return a field's name: messages of a library's options name them so."""
    return item.name


def switch_of(item: "Field[Any]") -> str:
    """Return an option's main switch, such as `--max-kl`: messages name it so."""
    return next((switch for switch in option_of(item).switches if switch.startswith("--")), _default_switch(item.name))


def _default_switch(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True)
class FieldType:
    """What a field's type allows.

    Attributes:
        words: given words.
        plain: int, float, str, bool or Path, of one value where several are allowed; None where only words are.
        optional: None.
        repeated: a tuple or another sequence of values.
    """

    words: tuple[str, ...]
    plain: type | None
    optional: bool
    repeated: bool


@cache
def type_of(item: "Field[Any]") -> FieldType:
    """Read a field's type: a plain type, a Literal of words, None, a sequence of one type, or a union of these."""
    parts = get_args(item.type) if get_origin(item.type) in (Union, types.UnionType) else (item.type,)
    words = tuple(word for part in parts if get_origin(part) is Literal for word in get_args(part))
    plain = [part for part in parts if get_origin(part) is not Literal and part is not type(None)]
    repeated = bool(plain) and get_origin(plain[0]) in (tuple, Sequence)
    kind = get_args(plain[0])[0] if repeated else next(iter(plain), None)
    return FieldType(words=words, plain=kind, optional=type(None) in parts, repeated=repeated)


def field_problems(options: Any, called: "Callable[[Field[Any]], str]" = switch_of) -> Iterator[str]:
    """Check every field of a dataclass by its type and its own check; yields what is wrong.

    Args:
        called: gives the name that messages have for a field.
    """
    for item in fields(options):
        value = getattr(options, item.name)
        if value is None and type_of(item).optional:
            continue
        if find := option_of(item).problems:
            yield from find(called(item), value)
        elif problem := _check_of(item).problem(called(item), value):
            yield problem


# A server makes options for each request.
@cache
def _check_of(item: "Field[Any]") -> Check:
    kind = type_of(item)
    if kind.plain is None:
        return one_of(kind.words)
    check = option_of(item).check or instance_of(tuple if kind.repeated else kind.plain)
    return or_word(kind.words, check) if kind.words else check
