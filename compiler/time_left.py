"""The time that a compile still takes: a forecast, corrected by how long its stages really took."""

from collections.abc import Sequence

__all__ = ["TimeLeft"]

_TRUST_SECONDS = 10.0
"""What the forecast is believed for before any stage has ended: that many seconds, which took as long as foretold."""
_KNOWN_SHARE = 0.1
"""Of a stage: from here on, its own pace says how long the rest takes."""


class TimeLeft:
    """Follows the stages of a forecast; all times are seconds of one clock."""

    def __init__(self, forecast: Sequence[tuple[str, float]]) -> None:
        """Take the stages in their order; one that is foretold and does not run was in the cache."""
        self._coming = list(forecast)
        self._is_foretold = bool(self._coming)
        self._foretold = self._taken = _TRUST_SECONDS
        self._current: float | None = None
        self._began = self._advanced = 0.0
        self._done = 0.0
        self._highest = 0.0

    def begin(self, name: str, now: float) -> None:
        """Go on to a stage, past those that did not run; a stage that is not foretold changes nothing."""
        names = [stage for stage, _ in self._coming]
        self._current, self._done = None, 0.0
        self._began = self._advanced = now
        if name in names:
            place = names.index(name)
            self._current = self._coming[place][1]
            self._coming = self._coming[place + 1 :]

    def advance(self, done: float, now: float) -> None:
        """Take in that a share of the stage is done."""
        self._done, self._advanced = min(1.0, done), now

    def end(self, now: float) -> None:
        """Take in how long the stage took."""
        if self._current is not None:
            self._foretold += self._current
            self._taken += now - self._began
        self._current, self._done = None, 0.0

    def seconds(self, now: float) -> float:
        """Seconds that are left."""
        pace = self._taken / self._foretold
        return pace * sum(seconds for _, seconds in self._coming) + self._rest_of_stage(pace, now)

    def _rest_of_stage(self, pace: float, now: float) -> float:
        if self._current is None:
            return 0.0
        whole = pace * self._current
        if self._done >= _KNOWN_SHARE:
            whole = (self._advanced - self._began) / self._done
        return max(0.0, whole - (now - self._began))

    def share(self, elapsed: float, now: float) -> float | None:
        """Share of the whole that is over, which never falls; None where nothing is foretold."""
        if not self._is_foretold:
            return None
        self._highest = max(self._highest, elapsed / max(1e-9, elapsed + self.seconds(now)))
        return self._highest
