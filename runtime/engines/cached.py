"""What a decoder's KV cache holds, and how much of it another prompt may reuse."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .protocol import FfnChoice

__all__ = ["CachedTokens", "blocks"]


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One call of `Decoder.forward`, or what is left of it.

    Attributes:
        num_read: tokens that it computed, more than from `start` to `end` if some were forgotten.
        choice: with which FFN weights; None where unknown.
    """

    start: int
    end: int
    num_read: int
    choice: FfnChoice | None


class CachedTokens:
    """The tokens in a KV cache, and the calls that put them there.

    The decoder itself keeps this record, so that it is right for every user of the decoder.
    """

    def __init__(self) -> None:
        """Begin with an empty cache."""
        self.token_ids: list[int] = []
        self._calls: list[_Call] = []

    def append(self, token_ids: Sequence[int], choice: FfnChoice | None) -> None:
        """Note a call that succeeded."""
        start = len(self.token_ids)
        self.token_ids.extend(token_ids)
        self._calls.append(_Call(start=start, end=len(self.token_ids), num_read=len(token_ids), choice=choice))

    def truncate(self, num_tokens: int) -> None:
        """Forget the tokens after the first `num_tokens`."""
        del self.token_ids[num_tokens:]
        while self._calls and self._calls[-1].start >= num_tokens:
            self._calls.pop()
        if self._calls and self._calls[-1].end > num_tokens:
            self._calls[-1] = replace(self._calls[-1], end=num_tokens)

    def fork(self, num_tokens: int) -> "CachedTokens":
        """The record of a sequence that begins with the first `num_tokens` of this one's."""
        record = CachedTokens()
        record.token_ids, record._calls = list(self.token_ids), list(self._calls)
        record.truncate(num_tokens)
        return record

    def num_common(self, prompt_ids: Sequence[int]) -> int:
        """Count the tokens that a prompt shares with the cache from the start on, its last one left to be read."""
        room = min(len(self.token_ids), len(prompt_ids) - 1)
        return next((i for i in range(room) if self.token_ids[i] != prompt_ids[i]), max(room, 0))

    def num_exact(self, prompt_ids: Sequence[int], choice: FfnChoice, block_tokens: int, *, alike: bool) -> int:
        """Count the tokens at the start of a prompt that reading it would put into the cache once more, bit for bit.

        Args:
            block_tokens: of a prompt that are read at once.
            alike: see `Decoder.calls_alike`. If not, rounding depends on how many tokens a call reads, and only what
                the very same calls have read counts: whole blocks, by the same FFN weights.
        """
        num_common = self.num_common(prompt_ids)
        if alike:
            return _joining(min(num_common, self._num_read_together(choice)), len(prompt_ids), block_tokens)
        num_exact = 0
        for call, (start, end) in zip(self._calls, blocks(0, len(prompt_ids), block_tokens), strict=False):
            whole = (call.start, call.end, call.num_read) == (start, end, end - start)
            if end > num_common or not whole or not _same(call.choice, choice):
                break
            num_exact = end
        return num_exact

    def _num_read_together(self, choice: FfnChoice) -> int:
        """Count the tokens at the start that calls of two tokens or more have read with these FFN weights."""
        num_tokens = 0
        for call in self._calls:
            if call.num_read < 2 or not _same(call.choice, choice):
                break
            num_tokens = call.end
        return num_tokens


def _joining(start: int, num_tokens: int, block_tokens: int) -> int:
    """Go back by one token where the next would be read alone that is not alone if all are read."""
    _, end = next(blocks(start, num_tokens, block_tokens))
    return start - 1 if end - start == 1 and start % block_tokens else start


def blocks(start: int, end: int, block_tokens: int) -> Iterator[tuple[int, int]]:
    """Cut positions into the blocks that a prompt is read in; they end at multiples of `block_tokens`."""
    while start < end:
        stop = min(end, start - start % block_tokens + block_tokens)
        yield start, stop
        start = stop


def _same(a: FfnChoice | None, b: FfnChoice) -> bool:
    # A prompt's own neurons are chosen anew by the next one.
    return a is not None and a.neuron_ids is None and a.is_same(b)
