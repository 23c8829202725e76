"""A team of workers that compute nothing and take their time on a clock of their own: see `scaling_workers.py`.

It has the interface of the compiler's teams, so that what is simulated is the compiler's own code: how documents are
dealt, which place is asked for what and in which order, how sums are added. Only the tasks are replaced, by how long
they would take and by how many bytes they return.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

__all__ = ["Cost", "VirtualTeam"]

CALL_SECONDS = 0.0005
"""That the main process takes to ask for a task; measured of Ray on one machine."""
MAIN = -1


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a task would take and return.

    Attributes:
        bytes: of its result, which is sent to whom it is an argument for elsewhere.
        value: that the caller sees.
    """

    seconds: float
    bytes: float = 0.0
    value: Any = None


@dataclass(kw_only=True)
class _Clock:
    """When a place has done what it was asked for, and when its link is free to send and to receive."""

    free: float = 0.0
    sends: float = 0.0
    receives: float = 0.0
    busy: float = 0.0
    sent_bytes: float = 0.0


@dataclass(kw_only=True)
class _Done:
    """A task on the clock: when its result is there, and when it is at places that it was sent to."""

    team: "VirtualTeam"
    place: int
    ready: float
    cost: Cost
    arrivals: dict[int, float] = field(default_factory=dict)

    def at(self, place: int) -> float:
        """When the result is at a place; sent there once, by the links of both."""
        if place == self.place:
            return self.ready
        if place not in self.arrivals:
            source, target = self.team.clocks[self.place], self.team.clocks[place]
            start = max(self.ready, source.sends, target.receives)
            self.arrivals[place] = source.sends = target.receives = start + self.cost.bytes / self.team.link_bytes
            source.sent_bytes += self.cost.bytes
        return self.arrivals[place]

    def wait(self) -> None:
        self.team.now = max(self.team.now, self.ready)

    def result(self) -> Any:
        self.team.now = max(self.team.now, self.at(MAIN))
        return self.cost.value


class VirtualTeam:
    """Places that run tasks in the order in which they were asked for, as Ray's actors do."""

    def __init__(
        self, size: int, costs: Callable[[int, str, Sequence[Any]], Cost], *, link_gbps: float, loaded: Any = None
    ) -> None:
        """Begin at 0 seconds.

        Args:
            costs: (place, name of a task's function, its arguments) -> what it takes.
            link_gbps: gigabytes a second that a machine sends, and as many that it receives.
        """
        self.size, self.ahead, self.loaded = size, 2 * size, loaded
        self.link_bytes, self.now = link_gbps * 1e9, 0.0
        self.clocks = {place: _Clock() for place in range(MAIN, size)}
        self._costs = costs

    def call(self, place: int, _stage: str, task: Callable[..., Any], *arguments: object) -> Any:
        """See `Team`."""
        self.now += CALL_SECONDS
        clock, cost = self.clocks[place], self._costs(place, task.__name__, arguments)
        arrivals = [item.at(place) for item in arguments if isinstance(item, _Done)]
        start = max([clock.free, self.now, *arrivals])
        clock.free = start + cost.seconds
        clock.busy += cost.seconds
        return _Done(team=self, place=place, ready=clock.free, cost=cost)

    def share(self, value: Any) -> Any:
        """See `Team`; what all get once is counted by the caller."""
        return cast("Any", value)
