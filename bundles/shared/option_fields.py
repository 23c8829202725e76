"""Options stated once, as the fields of a dataclass: from these come the command's options, the docs and the checks.

    keep: float = field(default=0.7, metadata=option("Kept neurons / all neurons.", group=SIZE, check=share()))

What a field's type says is not said again: a Literal's words are its choices, a bool is a pair of switches, a tuple is
an option that repeats, and None is allowed where the type has it.
"""

import types
from collections.abc import Iterator
from dataclasses import Field, dataclass, fields
from typing import Any, Literal, Union, get_args, get_origin

from .checks import Check, instance_of, one_of, or_word

__all__ = ["FieldType", "Option", "field_problems", "option", "option_of", "switch_of", "type_of"]

_KEY = "option"


@dataclass(frozen=True, kw_only=True)
class Option:
    """What a field says about itself as an option, in addition to its name, type and default.

    Attributes:
        help: for the command's help and the docs.
        group: heading under which the help shows it.
        check: of the value; None where the type says all.
        unset: what None, as the default, stands for.
        switches: on the command line; () for `--` and the field's name.
        metavar: placeholder of the value in the help; None for the type's.
    """

    help: str
    group: str
    check: Check | None = None
    unset: str | None = None
    switches: tuple[str, ...] = ()
    metavar: str | None = None


def option(
    help: str,  # noqa: A002 - as click has it
    *,
    group: str,
    check: Check | None = None,
    unset: str | None = None,
    switches: tuple[str, ...] = (),
    metavar: str | None = None,
) -> dict[str, Option]:
    """Make a dataclass field's metadata; see `Option`."""
    return {
        _KEY: Option(help=help, group=group, check=check, unset=unset, switches=switches, metavar=metavar),
    }


def option_of(item: "Field[Any]") -> Option:
    """Return what `option` made."""
    found: Option = item.metadata[_KEY]
    return found


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
        repeated: a tuple of values.
    """

    words: tuple[str, ...]
    plain: type | None
    optional: bool
    repeated: bool


def type_of(item: "Field[Any]") -> FieldType:
    """Read a field's type: a plain type, a Literal of words, None, a tuple of one type, or a union of these."""
    parts = get_args(item.type) if get_origin(item.type) in (Union, types.UnionType) else (item.type,)
    words = tuple(word for part in parts if get_origin(part) is Literal for word in get_args(part))
    plain = [part for part in parts if get_origin(part) is not Literal and part is not type(None)]
    repeated = bool(plain) and get_origin(plain[0]) is tuple
    kind = get_args(plain[0])[0] if repeated else next(iter(plain), None)
    return FieldType(words=words, plain=kind, optional=type(None) in parts, repeated=repeated)


def field_problems(options: Any) -> Iterator[str]:
    """Check every field of a dataclass by its type and its own check; yields what is wrong."""
    for item in fields(options):
        value, kind = getattr(options, item.name), type_of(item)
        if value is None and kind.optional:
            continue
        problem = _check_of(item, kind).problem(switch_of(item), value)
        if problem is not None:
            yield problem


def _check_of(item: "Field[Any]", kind: FieldType) -> Check:
    if kind.plain is None:
        return one_of(kind.words)
    check = option_of(item).check or instance_of(tuple if kind.repeated else kind.plain)
    return or_word(kind.words, check) if kind.words else check
