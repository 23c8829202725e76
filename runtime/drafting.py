"""How many tokens to draft before a verification, and whether drafting pays at all."""

import statistics
from collections import defaultdict, deque
from collections.abc import Iterable

from .generation import Drafting

__all__ = ["MAX_LENGTH", "DraftLength"]

MAX_LENGTH = 15
_WARM_UP = (0, 0, 3, 7)
"""Lengths of the first rounds, so that all that is compared was measured once; 0 decodes a token plainly."""
_KEPT = 16
"""Timings of each kind that count: the machine's speed changes."""
_FADING = 0.9
"""What a round's acceptance counts for after each later round: texts change."""
_EXPLORE_ROUNDS = 24
_PROBE_ROUNDS = 2
_PAUSE_TOKENS, _MAX_PAUSE_TOKENS = 64, 512
_NOMINAL_DRAFT, _NOMINAL_ROW = 0.8, 0.15
"""Costs beside a plain token of 1: of a drafted token, and of one more row in a verification."""


class DraftLength:
    """Chooses draft lengths by expected tokens a second, from acceptance and from measured times.

    With acceptance a of a drafted token, a round that drafts k gives (1 - a^(k+1)) / (1 - a) tokens on average, the
    dense model's own token included, and takes k drafted tokens and one verification of k + 1 rows. Where no k beats
    plain decoding, drafting pauses, and is tried again after 64 tokens, then after twice as many each time.
    """

    def __init__(self, *, timed: bool) -> None:
        """Begin a generation.

        Args:
            timed: go by measured times; otherwise by nominal costs, so that the lengths follow from the tokens alone.
        """
        self._timed = timed
        # As if 3 of 4 had been accepted.
        self._accepted, self._tried = 3.0, 4.0
        self._plain = _Timing()
        self._draft = _Timing()
        self._verify: defaultdict[int, _Timing] = defaultdict(_Timing)
        self._num_decisions = self._num_rounds = 0
        self._pause = _PAUSE_TOKENS
        self._plain_left = self._probes_left = 0
        self._num_drafted = self._num_tried = self._num_accepted = self._num_plain = 0
        self._turned_off = False

    def next(self, limit: int) -> int:
        """Give the number of tokens to draft now, at most `limit`; 0 for plain decoding."""
        number, self._num_decisions = self._num_decisions, self._num_decisions + 1
        if number < len(_WARM_UP):
            return min(_WARM_UP[number], limit)
        if self._plain_left:
            self._plain_left -= 1
            self._probes_left = _PROBE_ROUNDS
            return 0
        best = max(range(1, MAX_LENGTH + 1), key=self._tokens_per_second)
        if self._probes_left:
            self._probes_left -= 1
        elif self._tokens_per_second(best) <= 1 / self._plain_seconds():
            self._plain_left, self._pause = self._pause - 1, min(2 * self._pause, _MAX_PAUSE_TOKENS)
            self._turned_off = True
            return 0
        else:
            self._pause = _PAUSE_TOKENS
        return min(self._explored(best), limit)

    def _explored(self, best: int) -> int:
        """Try a neighbour of the best length now and then: its time may have been guessed or be out of date."""
        if not self._timed or self._num_rounds % _EXPLORE_ROUNDS != _EXPLORE_ROUNDS - 1:
            return best
        around = [length for length in (best - 1, best + 1) if 1 <= length <= MAX_LENGTH]
        return around[self._num_rounds // _EXPLORE_ROUNDS % len(around)]

    def note_plain(self, seconds: float) -> None:
        """Take down a token that was decoded plainly."""
        self._num_plain += 1
        self._plain.add(seconds)

    def note_round(self, num_drafted: int, draft_seconds: float, verify_seconds: float) -> None:
        """Take down a round: the drafting of all its tokens, and the verification of one row more."""
        self._num_rounds += 1
        self._num_drafted += num_drafted
        self._accepted *= _FADING
        self._tried *= _FADING
        self._draft.add(draft_seconds / num_drafted)
        self._verify[num_drafted + 1].add(verify_seconds)

    def note_choice(self, *, accepted: bool) -> None:
        """Take down that a token was chosen where one was drafted."""
        self._num_tried += 1
        self._num_accepted += accepted
        self._tried += 1
        self._accepted += accepted

    def report(self) -> Drafting:
        """Sum up the generation so far."""
        return Drafting(
            num_drafted=self._num_drafted,
            num_tried=self._num_tried,
            num_accepted=self._num_accepted,
            num_rounds=self._num_rounds,
            num_plain=self._num_plain,
            turned_off=self._turned_off,
        )

    def _tokens_per_second(self, length: int) -> float:
        return expected_tokens(self._accepted / self._tried, length) / self._round_seconds(length)

    def _plain_seconds(self) -> float:
        return self._plain.median() if self._timed else 1.0

    def _round_seconds(self, length: int) -> float:
        num_rows = length + 1
        if not self._timed:
            return length * _NOMINAL_DRAFT + 1 + _NOMINAL_ROW * (num_rows - 1)
        draft = self._draft.median() if self._draft else _NOMINAL_DRAFT * self._plain_seconds()
        return length * draft + self._verify_seconds(num_rows)

    def _verify_seconds(self, num_rows: int) -> float:
        if num_rows in self._verify:
            return self._verify[num_rows].median()
        # A straight line through the plain token and the nearest number of rows that was measured.
        plain = self._plain_seconds()
        if not self._verify:
            return plain * (1 + _NOMINAL_ROW * (num_rows - 1))
        nearest = min(self._verify, key=lambda measured: abs(measured - num_rows))
        slope = (self._verify[nearest].median() - plain) / (nearest - 1)
        return plain + max(slope, 0.0) * (num_rows - 1)


def expected_tokens(acceptance: float, length: int) -> float:
    """Tokens that a round of `length` drafts gives on average, each accepted with the same probability."""
    return sum(acceptance**i for i in range(length + 1))


class _Timing:
    """The last few timings of one kind; their median is not moved by what else the machine does now and then."""

    def __init__(self, seconds: Iterable[float] = ()) -> None:
        self._seconds = deque(seconds, maxlen=_KEPT)

    def __bool__(self) -> bool:
        return bool(self._seconds)

    def add(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def median(self) -> float:
        return statistics.median(self._seconds)
