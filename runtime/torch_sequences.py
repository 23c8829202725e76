"""The KV caches of the torch engine: one for each sequence, and which tokens they hold."""

from coreinfer.bundles import ConfigError
from transformers import DynamicCache

from .cached import CachedTokens
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
        """Begin another sequence; gives its number."""
        number = max(self._caches) + 1
        self._caches[number], self._records[number] = DynamicCache(), CachedTokens()
        return number

    def drop(self, number: int) -> None:
        """Give a sequence's memory back; see `Decoder.drop_sequence`."""
        if number == 0 or number not in self._caches:
            raise ConfigError(f"sequence: expected one that was added, other than 0, got {number}")
        del self._caches[number], self._records[number]
        if number == self.selected:
            self.selected = 0

    def select(self, number: int) -> None:
        """Choose the sequence to go on with.

        Raises:
            ConfigError: there is no such sequence.
        """
        if number not in self._caches:
            raise ConfigError(f"sequence: expected one that was added, got {number}")
        self.selected = number

    def _length(self, number: int) -> int:
        if number == 0 and self._static is not None:
            return self._static.num_cached
        return int(self._caches[number].get_seq_length())
