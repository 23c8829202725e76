"""The decoder's sequences: which run has which, and what those of finished runs still hold."""

from collections.abc import Callable

from coreinfer.runtime.cached import CachedTokens
from coreinfer.runtime.decoder import Decoder

__all__ = ["KvPool"]


class KvPool:
    """Gives each run a sequence, the one whose cache it can use most of.

    A finished run's sequence stays as it is until another takes it over, so that a conversation's next turn or a
    prompt with the same beginning finds its tokens. There are never more sequences than ran at once.
    """

    def __init__(self, decoder: Decoder) -> None:
        """Begin with sequence 0, which every decoder has."""
        self._decoder = decoder
        self._idle: list[int] = [0]  # the longest unused first
        self._taken: set[int] = set()

    @property
    def num_sequences(self) -> int:
        """Sequences that there are."""
        return len(self._idle) + len(self._taken)

    @property
    def num_taken(self) -> int:
        """Sequences that runs have."""
        return len(self._taken)

    def take(self, num_kept: Callable[[CachedTokens], int]) -> tuple[int, int]:
        """Select a sequence for a run, cut to what the run keeps of it.

        Args:
            num_kept: how many tokens at the start of a cache the run can use.
        Returns:
            The sequence's number, and how many tokens it keeps.
        """
        decoder = self._decoder
        if not self._idle:
            self._idle.append(decoder.add_sequence())
        kept = {number: self._num_kept(number, num_kept) for number in self._idle}
        # Of equals the longest unused one.
        number = max(self._idle, key=lambda candidate: kept[candidate])
        self._idle.remove(number)
        self._taken.add(number)
        decoder.select(number)
        decoder.truncate(kept[number])
        return number, kept[number]

    def _num_kept(self, number: int, num_kept: Callable[[CachedTokens], int]) -> int:
        self._decoder.select(number)
        return num_kept(self._decoder.cached)

    def leave(self, number: int, num_tokens: int) -> None:
        """Take a run's sequence back, with the tokens at its start that others may use."""
        self._decoder.select(number)
        self._decoder.truncate(num_tokens)
        self._taken.remove(number)
        self._idle.append(number)

    def drop(self, number: int) -> None:
        """Take a run's sequence back, with nothing that others may use: a call on it failed, or its room is needed."""
        self._taken.remove(number)
        self._decoder.select(number)
        self._decoder.truncate(0)
        if number == 0:
            self._idle.insert(0, number)
        else:
            self._decoder.drop_sequence(number)
