"""Checks of option values: what a value must be, and the message if it is not."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from coreinfer.bundles.errors import ConfigError, join_problems

__all__ = [
    "ANY",
    "Check",
    "between",
    "instance_of",
    "not_empty",
    "number",
    "one_of",
    "or_word",
    "raise_problems",
    "share",
    "whole_number",
]


@dataclass(frozen=True, kw_only=True)
class Check:
    """What is expected of a value.

    Attributes:
        expected: in words, such as "a whole number of at least 1".
        holds: whether a value of any type is as expected.
    """

    expected: str
    holds: Callable[[Any], bool]

    def problem(self, name: str, value: object) -> str | None:
        """Say what is wrong with the value of an option; None where nothing is."""
        return None if self.holds(value) else f"{name}: expected {self.expected}, got {value!r}"


def raise_problems(problems: Iterable[str | None]) -> None:
    """Raise an error if options have problems.

    Raises:
        ConfigError: naming all problems that are not None.
    """
    if found := [problem for problem in problems if problem is not None]:
        raise ConfigError(join_problems(found))


def whole_number(least: int, most: int | None = None) -> Check:
    """Expect an int; True and False are none."""
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"

    def holds(value: Any) -> bool:
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        return is_whole and value >= least and (most is None or value <= most)

    return Check(expected=f"a whole number {bounds}", holds=holds)


def number(*, above: float = -math.inf, least: float = -math.inf) -> Check:
    """Expect a finite int or float, above a bound or at least of a size."""
    bounds = f"above {above:g}" if math.isfinite(above) else f"of at least {least:g}"
    return Check(
        expected=f"a number {bounds}", holds=lambda value: _is_number(value) and value > above and value >= least
    )


def between(low: float, high: float) -> Check:
    """Expect a number from one bound to another, both allowed."""
    return Check(
        expected=f"a number in [{low:g}, {high:g}]", holds=lambda value: _is_number(value) and low <= value <= high
    )


def share(*, zero: bool = False) -> Check:
    """Expect a number in (0, 1], or in [0, 1] with `zero`."""

    def holds(value: Any) -> bool:
        return _is_number(value) and (0 < value <= 1 or (zero and value == 0))

    return Check(expected=f"a number in {'[' if zero else '('}0, 1]", holds=holds)


def one_of(words: Sequence[str]) -> Check:
    """Expect one of some words."""
    return Check(expected=", ".join(words), holds=lambda value: isinstance(value, str) and value in words)


def or_word(words: Sequence[str], check: Check) -> Check:
    """Expect one of some words or what another check expects."""
    word = one_of(words)
    return Check(
        expected=f"{word.expected} or {check.expected}", holds=lambda value: word.holds(value) or check.holds(value)
    )


def not_empty(kind: type, expected: str) -> Check:
    """Expect a text or a collection of a type that is not empty."""
    return Check(expected=expected, holds=lambda value: isinstance(value, kind) and bool(value))


def instance_of(kind: type) -> Check:
    """Expect a value of a type."""
    expected = "True or False" if kind is bool else f"a {kind.__name__}"
    return Check(expected=expected, holds=lambda value: isinstance(value, kind))


ANY = Check(expected="anything", holds=lambda _value: True)
"""Of what is checked where it is read."""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
