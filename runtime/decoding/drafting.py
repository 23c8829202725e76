"""How many tokens to draft before a verification, and whether drafting pays at all."""

from collections import defaultdict, deque

from coreinfer.runtime.generation import Drafting

__all__ = ["MAX_LENGTH", "DraftCosts", "DraftLength", "expected_tokens"]

MAX_LENGTH = 15
_WARM_UP = (0, 0, 3, 7)
"""Lengths of the first rounds, so that all that is compared was measured once; 0 decodes a token plainly."""
_KEPT = 16
"""Timings of each kind that count: the machine's speed changes."""
_FADING = 0.9
"""What a round's acceptance counts for after each later round: texts change."""
_EXPLORE_ROUNDS = 24
_PROBE_ROUNDS = 4
_FORGETTING = 0.2
_PAUSE_TOKENS, _MAX_PAUSE_TOKENS = 64, 512
_NOMINAL_DRAFT, _NOMINAL_ROW = 0.8, 0.15
"""Costs relative to a plain token: of a drafted token, and of one more row in a verification."""


class DraftCosts:
    """What drafting costs and what it brings, learnt over generations of one loaded bundle.

    Attributes:
        warm_up: draft lengths that are still to be tried; 0 decodes a token plainly.
        accepted, tried: drafts, older ones counting less and less.
        plain, draft, verify: seconds of a plain token, of a drafted one, and of a verification by its number of rows.
        plain_left, probes_left: tokens and rounds until the next decision, once drafting has been paused.
        pause: tokens that the next pause is to last.
    """

    def __init__(self) -> None:
        """Know nothing; begin as if 3 of 4 drafts had been accepted."""
        self.warm_up = list(_WARM_UP)
        self.accepted, self.tried = 3.0, 4.0
        self.plain, self.draft = Timing(), Timing()
        self.verify: defaultdict[int, Timing] = defaultdict(Timing)
        self.plain_left = self.probes_left = 0
        self.pause = _PAUSE_TOKENS

    def begin_pause(self) -> None:
        """Decode plainly for a while, next time for longer."""
        self.plain_left, self.pause = self.pause - 1, min(2 * self.pause, _MAX_PAUSE_TOKENS)

    def count_down(self) -> None:
        """Take one token off the pause; after its last one what was learnt before counts for little."""
        self.plain_left -= 1
        if self.plain_left == 0:
            self.probes_left = _PROBE_ROUNDS
            self.accepted *= _FORGETTING
            self.tried *= _FORGETTING


class DraftLength:
    """Chooses one generation's draft lengths by expected tokens a second, from acceptance and from measured times.

    With acceptance a of a drafted token, a round that drafts k returns (1 - a^(k+1)) / (1 - a) tokens on average, the
    dense model's own token included, and takes k drafted tokens and one verification of k + 1 rows. Where no k beats
    plain decoding, drafting pauses, and is tried again after 64 tokens, then after twice as many each time.
    """

    def __init__(self, costs: DraftCosts | None = None) -> None:
        """Begin a generation.

        Args:
            costs: what is known so far, to be learnt further; None to go by nominal costs and by what this generation
                accepts, so that the lengths follow from its tokens alone.
        """
        self._timed = costs is not None
        self._costs = costs or DraftCosts()
        self._num_rounds = self._num_plain = 0
        self._num_drafted = self._num_tried = self._num_accepted = 0
        self._turned_off = False

    def next(self, limit: int) -> int:
        """Give the number of tokens to draft now, at most `limit`; 0 for plain decoding."""
        costs = self._costs
        if limit < 1:
            return 0
        if costs.warm_up:
            return min(costs.warm_up.pop(0), limit)
        if costs.plain_left:
            costs.count_down()
            self._turned_off = True
            return 0
        best = max(range(1, MAX_LENGTH + 1), key=self._tokens_per_second)
        if costs.probes_left:
            costs.probes_left -= 1
        elif self._tokens_per_second(best) <= 1 / self._plain_seconds():
            costs.begin_pause()
            self._turned_off = True
            return 0
        else:
            costs.pause = _PAUSE_TOKENS
        return min(self._explored(best), limit)

    def _explored(self, best: int) -> int:
        """Try a neighbour of the best length now and then: its time may have been guessed or be out of date."""
        if not self._timed or self._num_rounds % _EXPLORE_ROUNDS != _EXPLORE_ROUNDS - 1:
            return best
        around = [length for length in (best - 1, best + 1) if 1 <= length <= MAX_LENGTH]
        return around[self._num_rounds // _EXPLORE_ROUNDS % len(around)]

    def note_plain(self, seconds: float | None) -> None:
        """Take down a token that was decoded plainly; None where its time was shared with others."""
        self._num_plain += 1
        if seconds is not None:
            self._costs.plain.add(seconds)

    def note_round(self, num_drafted: int, draft_seconds: float, verify_seconds: float) -> None:
        """Take down a round: the drafting of all its tokens, and the verification of one row more."""
        self._num_rounds += 1
        self._num_drafted += num_drafted
        self._costs.accepted *= _FADING
        self._costs.tried *= _FADING
        self._costs.draft.add(draft_seconds / num_drafted)
        self._costs.verify[num_drafted + 1].add(verify_seconds)

    def note_choice(self, *, accepted: bool) -> None:
        """Take down that a token was chosen where one was drafted."""
        self._num_tried += 1
        self._num_accepted += accepted
        self._costs.tried += 1
        self._costs.accepted += accepted

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
        acceptance = self._costs.accepted / self._costs.tried
        return expected_tokens(acceptance, length) / self._round_seconds(length)

    def _plain_seconds(self) -> float:
        # Where none was measured a drafted token takes nearly as long.
        timing = self._costs.plain or self._costs.draft
        return timing.median() if self._timed and timing else 1.0

    def _round_seconds(self, length: int) -> float:
        num_rows = length + 1
        if not self._timed:
            return length * _NOMINAL_DRAFT + 1 + _NOMINAL_ROW * (num_rows - 1)
        draft = self._costs.draft
        draft_seconds = draft.median() if draft else _NOMINAL_DRAFT * self._plain_seconds()
        return length * draft_seconds + self._verify_seconds(num_rows)

    def _verify_seconds(self, num_rows: int) -> float:
        plain, measured = self._plain_seconds(), self._costs.verify
        if num_rows in measured:
            return measured[num_rows].median()
        # A straight line through the plain token and the nearest number of rows that was measured.
        if not measured:
            return plain * (1 + _NOMINAL_ROW * (num_rows - 1))
        nearest = min(measured, key=lambda known: abs(known - num_rows))
        slope = (measured[nearest].median() - plain) / (nearest - 1)
        return plain + max(slope, 0.0) * (num_rows - 1)


def expected_tokens(acceptance: float, length: int) -> float:
    """Mean number of tokens that a round of `length` drafts returns, each accepted with the same probability."""
    return sum(acceptance**i for i in range(length + 1))


class Timing:
    """The last few timings of one kind; their median is not moved by what else the machine does now and then."""

    def __init__(self) -> None:
        """Begin without any."""
        self._seconds: deque[float] = deque(maxlen=_KEPT)

    def __bool__(self) -> bool:
        """Whether there is one."""
        return bool(self._seconds)

    def add(self, seconds: float) -> None:
        """Take one down."""
        self._seconds.append(seconds)

    def median(self) -> float:
        """Give the median, in seconds."""
        # Not at the top: whoever drafts nothing would wait some 5 ms for it, fractions and decimals included.
        from statistics import median

        return median(self._seconds)
