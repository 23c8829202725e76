"""What stages know of those who do the work: places, each with a worker that holds the model.

A stage that sums over documents deals them to the places, asks each for its sum, and adds the sums in a fixed order
(`dealing.py`, `adding.py`). What comes out depends on how many places there are, and on nothing else: not on which
process stands at a place, nor on whether it had to be replaced.
"""

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from coreinfer.compiler.models.load import LoadedModel

__all__ = ["Pending", "Shared", "Team", "Worker", "forget"]

Item = TypeVar("Item")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(kw_only=True)
class Worker:
    """What a task finds where it runs.

    Tasks are functions of their arguments and of the model. What they leave here for those that come after them, such
    as hidden states between two layers, only saves time: a worker that replaces another makes it again.

    Attributes:
        place: of those that stages deal to.
        loaded: the model.
        notes: slot -> key and value of what was left there last.
    """

    place: int
    loaded: LoadedModel
    notes: dict[str, tuple[str, Any]] = field(default_factory=dict)

    def recall(self, slot: str, key: str, make: Callable[[], T]) -> T:
        """Return what was made for a key, or make it now; a slot holds one thing, so that the one before is let go."""
        if slot not in self.notes or self.notes[slot][0] != key:
            self.notes.pop(slot, None)
            self.notes[slot] = (key, make())
        found: T = self.notes[slot][1]
        return found

    def forget(self, slot: str) -> None:
        """Let go of what a slot holds."""
        self.notes.pop(slot, None)


class Pending(Protocol[T_co]):
    """What a task will return, wherever it runs; may be an argument of other tasks."""

    def result(self) -> T_co:
        """Wait for it, and have it here."""

    def wait(self) -> None:
        """Wait until it is there, wherever that is."""


class Shared(Protocol[T_co]):
    """A value that several tasks take, or that a task looks up only when it has to."""

    def value(self) -> T_co:
        """Return it, wherever this is asked."""


class Team(Protocol):
    """Places at which tasks run one at a time, in the order in which they were asked for.

    Attributes:
        size: how many places there are.
        ahead: how many steps of a stage to ask for before the first one's result is waited for.
        loaded: the model in this process.
    """

    @property
    def size(self) -> int:
        """See the class."""

    @property
    def ahead(self) -> int:
        """See the class."""

    @property
    def loaded(self) -> LoadedModel:
        """See the class."""

    def call(self, place: int, stage: str, task: Callable[..., T], *arguments: object) -> Pending[T]:
        """Ask for `task(worker, *arguments)`, a function of a module, at a place.

        Args:
            stage: that the task belongs to, to show and to count its time.
            arguments: values, pending ones among them.
        """

    def stream(self, task: Callable[..., T], items: Iterable[Item], *arguments: object) -> Generator[T, None, None]:
        """Yield `task(item, *arguments)` of each item, in their order, wherever it runs; a function of a module.

        It needs no model, and has no place. Items are asked for as they are needed; close what is returned to stop.
        """

    def share(self, value: T) -> Shared[T]:
        """Make a value known to all places; it is sent to each process once, when it is first looked up there."""


def forget(team: Team, stage: str, slot: str) -> None:
    """Let all workers let go of what a slot holds."""
    for waiting in [team.call(place, stage, _forget, slot) for place in range(team.size)]:
        waiting.result()


def _forget(worker: Worker, slot: str) -> None:
    worker.forget(slot)
