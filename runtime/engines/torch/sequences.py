"""The KV caches of the torch engine: one for each sequence, and which tokens they hold."""

from collections.abc import Mapping
from typing import Any

import torch
from coreinfer.bundles import ConfigError
from coreinfer.runtime.engines.cached import CachedTokens
from coreinfer.runtime.engines.kv_limits import pages_of
from transformers import DynamicCache

from .static_step import StaticStep

__all__ = ["TorchSequences"]


class TorchSequences:
    """Sequence 0, there from the start and in the static cache where there is one, and those that were added."""

    def __init__(self, static: StaticStep | None) -> None:
        """Begin with sequence 0, empty and selected."""
        # Without a config every layer of a cache keeps all tokens; sliding windows are left to the mask.
        self._caches = {0: DynamicCache()}
        self._records = {0: CachedTokens()}
        self._static = static
        self.selected = 0

    @property
    def static(self) -> StaticStep | None:
        """The steps of fixed shape, where the selected sequence is decoded by them."""
        return self._static if self.selected == 0 else None

    @property
    def cache(self) -> DynamicCache:
        """The selected sequence's cache; without use where `static` is one."""
        return self._caches[self.selected]

    @property
    def record(self) -> CachedTokens:
        """Which tokens are in the selected sequence's cache."""
        return self._records[self.selected]

    @property
    def num_cached(self) -> int:
        """Tokens in the selected sequence's cache."""
        return self._length(self.selected)

    @property
    def num_elsewhere(self) -> int:
        """Tokens that the other sequences' caches have room for."""
        others = sum(self._length(number) for number in self._caches if number not in (0, self.selected))
        if self.selected == 0:
            return others
        return others + (self._static.capacity if self._static is not None else self._length(0))

    @property
    def num_pages(self) -> int:
        """Pages that all sequences would have together; the caches have none, but what they hold is counted in them."""
        return sum(pages_of(self._length(number)) for number in self._caches)

    def pages_to_extend(self, num_tokens: Mapping[int, int]) -> int:
        """Number of pages that sequences would grow by, with some more tokens each."""
        return sum(
            pages_of(self._length(number) + count) - pages_of(self._length(number))
            for number, count in num_tokens.items()
        )

    def truncate(self, num_tokens: int) -> None:
        """Keep only the first tokens of the selected sequence. The caller is in inference mode."""
        self.record.truncate(num_tokens)
        if self.static is not None:
            self.static.truncate(num_tokens)
        elif num_tokens == 0:
            self._caches[self.selected] = DynamicCache()
        elif num_tokens < self.num_cached:
            self.cache.crop(num_tokens - self.num_cached)

    def add(self) -> int:
        """Begin another sequence; returns its number."""
        return self._add(DynamicCache(), CachedTokens())

    def fork(self, source: int, num_tokens: int) -> int:
        """Begin another sequence with a copy of the first tokens of an existing one; returns its number.

        The caller is in inference mode, and has checked both.
        """
        cache = DynamicCache()
        static = self._static if source == 0 else None
        if num_tokens:
            for layer, (keys, values) in enumerate(static.kept if static else _kept(self._caches[source])):
                cache.update(keys[:, :, :num_tokens].clone(), values[:, :, :num_tokens].clone(), layer)
        return self._add(cache, self._records[source].fork(num_tokens))

    def _add(self, cache: DynamicCache, record: CachedTokens) -> int:
        number = max(self._caches) + 1
        self._caches[number], self._records[number] = cache, record
        return number

    def length(self, number: int) -> int:
        """Count the tokens of a sequence.

        Raises:
            ConfigError: there is no such sequence.
        """
        self._check(number)
        return self._length(number)

    def drop(self, number: int) -> None:
        """Give a sequence's memory back; see `Decoder.drop_sequence`."""
        if number == 0 or number not in self._caches:
            raise ConfigError(f"sequence: expected one that was added, other than 0, got {number}")
        del self._caches[number], self._records[number]
        if number == self.selected:
            self.selected = 0

    def select(self, number: int) -> None:
        """Choose the sequence to work on.

        Raises:
            ConfigError: there is no such sequence.
        """
        self._check(number)
        self.selected = number

    def _check(self, number: int) -> None:
        if number not in self._caches:
            raise ConfigError(f"sequence: expected one that was added, got {number}")

    def _length(self, number: int) -> int:
        if number == 0 and self._static is not None:
            return self._static.num_cached
        return int(self._caches[number].get_seq_length())


def _kept(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer, (1, heads, tokens, head_dim)."""
    layers: list[Any] = list(cache.layers)
    return [(layer.keys, layer.values) for layer in layers]
