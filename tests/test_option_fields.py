"""Options stated as fields: their checks, their click options and the groups of the help."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner
from coreinfer.bundles.shared.checks import Check, instance_of, not_empty, number, one_of, or_word, share, whole_number
from coreinfer.bundles.shared.command_options import GroupedCommand, GroupedOption, click_options
from coreinfer.bundles.shared.option_fields import FieldType, field_problems, option, switch_of, type_of
from coreinfer.compiler.config import GROUPS, MAIN, CompileConfig

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
