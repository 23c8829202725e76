"""The decoder's sequences and their pages: which run has which, and what finished runs left in them."""

from collections.abc import Callable

from coreinfer.runtime.engines.cached import CachedTokens
from coreinfer.runtime.engines.protocol import Decoder, KvPoolFull

__all__ = ["KvPool"]

NumKept = Callable[[CachedTokens], int]


class KvPool:
    """Gives each run the sequence that already holds the longest beginning of its tokens.

    A finished run's sequence stays as it is, so that a conversation's next turn, or a prompt with the same beginning,
    finds its tokens: the sequence is taken over, or forked where others may want the rest of it. The longest unused
    one goes first, when there are too many or when pages are needed.

    Attributes:
        num_to_keep: number of sequences that may exist even if fewer ran at once.
    """

    def __init__(self, decoder: Decoder) -> None:
        """Begin with sequence 0, which every decoder has."""
        self.num_to_keep = 1
        self._decoder = decoder
        self._idle: list[int] = [0]  # the longest unused first
        self._taken: set[int] = set()
        self._most_taken = 0

    @property
    def num_sequences(self) -> int:
        """Number of sequences."""
        return len(self._idle) + len(self._taken)

    @property
    def num_taken(self) -> int:
        """Number of sequences that runs have."""
        return len(self._taken)

    def take(self, num_kept: NumKept) -> tuple[int, int]:
        """Select a sequence for a run, with what the run keeps of it.

        Args:
            num_kept: how many tokens at the start of a cache the run can use.
        Returns:
            The sequence's number, and how many tokens it has.
        """
        source, kept = self._best(num_kept)
        number = self._fork(source, kept) if kept and self._is_wanted(source, kept) else None
        if number is None:
            kept = kept if source in self._idle else 0
            number = source if kept else self._empty()
        self._decoder.select(number)
        self._decoder.truncate(kept)
        if number in self._idle:
            self._idle.remove(number)
        self._taken.add(number)
        self._most_taken = max(self._most_taken, len(self._taken))
        return number, kept

    def leave(self, number: int, num_tokens: int) -> None:
        """Take a run's sequence back, with the tokens at its start that others may use."""
        if num_tokens == 0:
            self.drop(number)
            return
        self._decoder.select(number)
        self._decoder.truncate(num_tokens)
        self._taken.remove(number)
        self._idle.append(number)

    def drop(self, number: int) -> None:
        """Take a run's sequence back, with nothing that others may use: a call on it failed, or its room is needed."""
        self._taken.remove(number)
        self._idle.insert(0, number)
        self._forget(number)

    def evict(self) -> bool:
        """Forget what the longest unused sequence holds; False if no idle sequence holds anything."""
        for number in self._idle:
            if self._length(number):
                self._forget(number)
                return True
        return False

    def make_room(self, num_tokens: int, num_more: int) -> bool:
        """Evict until a sequence of some tokens can have some more; False if that is not enough."""
        size = self._decoder.page_tokens
        # One more for a page that is shared and not full.
        needed = -(-(num_tokens + num_more) // size) - num_tokens // size
        while self._decoder.num_free_pages < needed:
            if not self.evict():
                return False
        return True

    def _best(self, num_kept: NumKept) -> tuple[int, int]:
        """Find the sequence of which a run can use most; of equals one that is idle, and the longest unused."""
        best, most = 0, -1
        for number in (*self._idle, *self._taken):
            self._decoder.select(number)
            if (kept := num_kept(self._decoder.cached)) > most:
                best, most = number, kept
        return best, most

    def _is_wanted(self, number: int, kept: int) -> bool:
        """Whether a sequence should stay as it is, although a run could take it over."""
        if number in self._taken:
            return True
        has_place = self._may_add or len(self._idle) > 1
        return has_place and self._length(number) - kept > self._decoder.page_tokens

    @property
    def _may_add(self) -> bool:
        return self.num_sequences < max(self.num_to_keep, self._most_taken, len(self._taken) + 1)

    def _fork(self, source: int, kept: int) -> int | None:
        if not self._may_add:
            # Sequence 0 would stay, and make no place.
            longest = next((number for number in self._idle if number not in (0, source)), 0)
            self._forget(longest)
        try:
            number = self._decoder.fork_sequence(source, kept)
        except KvPoolFull:
            return None
        self._idle.append(number)
        return number

    def _empty(self) -> int:
        """Find a sequence that may be emptied, or add one."""
        unused = next((number for number in self._idle if not self._length(number)), None)
        if unused is not None:
            return unused
        if self._may_add:
            self._idle.insert(0, self._decoder.add_sequence())
        return self._idle[0]

    def _forget(self, number: int) -> None:
        """Empty an idle sequence; 0 stays, all others go."""
        if number == 0:
            self._decoder.select(0)
            self._decoder.truncate(0)
        else:
            self._idle.remove(number)
            self._decoder.drop_sequence(number)

    def _length(self, number: int) -> int:
        self._decoder.select(number)
        return self._decoder.num_cached
