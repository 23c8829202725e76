"""Click options made from the fields of a dataclass, and help that shows options in groups."""

from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from functools import wraps
from pathlib import Path
from typing import Any

import click

from .option_fields import FieldType, Option, option_of, type_of

__all__ = ["GroupedCommand", "GroupedOption", "NumberOr", "click_options", "field_option", "field_options"]

_UNGROUPED = "Other"


class NumberOr(click.ParamType[Any]):
    """A number, or one given word."""

    def __init__(self, number: type[int] | type[float], word: str) -> None:
        self.number, self.word = number, word
        self.name = f"{number.__name__}|{word}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Take the word as it is, and everything else as a number, or let click refuse it."""
        if value == self.word:
            return value
        try:
            return self.number(value)
        except ValueError:
            return self.fail(f"expected a number or {self.word}, got {value!r}", param, ctx)


class GroupedOption(click.Option):
    """An option with the heading that the help of a `GroupedCommand` shows it under."""

    def __init__(self, *args: Any, group: str | None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help shows its options under headings."""

    def __init__(self, *args: Any, groups: Sequence[str], **settings: Any) -> None:
        """Take the headings in the order in which they are shown; options without one come last."""
        super().__init__(*args, **settings)
        self.groups = tuple(groups)

    def sections(self, context: click.Context) -> list[tuple[str, list[tuple[str, str]]]]:
        """Return headings, and under each the options and what they are for."""
        found: dict[str, list[tuple[str, str]]] = {group: [] for group in (*self.groups, _UNGROUPED)}
        for parameter in self.get_params(context):
            if record := parameter.get_help_record(context):
                found[getattr(parameter, "group", None) or _UNGROUPED].append(record)
        return [(group, records) for group, records in found.items() if records]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options by their headings."""
        for heading, records in self.sections(ctx):
            with formatter.section(heading):
                formatter.write_dl(records)


Command = Callable[..., None]


def click_options(options: type) -> list[click.Parameter]:
    """Make the options of a command from the fields of a dataclass, see `option_fields`; each has its field's name."""
    made: list[click.Parameter] = []
    for item in _command_fields(options):
        names, settings = _click_settings(item)
        made.append(GroupedOption(names, **settings))
    return made


def field_option(options: type, name: str) -> Callable[[Command], Command]:
    """Give a command the option of one field of a dataclass, at this place among its options.

    A decorator `field_options` of the same dataclass takes its value.
    """
    return _decorator(next(item for item in _command_fields(options) if item.name == name))


def field_options(
    options: type, argument: str, *, apart: Sequence[str] = (), make: Callable[..., Any] | None = None
) -> Callable[[Command], Command]:
    """Give a command the options of a dataclass; their values come as one argument.

    What makes it may refuse values by a ConfigError: `command_errors` stands above this decorator.

    Args:
        argument: name of the command's argument.
        apart: fields whose options have their own place, by `field_option`.
        make: makes the argument from the values by name; None for the dataclass itself.
    """
    items = _command_fields(options)

    def decorate(command: Command) -> Command:
        # click calls by name, whatever the command's own options are.
        @wraps(command)
        def with_options(**values: Any) -> None:
            own = {item.name: _parsed(option_of(item), values.pop(item.name)) for item in items}
            command(**{argument: (make or options)(**own)}, **values)

        for item in reversed(items):
            if item.name not in apart:
                _decorator(item)(with_options)
        return with_options

    return decorate


def _command_fields(options: Any) -> "list[Field[Any]]":
    return [item for item in fields(options) if option_of(item).in_command]


def _parsed(stated: Option, value: Any) -> Any:
    return value if stated.parse is None or value is None else stated.parse(value)


def _decorator(item: "Field[Any]") -> Callable[[Command], Command]:
    names, settings = _click_settings(item)
    return click.option(*names, cls=GroupedOption, **settings)


def _click_settings(item: "Field[Any]") -> tuple[list[str], dict[str, Any]]:
    """Say what click is to make of a field: the names of the option, and its settings."""
    stated, kind = option_of(item), type_of(item)
    names = [item.name, *(stated.switches or _switches(item.name, kind))]
    # A default of None, told to click, would do for a required option.
    presence = {"required": True} if item.default is MISSING else {"default": item.default}
    unset = "" if stated.unset is None else f"  [default: {stated.unset}]"
    settings = {
        "group": stated.group,
        "type": None if kind.plain is bool else click.STRING if stated.parse else _click_type(kind),
        "multiple": kind.repeated,
        "metavar": stated.metavar,
        "help": (stated.switch_help or stated.help) + unset,
        **presence,
    }
    return names, settings | (_flag_settings(item.default, names) if kind.plain is bool else {})


def _flag_settings(default: Any, names: Sequence[str]) -> dict[str, Any]:
    if any("/" in name for name in names):
        return {"is_flag": True}
    # A single switch has no name for the default, and sets the contrary.
    return {"is_flag": True, "flag_value": not default, "show_default": False}


def _switches(name: str, kind: FieldType) -> list[str]:
    dashed = name.replace("_", "-")
    return [f"--{dashed}/--no-{dashed}"] if kind.plain is bool else [f"--{dashed}"]


def _click_type(kind: FieldType) -> click.ParamType[Any]:
    if kind.plain is None:
        return click.Choice(kind.words)
    if kind.plain is Path:
        return click.Path(path_type=Path)
    if kind.words:
        return NumberOr(kind.plain, kind.words[0])
    return click.types.convert_type(kind.plain)
