"""What a decoder's KV cache holds, and how much of it another prompt may take over."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .decoder import FfnChoice

__all__ = ["CachedTokens", "blocks"]


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One call of `Decoder.forward`: the positions that it computed, and with which FFN weights; None where unknown."""

    start: int
    end: int
    choice: FfnChoice | None


class CachedTokens:
    """The tokens in a KV cache, and the calls that put them there.

    The decoder itself keeps this record, so that it is right whoever uses the decoder.
    """

    def __init__(self) -> None:
        """Begin with an empty cache."""
        self.token_ids: list[int] = []
        self._calls: list[_Call] = []

    def append(self, token_ids: Sequence[int], choice: FfnChoice | None) -> None:
        """Note a call that succeeded."""
        start = len(self.token_ids)
        self.token_ids.extend(token_ids)
        self._calls.append(_Call(start=start, end=len(self.token_ids), choice=choice))

    def truncate(self, num_tokens: int) -> None:
        """Forget the tokens behind the first `num_tokens`."""
        del self.token_ids[num_tokens:]
        while self._calls and self._calls[-1].start >= num_tokens:
            self._calls.pop()
        if self._calls and self._calls[-1].end > num_tokens:
            # What is left of a call was computed by a longer one: like no call that could be made for it.
            self._calls[-1] = _Call(start=self._calls[-1].start, end=num_tokens, choice=None)

    def num_common(self, prompt_ids: Sequence[int]) -> int:
        """Count the tokens that a prompt shares with the cache from the start on, its last one left to be read."""
        room = min(len(self.token_ids), len(prompt_ids) - 1)
        return next((i for i in range(room) if self.token_ids[i] != prompt_ids[i]), max(room, 0))

    def num_exact(self, prompt_ids: Sequence[int], choice: FfnChoice, block_tokens: int) -> int:
        """Count the tokens at the start of a prompt that reading it would put into the cache once more, bit for bit.

        Rounding depends on how many tokens a call reads. So only what the very same calls have read counts: whole
        blocks, by the same FFN weights.
        """
        num_common = self.num_common(prompt_ids)
        num_exact = 0
        for call, (start, end) in zip(self._calls, blocks(0, len(prompt_ids), block_tokens), strict=False):
            if end > num_common or (call.start, call.end) != (start, end) or not _same(call.choice, choice):
                break
            num_exact = end
        return num_exact


def blocks(start: int, end: int, block_tokens: int) -> Iterator[tuple[int, int]]:
    """Cut positions into the blocks that a prompt is read in; they end at multiples of `block_tokens`."""
    while start < end:
        stop = min(end, start - start % block_tokens + block_tokens)
        yield start, stop
        start = stop


def _same(a: FfnChoice | None, b: FfnChoice) -> bool:
    # Neuron ids are arrays, which do not compare as one; they belong to one prompt anyhow.
    return a is not None and a.neuron_ids is None and b.neuron_ids is None and a.cluster == b.cluster
