"""Options stated as fields: their checks, their click options and the groups of the help."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner
from coreinfer.bundles.shared.checks import (
    ANY,
    Check,
    instance_of,
    not_empty,
    number,
    one_of,
    or_word,
    raise_problems,
    share,
    whole_number,
)
from coreinfer.bundles.shared.command import command_errors
from coreinfer.bundles.shared.command_options import (
    GroupedCommand,
    GroupedOption,
    click_options,
    field_option,
    field_options,
)
from coreinfer.bundles.shared.option_fields import (
    FieldType,
    field_problems,
    help_of,
    keyword,
    name_of,
    option,
    switch_of,
    type_of,
)
from coreinfer.compiler.config import GROUPS, CompileConfig
from coreinfer.compiler.options import MAIN

NAN, INFINITY = float("nan"), float("inf")

CHECKS: list[tuple[Check, list[Any], list[Any], str]] = [
    (whole_number(1), [1, 99], [0, True, 1.0, "1", None], "a whole number of at least 1"),
    (whole_number(0, 2), [0, 2], [-1, 3], "a whole number from 0 to 2"),
    (number(above=0), [1e-9, 3], [0, -1, NAN, INFINITY, True, "1"], "a number above 0"),
    (number(least=0), [0, 0.5], [-1e-9, NAN], "a number of at least 0"),
    (share(), [1e-9, 1], [0, 1.01, NAN, True], "a number in (0, 1]"),
    (share(zero=True), [0, 1.0], [-0.1, 2], "a number in [0, 1]"),
    (one_of(("a", "b")), ["a"], ["c", None, 1], "a, b"),
    (or_word(("auto",), share()), ["auto", 0.5], ["Auto", 0], "auto or a number in (0, 1]"),
    (not_empty(tuple, "a source"), [("a",)], [(), "a", ["a"]], "a source"),
    (instance_of(bool), [True, False], [1, "yes"], "True or False"),
    (instance_of(str), ["", "a"], [b"a", None], "a str"),
    (ANY, [None, "", 1], [], "anything"),
]


@pytest.mark.parametrize(("check", "right", "wrong", "expected"), CHECKS)
def test_a_check_says_what_it_expects(check: Check, right: list[Any], wrong: list[Any], expected: str) -> None:
    assert [check.problem("--x", value) for value in right] == [None] * len(right)
    assert [check.problem("--x", value) for value in wrong] == [f"--x: expected {expected}, got {v!r}" for v in wrong]


@dataclass(frozen=True, kw_only=True)
class Options:
    name: str = field(metadata=option("The name.", group="First"))
    word: Literal["a", "b"] = field(default="a", metadata=option("A word.", group="Second"))
    size: int | Literal["auto"] | None = field(
        default=None, metadata=option("A size.", group="First", check=whole_number(1), unset="as it is", metavar="N")
    )
    paths: tuple[str, ...] = field(default=("x",), metadata=option("Paths.", group="Second"))
    folder: Path | None = field(default=None, metadata=option("A folder.", group="Second", switches=("-f", "--dir")))
    fast: bool = field(default=True, metadata=option("Whether it is fast.", group="First"))


def test_types_are_read() -> None:
    assert [type_of(item) for item in fields(Options)] == [
        FieldType(words=(), plain=str, optional=False, repeated=False),
        FieldType(words=("a", "b"), plain=None, optional=False, repeated=False),
        FieldType(words=("auto",), plain=int, optional=True, repeated=False),
        FieldType(words=(), plain=str, optional=False, repeated=True),
        FieldType(words=(), plain=Path, optional=True, repeated=False),
        FieldType(words=(), plain=bool, optional=False, repeated=False),
    ]


def test_every_field_is_checked_by_its_type() -> None:
    wrong: dict[str, Any] = {"name": 1, "word": "c", "size": 0, "paths": "x", "folder": "y", "fast": 0}
    assert list(field_problems(Options(name="n"))) == []
    assert list(field_problems(Options(**wrong))) == [
        "--name: expected a str, got 1",
        "--word: expected a, b, got 'c'",
        "--size: expected auto or a whole number of at least 1, got 0",
        "--paths: expected a tuple, got 'x'",
        "--dir: expected a Path, got 'y'",
        "--fast: expected True or False, got 0",
    ]


@click.command(cls=GroupedCommand, groups=("Second", "First"), params=click_options(Options))
@click.option("--late", cls=GroupedOption, group="First", is_flag=True, help="Of the command alone.")
@click.option("--plain", is_flag=True, help="In no group.")
def command(**values: Any) -> None:
    click.echo(repr(values))


def test_a_command_takes_the_fields() -> None:
    given = ["--name", "n", "--word", "b", "--size", "auto", "--paths", "p", "--paths", "q", "-f", "d", "--no-fast"]
    result = CliRunner().invoke(command, given)
    values = {"name": "n", "word": "b", "size": "auto", "paths": ("p", "q"), "folder": Path("d"), "fast": False}
    assert result.output == f"{ {**values, 'late': False, 'plain': False} }\n"
    defaults = CliRunner().invoke(command, ["--name", "n"]).output
    assert "'word': 'a', 'size': None, 'paths': ('x',), 'folder': None, 'fast': True" in defaults
    assert CliRunner().invoke(command, []).exit_code == 2


def test_help_shows_groups_in_their_order_and_what_is_in_none_last() -> None:
    shown = CliRunner().invoke(command, ["--help"]).output
    order = ["Second:", "--word", "--paths", "--dir", "First:", "--name", "--size N", "--late", "Other:", "--plain"]
    places = [shown.index(text) for text in order]
    assert places == sorted(places)
    assert "A size.  [default: as it is]" in shown
    assert "[required]" in shown


def test_the_ten_options_that_most_need_come_first() -> None:
    first = [item.name for item in fields(CompileConfig) if item.metadata["option"].group == MAIN]
    assert len(first) == 10
    assert {item.metadata["option"].group for item in fields(CompileConfig)} == set(GROUPS)
    assert switch_of(next(item for item in fields(CompileConfig) if item.name == "cache_dir")) == "--cache"


# Options of a library that are a command's too


def _empty_words(name: str, words: Any) -> Iterator[str]:
    yield from (f"{name}[{index}]: expected a word, got nothing" for index, word in enumerate(words) if not word)


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """Of which one is the library's alone."""

    size: int = field(default=1, metadata=option("A size.", check=whole_number(1), switches=("-s", "--size")))
    words: Sequence[str] = field(default=(), metadata=option("Words.", problems=_empty_words, unset="none"))
    quiet: bool = field(
        default=True, metadata=option("Say little.", switches=("--loud",), switch_help="Say everything.")
    )
    hot: bool = field(default=False, metadata=option("Whether it is hot.", switches=("--hot",)))
    numbers: list[int] | None = field(
        default=None,
        metadata=option("Numbers.", check=instance_of(list), parse=lambda text: [int(n) for n in text.split("+")]),
    )
    secret: object = field(default=None, metadata=keyword("Of no command.", check=ANY))

    def __post_init__(self) -> None:
        raise_problems(field_problems(self, name_of))


@click.command(context_settings={"show_default": True})
@command_errors
@field_option(Wishes, "hot")
@click.option("--between", is_flag=True, help="Of the command alone.")
@field_options(Wishes, "wishes", apart=("hot",))
@click.option("--after", is_flag=True, help="Of the command alone.")
def wish(wishes: Wishes, between: bool, after: bool) -> None:
    click.echo(repr((wishes, between, after)))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], Wishes()),
        (["--loud", "--hot"], Wishes(quiet=False, hot=True)),
        (["-s", "3", "--words", "a", "--words", "b"], Wishes(size=3, words=("a", "b"))),
        (["--numbers", "1+2"], Wishes(numbers=[1, 2])),
    ],
)
def test_a_command_gets_a_dataclass_as_one_argument(arguments: list[str], expected: Wishes) -> None:
    assert CliRunner().invoke(wish, [*arguments, "--after"]).output == f"{(expected, False, True)!r}\n"


def test_what_the_dataclass_refuses_is_one_line() -> None:
    result = CliRunner().invoke(wish, ["--size", "0", "--words", "", "--words", "a", "--words", ""])
    assert result.exit_code == 2
    assert result.output == (
        "error: 3 problems: (1) size: expected a whole number of at least 1, got 0; "
        "(2) words[0]: expected a word, got nothing; (3) words[2]: expected a word, got nothing\n"
    )


def test_options_stand_in_their_places_and_keywords_nowhere() -> None:
    shown = CliRunner().invoke(wish, ["--help"]).output
    order = ["--hot", "--between", "--size", "Words.  [default: none]", "--loud", "Say everything.\n", "--numbers"]
    places = [shown.index(text) for text in [*order, "--after"]]
    assert places == sorted(places)
    assert "secret" not in shown
    assert help_of(Wishes, "quiet") == "Say little."


def test_values_may_be_made_into_something_else() -> None:
    @click.command()
    @field_options(Wishes, "values", make=dict)
    def show(values: dict[str, Any]) -> None:
        click.echo(repr(values))

    values = {"size": 0, "words": (), "quiet": True, "hot": False, "numbers": None}
    assert CliRunner().invoke(show, ["--size", "0"]).output == f"{values}\n"
