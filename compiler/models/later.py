"""Run the later tokens of a batch through a layer alone, with what its attention knows of the earlier ones.

A layer's attention looks at earlier tokens through their keys and values only. Where two runs have the same earlier
tokens, the second takes these from the first and computes nothing else of them.
"""

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Beginning", "GoOn", "KeepBeginning", "later_arguments"]

_KNOWN = frozenset({"attention_mask", "position_ids", "position_embeddings"})
"""Arguments of layers that have an entry for each token, as far as they are known."""


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What a layer's attention knows of a batch's first places.

    Attributes:
        keys, values: (batch, heads, places, head size).
    """

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def num_places(self) -> int:
        """How many places of each row these are."""
        return self.keys.shape[2]


class KeepBeginning:
    """Stands in for a layer's key-value cache, and keeps the first places' keys and values."""

    def __init__(self, num_places: int) -> None:
        self.num_places = num_places
        self.beginning: Beginning | None = None

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_args: Any, **_options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a layer's keys and values, and return what its attention looks at."""
        first = (keys[:, :, : self.num_places].clone(), values[:, :, : self.num_places].clone())
        self.beginning = Beginning(keys=first[0], values=first[1])
        return keys, values


class GoOn:
    """Stands in for a layer's key-value cache that holds a beginning."""

    def __init__(self, beginning: Beginning) -> None:
        self.beginning = beginning

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_args: Any, **_options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the later places' keys and values, and return those of all."""
        return torch.cat([self.beginning.keys, keys], dim=2), torch.cat([self.beginning.values, values], dim=2)


def later_arguments(arguments: dict[str, Any], start: int, length: int) -> dict[str, Any] | None:
    """What a layer is called with for the places from `start` to `length` alone.

    Returns:
        None where the layer takes tensors of which it is not known what they hold.
    """
    if any(name not in _KNOWN and _holds_tensors(value) for name, value in arguments.items()):
        return None
    later = dict(arguments)
    if (mask := arguments.get("attention_mask")) is not None:
        later["attention_mask"] = mask[..., start:, :]
    else:
        # Without a mask attention would take the first of the later places for the first of all.
        later["attention_mask"] = _causal_mask(arguments, start, length)
    if arguments.get("position_ids") is not None:
        later["position_ids"] = arguments["position_ids"][..., start:]
    if arguments.get("position_embeddings") is not None:
        later["position_embeddings"] = tuple(part[..., start:, :] for part in arguments["position_embeddings"])
    return later


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (
        isinstance(value, (tuple, list)) and any(isinstance(part, torch.Tensor) for part in value)
    )


def _causal_mask(arguments: dict[str, Any], start: int, length: int) -> torch.Tensor:
    """Which of all places each later one looks at: (1, 1, later places, length) bool."""
    parts = (*(arguments.get("position_embeddings") or ()), arguments.get("position_ids"))
    device = next((part.device for part in parts if part is not None), torch.device("cpu"))
    places = torch.arange(length, device=device)
    return (places[None, :] <= places[start:, None])[None, None]
