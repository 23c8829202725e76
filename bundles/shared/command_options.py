"""Click options made from the fields of a dataclass, and help that shows options in groups."""

from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import click

from .option_fields import FieldType, option_of, type_of

__all__ = ["GroupedCommand", "GroupedOption", "NumberOr", "click_options"]

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

    def __init__(self, *args: Any, group: str, **settings: Any) -> None:
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
                found[parameter.group if isinstance(parameter, GroupedOption) else _UNGROUPED].append(record)
        return [(group, records) for group, records in found.items() if records]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options by their headings."""
        for heading, records in self.sections(ctx):
            with formatter.section(heading):
                formatter.write_dl(records)


def click_options(options: type) -> list[click.Parameter]:
    """Make the options of a command from the fields of a dataclass, see `option_fields`; each has its field's name."""
    return [_click_option(item) for item in fields(options)]


def _click_option(item: "Field[Any]") -> GroupedOption:
    stated, kind = option_of(item), type_of(item)
    # A default of None, told to click, would do for a required option.
    presence = {"required": True} if item.default is MISSING else {"default": item.default}
    unset = "" if stated.unset is None else f"  [default: {stated.unset}]"
    return GroupedOption(
        [item.name, *(stated.switches or _switches(item.name, kind))],
        group=stated.group,
        type=None if kind.plain is bool else _click_type(kind),
        is_flag=kind.plain is bool,
        multiple=kind.repeated,
        metavar=stated.metavar,
        help=stated.help + unset,
        **presence,
    )


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
