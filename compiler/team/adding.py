"""Sums of what the places found, in an order that depends on their number alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from .team import Pending, Team, Worker

__all__ = ["Arrays", "add_arrays", "add_up", "pass_on"]

T = TypeVar("T")
Arrays = dict[str, Any]
"""Name -> array or tensor."""


def add_up(team: Team, stage: str, add: Callable[..., T], parts: Mapping[int, Pending[T]]) -> Pending[T]:
    """Add the places' parts two by two, then these sums, and so on: a tree, in which half of the places add at first.

    Args:
        add: (worker, first, second) -> their sum, which leaves both as they were.
        parts: place -> its part.
    """
    level = [*parts.items()]
    while len(level) > 1:
        pairs = [level[start : start + 2] for start in range(0, len(level), 2)]
        level = [_add_pair(team, stage, add, *pair) for pair in pairs]
    return level[0][1]


def _add_pair(
    team: Team,
    stage: str,
    add: Callable[..., T],
    first: tuple[int, Pending[T]],
    second: tuple[int, Pending[T]] | None = None,
) -> tuple[int, Pending[T]]:
    if second is None:
        return first
    return first[0], team.call(first[0], stage, add, first[1], second[1])


def add_arrays(_worker: Worker, first: Arrays, second: Arrays) -> Arrays:
    """Add arrays by their names; one may lack some."""
    both = {name: first[name] + second[name] for name in first.keys() & second.keys()}
    return {name: both[name] if name in both else (first | second)[name] for name in {**first, **second}}


def pass_on(team: Team, stage: str, value: Pending[T], places: Sequence[int]) -> dict[int, Pending[T]]:
    """Send a large value to places: each has it from another that has it, as branches of a tree, not all from one.

    Returns:
        Place -> the value there.
    """
    there: list[Pending[T]] = []
    for number, place in enumerate(places):
        nearest = there[(number - 1) // 2] if number else value
        # What is alone, or the first, has it from where it was made.
        there.append(team.call(place, stage, _same, nearest) if len(places) > 1 else value)
    return dict(zip(places, there, strict=True))


def _same(_worker: Worker, value: T) -> T:
    return value
