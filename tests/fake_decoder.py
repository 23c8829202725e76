"""A decoder without a model: what it says depends on every token and on the weights that each went through."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from coreinfer.bundles import Bundle
from coreinfer.runtime.engines.cached import CachedTokens
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice, KvPoolFull

PAGE_TOKENS = 8
PASS_SECONDS, TOKEN_SECONDS = 1.0, 0.01


class FakeDecoder:
    """Counts pages and time as a real one takes them.

    Attributes:
        seconds: what all calls together have taken.
        calls: each as ("read", tokens) or ("rows", rows).
    """

    name = "fake"
    block_tokens = 64
    page_tokens = PAGE_TOKENS
    calls_alike = True
    cheap_swaps = True
    token_shares_pay = True
    gathers = True
    disk_reads = None

    def __init__(self, bundle: Bundle, *, num_pages: int = 10_000) -> None:
        self.num_pages = num_pages
        self.seconds = 0.0
        self.calls: list[tuple[str, int]] = []
        self.sequence = 0
        self._model = bundle.manifest.model
        self._choice = DENSE
        self._states: dict[int, list[int]] = {0: []}
        self._records = {0: CachedTokens()}

    @property
    def num_cached(self) -> int:
        return len(self._states[self.sequence])

    @property
    def cached(self) -> CachedTokens:
        return self._records[self.sequence]

    @property
    def num_free_pages(self) -> int:
        return self.num_pages - sum(pages_of(len(states)) for states in self._states.values())

    def add_sequence(self) -> int:
        number = next(number for number in range(1, 10_000) if number not in self._states)
        self._states[number], self._records[number] = [], CachedTokens()
        return number

    def fork_sequence(self, source: int, num_tokens: int) -> int:
        self._need(pages_of(num_tokens))
        number = self.add_sequence()
        self._states[number] = self._states[source][:num_tokens]
        self._records[number] = self._records[source].fork(num_tokens)
        return number

    def drop_sequence(self, sequence: int) -> None:
        assert sequence != 0
        del self._states[sequence], self._records[sequence]
        self.sequence = 0 if self.sequence == sequence else self.sequence

    def select(self, sequence: int) -> None:
        assert sequence in self._states
        self.sequence = sequence

    @property
    def skips_neurons(self) -> bool:
        return False

    def weight_bytes(self, *, greedy: bool, alone: bool) -> int | None:
        return round(1000 * (self._choice.token_share if alone else 1))

    def prepare(self, choice: FfnChoice) -> None:
        """Nothing is to be brought."""

    def use(self, choice: FfnChoice) -> None:
        self._choice = choice

    def truncate(self, num_tokens: int) -> None:
        del self._states[self.sequence][num_tokens:]
        self.cached.truncate(num_tokens)

    def forward(self, token_ids: Sequence[int], *, all_logits: bool = False, greedy: bool = False) -> Any:
        self.calls.append(("read", len(token_ids)))
        self.seconds += PASS_SECONDS + TOKEN_SECONDS * (len(token_ids) - 1)
        self._need(self._num_more(self.sequence, len(token_ids)))
        logits = [self._append(self.sequence, token_id) for token_id in token_ids]
        self.cached.append(token_ids, self._choice)
        return np.stack(logits if all_logits else logits[-1:])

    def forward_rows(self, sequences: Sequence[int], token_ids: Sequence[int], *, greedy: bool = False) -> Any:
        self.calls.append(("rows", len(token_ids)))
        self.seconds += PASS_SECONDS
        self._need(sum(self._num_more(number, sequences.count(number)) for number in set(sequences)))
        rows = zip(sequences, token_ids, strict=True)
        logits = np.stack([self._append(number, token_id) for number, token_id in rows])
        for number, token_id in zip(sequences, token_ids, strict=True):
            self._records[number].append([token_id], self._choice)
        return logits

    def forward_beside(
        self,
        block_ids: Sequence[int],
        sequences: Sequence[int],
        token_ids: Sequence[int],
        *,
        last_logits: bool,
        greedy: bool = False,
    ) -> Any:
        assert len(block_ids) > 1
        self._need(
            self._num_more(self.sequence, len(block_ids))
            + sum(self._num_more(number, sequences.count(number)) for number in set(sequences))
        )
        block = self.forward(block_ids)
        # One pass reads the weights for all.
        self.seconds -= PASS_SECONDS
        rows = self.forward_rows(sequences, token_ids)
        return np.concatenate([block, rows]) if last_logits else rows

    def prompt_statistics(self, token_ids: Sequence[int], selections: Sequence[Any]) -> Any:
        statistic = np.random.default_rng(sum(token_ids)).random((self._model.num_layers, self._model.ffn_dim))
        return self.forward(token_ids), dict.fromkeys(selections, statistic.astype(np.float32))

    def _append(self, number: int, token_id: int) -> npt.NDArray[np.float32]:
        states, choice = self._states[number], self._choice
        cluster = -1 if choice.cluster is None else choice.cluster
        weights = int(sum(ids.sum() for ids in choice.neuron_ids)) if choice.neuron_ids else cluster
        if choice.token_share < 1:
            weights += int(1_000_000 * choice.token_share)
        states.append(hash((states[-1] if states else 0, token_id, weights)) % 1_000_003)
        return np.random.default_rng(states[-1]).random(self._model.vocab_size, dtype=np.float32) * 4

    def _num_more(self, number: int, count: int) -> int:
        length = len(self._states[number])
        return pages_of(length + count) - pages_of(length)

    def _need(self, num_pages: int) -> None:
        if num_pages > self.num_free_pages:
            raise KvPoolFull(f"expected {num_pages} free pages, got {self.num_free_pages}")


def pages_of(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_TOKENS)
