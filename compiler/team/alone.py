"""All places in this process."""

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Generic, TypeVar, cast

from coreinfer.compiler.models.load import LoadedModel

from .team import Pending, Shared, Worker

__all__ = ["Alone"]

Item = TypeVar("Item")
T = TypeVar("T")


class Alone:
    """A team of this process: a task runs when its result is wanted, and nothing is sent."""

    ahead = 0

    def __init__(self, loaded: LoadedModel, size: int = 1) -> None:
        """Have some places; one is what a compile without Ray has, more add up as that many processes would."""
        self.loaded = loaded
        self.size = size
        self._workers = [Worker(place=place, loaded=loaded) for place in range(size)]

    def call(self, place: int, stage: str, task: Callable[..., T], *arguments: object) -> Pending[T]:
        """See `Team`."""
        return _Later(task, [self._workers[place], *arguments])

    def stream(self, task: Callable[..., T], items: Iterable[Item], *arguments: object) -> Generator[T, None, None]:
        """See `Team`."""
        return (task(item, *arguments) for item in items)

    def share(self, value: T) -> Shared[T]:
        """See `Team`."""
        return _Here(value)


class _Here(Generic[T]):
    """A value in this process."""

    def __init__(self, value: T) -> None:
        self._value = value

    def value(self) -> T:
        return self._value


class _Later(Generic[T]):
    """A task that waits to be wanted."""

    def __init__(self, task: Callable[..., T], arguments: Sequence[object]) -> None:
        self._waiting: tuple[Callable[..., T], Sequence[object]] | None = (task, arguments)
        self._result: T | None = None

    def result(self) -> T:
        if self._waiting is not None:
            task, arguments = self._waiting
            self._result = task(*[item.result() if isinstance(item, _Later) else item for item in arguments])
            # What it was made of is let go.
            self._waiting = None
        return cast("T", self._result)

    def wait(self) -> None:
        self.result()
