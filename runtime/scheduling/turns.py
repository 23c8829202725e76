"""Which runs a step decodes, and how much of a prompt it reads, so that no run waits long."""

import math
from collections.abc import Sequence

from .ffn_switch import same_weights
from .groups import Group

__all__ = ["Pace", "Turns"]

_TURN_STEPS = 8
_LEAST_BLOCK_TOKENS = 16
# In a pass that decodes as well: nothing is read for them that was not read anyhow.
_LEAST_BESIDE_TOKENS = 4
# Of a step's decoding; the rest is for what a step takes besides.
_READING_SHARE = 0.8
_NEWEST = 0.2
# A step of as many runs is timed by itself again after so many that read a block beside it.
_TIMED_EVERY = 16
# A machine that stood still for a while must not keep prompts from being read for as long.
_MOST_DEBT_STEPS = 8


class Turns:
    """Lets groups whose weights take time to load decode in turns, several steps each; all others in every step."""

    def __init__(self, *, cheap_swaps: bool) -> None:
        """Begin; `cheap_swaps` is the decoder's."""
        self._cheap_swaps = cheap_swaps
        self._last: Group | None = None
        self._num_left = 0

    def pick(self, groups: Sequence[Group]) -> list[Group]:
        """Choose the groups that decode in this step."""
        if len(groups) < 2:
            return list(groups)
        # A prompt's own neurons are gathered anew at every swap.
        cheap = [group for group in groups if self._cheap_swaps and group[0].neuron_ids is None]
        units = [[group] for group in groups if all(group is not other for other in cheap)]
        units += [cheap] if cheap else []
        if len(units) < 2:
            return units[0]
        at = next((index for index, unit in enumerate(units) if self._was_last(unit)), -1)
        if at < 0 or self._num_left == 0:
            at, self._num_left = (at + 1) % len(units), _TURN_STEPS
        self._num_left -= 1
        self._last = units[at][0]
        return units[at]

    def _was_last(self, unit: Sequence[Group]) -> bool:
        last = self._last
        return last is not None and any(same_weights(choice, last[0]) for choice, _ in unit)


class Pace:
    """Measured times of reading and decoding: while others decode, reading gets at most as much time as decoding.

    A block should take no longer than a step. Where even the smallest block does, steps without a block follow it, so
    that tokens come at least half as fast as usual.
    """

    def __init__(self) -> None:
        """Begin without measurements."""
        self._step_seconds: dict[int, float] = {}  # by number of runs
        self._num_beside: dict[int, int] = {}  # steps with a block, since as many runs were timed alone
        self._token_seconds: float | None = None
        self._debt_seconds = 0.0

    @property
    def may_read(self) -> bool:
        """Whether decoding has had as much time as reading."""
        return self._debt_seconds <= 0

    def may_read_beside(self, num_runs: int) -> bool:
        """Whether a block may share the pass of some runs: it was timed of late what they take alone."""
        return self._num_beside.get(num_runs, _TIMED_EVERY) < _TIMED_EVERY

    def block_tokens(self, num_runs: int, *, beside: bool, num_waiting: int) -> int:
        """Tokens of a prompt to read while others decode.

        Args:
            num_runs: that decode.
            beside: whether in their pass.
            num_waiting: prompts to read; while several wait, so do those who asked, and blocks are not the smallest.
        """
        least = _LEAST_BESIDE_TOKENS if beside and num_waiting == 1 else _LEAST_BLOCK_TOKENS
        step_seconds = self._step_seconds.get(num_runs)
        if step_seconds is None or not self._token_seconds:
            return least
        return max(least, int(_READING_SHARE * step_seconds / self._token_seconds))

    def note_step(self, num_runs: int, seconds: float) -> None:
        """Record the decoding time of a step."""
        self._step_seconds[num_runs] = _moved(self._step_seconds.get(num_runs), seconds)
        self._num_beside[num_runs] = 0
        self._debt_seconds = max(0.0, self._debt_seconds - seconds)

    def note_block(self, num_tokens: int, seconds: float, *, others_decode: bool) -> None:
        """Record the reading time of a block."""
        self._token_seconds = _moved(self._token_seconds, seconds / num_tokens)
        self._debt_seconds = min(seconds, self._most_debt_seconds) if others_decode else 0.0

    def note_beside(self, num_runs: int, num_tokens: int, seconds: float) -> None:
        """Record the time of a step that read a block as well: what it takes more is the block's."""
        step_seconds = self._step_seconds.get(num_runs, 0.0)
        block_seconds = max(seconds - step_seconds, 0.1 * seconds)
        self._token_seconds = _moved(self._token_seconds, block_seconds / num_tokens)
        self._num_beside[num_runs] = self._num_beside.get(num_runs, 0) + 1
        self._debt_seconds = min(max(0.0, block_seconds - step_seconds), self._most_debt_seconds)

    @property
    def _most_debt_seconds(self) -> float:
        return _MOST_DEBT_STEPS * max(self._step_seconds.values(), default=math.inf)


def _moved(mean: float | None, value: float) -> float:
    # The same machine's pauses are no measure of what a pass takes.
    return mean + _NEWEST * (min(value, 2 * mean) - mean) if mean else value
