"""Which documents and which other work go to which place, and what is asked for before what."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from .team import Team

__all__ = ["Stepwise", "deal", "finish", "home", "homes_of", "in_turn", "overlapped"]

Ids = npt.NDArray[np.int64]
Item = TypeVar("Item")
T = TypeVar("T")
Stepwise = Generator[None, None, T]
"""Work in steps: what a step asks for may have to wait for what the one before asked other places for."""


def deal(lengths: Sequence[int], team: Team, labels: Ids | None = None) -> Mapping[int, Ids]:
    """Deal documents to places: as many tokens to each as whole documents allow.

    With labels, the documents of a cluster stay together: no more clusters are shared by places than there are cuts,
    and of all others nothing has to be sent to be summed.

    Args:
        lengths: tokens of each document.
        labels: (documents,) cluster ids.
    Returns:
        Place -> indices of its documents, ascending; without places that get none.
    """
    tokens = np.array(lengths, dtype=np.int64)
    order = np.arange(len(tokens)) if labels is None else np.argsort(labels, kind="stable")
    # A document belongs where its middle lies.
    middles = 2 * np.cumsum(tokens[order]) - tokens[order]
    places = np.minimum(middles * team.size // max(1, 2 * int(tokens.sum())), team.size - 1)
    dealt = {place: np.sort(order[places == place]) for place in range(team.size)}
    return {place: ids for place, ids in dealt.items() if len(ids)}


def home(team: Team, number: int) -> int:
    """Place of a cluster's or a layer's own work, which is the same for each."""
    return number % team.size


def homes_of(counts: Sequence[Mapping[int, int]], team: Team) -> dict[int, int]:
    """Place of each cluster's own work: where its text is, as long as no place gets more clusters than its share.

    Args:
        counts: of each cluster, place -> tokens.
    Returns:
        Cluster -> place, in an order in which neighbours have text at different places, so that these work at once.
    """
    main = [max(places, key=lambda place: (places[place], -place), default=0) for places in counts]
    ranks = [main[:cluster].count(place) for cluster, place in enumerate(main)]
    order = sorted(range(len(counts)), key=lambda cluster: (ranks[cluster], main[cluster]))
    most, loads = -(-len(counts) // team.size), [0] * team.size
    homes = {}
    for cluster in order:
        place = main[cluster]
        if loads[place] >= most:
            place = loads.index(min(loads))
        homes[cluster] = place
        loads[place] += 1
    return homes


def in_turn(team: Team, items: Iterable[Item], ask: Callable[[Item], T]) -> Iterator[tuple[Item, T]]:
    """Ask for each item's work, some ahead of the one that is yielded, which come in their order."""
    asked: deque[tuple[Item, T]] = deque()
    for item in items:
        asked.append((item, ask(item)))
        if len(asked) > team.ahead:
            yield asked.popleft()
    yield from asked


def finish(steps: Stepwise[T]) -> T:
    """Take all steps, one after another."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: T = end.value
            return found


def overlapped(team: Team, items: Iterable[Item], begin: Callable[[Item], Stepwise[T]]) -> Iterator[tuple[Item, T]]:
    """Work on items step by step; each begins before the one before it takes its second step, and so on.

    Places do what they are asked for in that order: where one would wait for another's part of a sum, it has work of
    the next item meanwhile. Where nothing is asked for in advance, each item is finished before the next begins.

    Yields:
        Items, in their order, and what came of them.
    """
    running: deque[tuple[Item, list[T], Iterator[None]]] = deque()
    coming = iter(items)
    while True:
        for item in islice(coming, 1):
            found: list[T] = []
            running.append((item, found, _keep_end(begin(item), found)))
        if not running:
            return
        # The newest first.
        for _, _, steps in reversed(running):
            next(steps, None)
        while running and (running[0][1] or not team.ahead):
            yield _finished(*running.popleft())


def _keep_end(steps: Stepwise[T], found: list[T]) -> Iterator[None]:
    found.append((yield from steps))


def _finished(item: Item, found: list[T], steps: Iterator[None]) -> tuple[Item, T]:
    for _ in steps:
        pass
    return item, found[0]
