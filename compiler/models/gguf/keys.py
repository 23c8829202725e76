"""Keys of a GGUF header, read one by one and remembered, so that none that is set goes unread."""

from collections.abc import Collection, Mapping
from typing import Any

from coreinfer.bundles.errors import ConfigError, UnsupportedModelError

from .header import Header

__all__ = ["HeaderKeys"]


class HeaderKeys:
    """The keys under one architecture's prefix.

    Args:
        header: what the file states.
        architecture: prefix of the keys, such as "llama".
        name: name of the model in an error.
    """

    def __init__(self, header: Header, architecture: str, name: str) -> None:
        self._metadata = header.metadata
        self._prefix = f"{architecture}."
        self._name = name
        self._read: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether the file states a key."""
        return self._prefix + key in self._metadata

    def size(self, key: str) -> int:
        """Read a size, which has to be stated: none is ever assumed.

        Raises:
            ConfigError: the key is missing, no positive whole number, or another for each layer.
        """
        if not self.has(key):
            raise self.refused(key, "expected a size, got a header without that key; convert the model again")
        value = self._one(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refused(key, f"expected a positive whole number, got {value!r}")
        return value

    def number(self, key: str) -> float | None:
        """Read a number, None where it is not stated."""
        if not self.has(key):
            return None
        value = self._one(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
            raise self.refused(key, f"expected a number, got {value!r}")
        return float(value)

    def needed_number(self, key: str) -> float:
        """Read a number that has to be stated."""
        value = self.number(key)
        if value is None:
            raise self.refused(key, "expected a number, got a header without that key; convert the model again")
        return value

    def needed_flag(self, key: str) -> bool:
        """Read a flag that has to be stated."""
        value = self.value(key)
        if not isinstance(value, bool):
            got = "a header without that key; convert the model again" if value is None else repr(value)
            raise self.refused(key, f"expected a flag, got {got}")
        return value

    def value(self, key: str) -> Any:
        """Read a value as it stands, None where it is not stated."""
        self._read.add(self._prefix + key)
        return self._metadata.get(self._prefix + key)

    def expect(self, key: str, allowed: Collection[Any]) -> None:
        """Refuse a key that changes what a model computes, unless it says what is computed anyway."""
        if self.has(key) and self.value(key) not in allowed:
            raise self.unsupported(key)

    def check_all_read(self, neutral: Mapping[str, Collection[Any]]) -> None:
        """Refuse keys of the architecture that nothing has read: what they change would be lost silently.

        Args:
            neutral: key -> values with which it changes nothing.
        """
        unread = sorted(
            key
            for key, value in self._metadata.items()
            if key.startswith(self._prefix)
            and key not in self._read
            and value not in neutral.get(key.removeprefix(self._prefix), ())
        )
        if unread:
            stated = ", ".join(f"{key} = {_short(self._metadata[key])}" for key in unread)
            raise UnsupportedModelError(
                f"--model {self._name}: its header sets {stated}, which is not carried over; "
                "compile the model in safetensors that the file was made from"
            )

    def refused(self, key: str, what: str) -> ConfigError:
        """Say what is wrong with a key."""
        return ConfigError(f"--model {self._name}: {self._prefix}{key}: {what}")

    def unsupported(self, key: str) -> UnsupportedModelError:
        """Say that what a key asks for is not computed."""
        return UnsupportedModelError(
            f"--model {self._name}: {self._prefix}{key} = {_short(self.value(key))} is not supported; "
            "compile the model in safetensors that the file was made from"
        )

    def _one(self, key: str) -> Any:
        value = self.value(key)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise self.unsupported(key)
        return value[0]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
