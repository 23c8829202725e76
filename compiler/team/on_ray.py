"""A team of Ray actors: Ray starts them, replaces those that die and asks their tasks again, and carries what is sent.

Tasks are functions of their arguments and the model (`team.py`), so that asking again is all that a fault takes.
"""

import gc
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Generic, TypeVar, cast

import ray
from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.shared.ray_cluster import on_ray
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.progress import Progress
from ray.exceptions import RayActorError, RayTaskError

from .place import Place, Setup, send_tensors
from .ray_stream import ray_stream
from .spent import Spent, WorkerReport
from .team import Pending, Shared

__all__ = ["RayTeam", "ray_team"]

Item = TypeVar("Item")
T = TypeVar("T")
_MAIN = -1
"""The main process, among those that get what a worker sends."""
_SETTLE_EVERY = 256
_FETCHED = 6
"""Shared values that a process keeps at hand."""


@contextmanager
def ray_team(
    address: str, num_workers: int, setup: Setup, load: Callable[[], LoadedModel], progress: Progress
) -> Iterator["RayTeam"]:
    """Start the workers, for the time of the block.

    Args:
        address: of a Ray cluster, or "local" to start Ray on this machine.
        load: loads the model in this process, while the workers load it too.
        progress: gets what the workers took.
    Raises:
        ConfigError: there is no Ray at the address, or a worker cannot load the model.
    """
    with ExitStack() as stack:
        # By this thread: the system ends Ray's processes with the thread that started them.
        team = _start(stack, address, num_workers, setup)
        loaded = load()
        with progress.stage("workers", 1) as advance:
            team.begin(loaded)
            advance()
        yield team
        progress.workers = [report.fields() for report in team.reports()]


def _start(stack: ExitStack, address: str, num_workers: int, setup: Setup) -> "RayTeam":
    """Connect to Ray and start the actors; the stack ends both."""
    num_cpus = num_workers * setup.threads
    stack.enter_context(on_ray(address, num_cpus=num_cpus, sends_arrays=True))
    if (found := ray.cluster_resources().get("CPU", 0)) < num_cpus:
        raise ConfigError(
            f"--ray {address}: expected {num_cpus} CPUs, for {num_workers} workers of {setup.threads} threads, got "
            f"{found:g}; lower --workers or --threads, or add machines"
        )
    send_tensors()
    team = RayTeam(num_workers, setup)
    stack.callback(team.stop)
    return team


class RayTeam:
    """One actor a place.

    Attributes:
        loaded: the model in this process, since `begin`.
        actors: place -> handle of its actor.
    """

    loaded: LoadedModel

    def __init__(self, size: int, setup: Setup) -> None:
        """Start the actors, which load the model."""
        self.size = size
        # Of each place two steps in advance: nobody waits while the main process adds and stores.
        self.ahead = 2 * size
        self._reports = [WorkerReport() for _ in range(size)]
        self._unsettled: list[_Asked] = []
        actor = ray.remote(num_cpus=setup.threads, max_restarts=-1, max_task_retries=-1)(Place)
        self.actors: list[Any] = [
            actor.options(name=f"coreinfer-compile {os.getpid()}: worker {place}").remote(place, setup)
            for place in range(size)
        ]
        self._begun = [self.call(place, "load", _nothing) for place in range(size)]

    def begin(self, loaded: LoadedModel) -> None:
        """Wait until the actors have the model.

        Args:
            loaded: the model in this process.
        """
        self.loaded = loaded
        while self._begun:
            self._begun.pop().result()

    def call(self, place: int, stage: str, task: Callable[..., T], *arguments: object) -> Pending[T]:
        """See `Team`."""
        asked = _Asked(place=place, report=self._reports[place])
        given = [item.ref_for(place) if isinstance(item, _RayPending) else item for item in arguments]
        # The dashboard shows these names.
        name = f"{stage}: {task.__name__.strip('_')}"
        result, asked.ref = self.actors[place].run.options(name=name, num_returns=2).remote(stage, task, *given)
        self._unsettled.append(asked)
        if len(self._unsettled) >= _SETTLE_EVERY:
            self._settle(wait=False)
        return _RayPending(result, asked)

    def stream(self, task: Callable[..., T], items: Iterable[Item], *arguments: object) -> Generator[T, None, None]:
        """See `Team`."""
        return ray_stream(task, items, arguments, num_at_once=self.size)

    def share(self, value: T) -> Shared[T]:
        """See `Team`."""
        return _Stored(ray.put(value))

    def reports(self) -> list[WorkerReport]:
        """What each place's worker took so far."""
        self._settle(wait=True)
        return self._reports

    def stop(self) -> None:
        """End the actors, and let go of all that refers to them.

        Where a program compiles twice, another Ray may give the same numbers again: what is let go of late would be
        taken for what is in use there.
        """
        for actor in self.actors:
            ray.kill(actor, no_restart=True)
        self.actors.clear()
        self._unsettled.clear()
        gc.collect()

    def _settle(self, *, wait: bool) -> None:
        """Take in what tasks took that are over, or wait for all."""
        refs = [asked.ref for asked in self._unsettled]
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=None if wait else 0) if refs else ([], [])
        found = dict(zip(ready, ray.get(ready), strict=True))
        for asked in self._unsettled:
            if asked.ref in found:
                asked.settle(found[asked.ref])
        self._unsettled = [asked for asked in self._unsettled if asked.ref is not None]


def _nothing(_worker: object) -> None:
    pass


@dataclass(kw_only=True)
class _Asked:
    """A task that was asked for.

    Attributes:
        report: of its place.
        receivers: of its result, that place among them.
        ref: reference of what it took.
        spent: what it took, once that is known here.
    """

    place: int
    report: WorkerReport
    receivers: set[int] = field(default_factory=set)
    ref: Any = None
    spent: Spent | None = None

    def send_to(self, place: int) -> None:
        if place not in self.receivers:
            self.receivers.add(place)
            if self.spent is not None and place != self.place:
                self.report.sent_bytes[self.spent.stage] += self.spent.result_bytes

    def settle(self, spent: Spent) -> None:
        self.spent, self.ref = spent, None
        self.report.add(spent, len(self.receivers - {self.place}))


class _RayPending(Generic[T]):
    """The reference of a result."""

    def __init__(self, ref: Any, asked: _Asked) -> None:
        self._ref, self._asked = ref, asked

    def ref_for(self, place: int) -> Any:
        self._asked.send_to(place)
        return self._ref

    def result(self) -> T:
        return cast("T", _get(self.ref_for(_MAIN)))

    def wait(self) -> None:
        ray.wait([self._ref], fetch_local=False)


def _get(ref: Any) -> Any:
    """Get a value, or raise what the task raised, as it would be raised here."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        cause: BaseException = error
        while isinstance(cause, RayTaskError) and cause.cause is not None:
            cause = cause.cause
        raise cause from error
    except RayActorError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--ray: a worker cannot be kept running ({reason})") from error


class _Stored(Generic[T]):
    """A value in Ray's object store."""

    def __init__(self, ref: Any) -> None:
        self._ref = ref

    def value(self) -> T:
        return cast("T", _fetched(self._ref))


@lru_cache(maxsize=_FETCHED)
def _fetched(ref: Any) -> Any:
    return ray.get(ref)
