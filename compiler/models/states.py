"""What a token takes from layer to layer, as one row of numbers, where layers pass more than a hidden state.

Gemma 3n has several streams side by side, and its last layers attend to keys and values of earlier ones. All of that
belongs to the token: as one row it can be picked, put in its place, and differentiated as a hidden state is.
"""

from collections.abc import Mapping
from typing import Any

import torch
from coreinfer.bundles.families import Family

__all__ = ["SHARED", "StateForm", "state_form"]

SHARED = "shared_kv_states"
"""Argument of layers: what they leave for others, and others read, is written into it."""


class StateForm:
    """How rows are put together and taken apart; of most families a row is the hidden state."""

    def pack(self, hidden: torch.Tensor, _shared: Mapping[str, Any] | None = None) -> torch.Tensor:
        """What leaves a layer -> (batch, length, row)."""
        return hidden

    def unpack(self, rows: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """(batch, length, row) -> what enters a layer, and its arguments for shared keys and values."""
        return rows, {}

    def energies(self, rows: torch.Tensor) -> torch.Tensor:
        """Squared norms of hidden states, in float32: (tokens, row) -> (tokens,)."""
        return rows.float().square().sum(dim=-1)


class StreamsForm(StateForm):
    """Rows of streams, then for each kind of layer keys and values of its last layer that has any of its own."""

    def __init__(self, config: Any) -> None:
        self._num_streams, self._size = int(config.altup_num_inputs), int(config.hidden_size)
        self._active = int(config.altup_active_idx)
        self._heads, self._head_dim = int(config.num_key_value_heads), int(config.head_dim)
        self._kinds = sorted(set(config.layer_types)) if config.num_kv_shared_layers else []

    def pack(self, hidden: torch.Tensor, shared: Mapping[str, Any] | None = None) -> torch.Tensor:
        """Put (streams, batch, length, size) and (batch, heads, length, head size) of each kind together."""
        parts = list(hidden)
        for kind in self._kinds:
            if shared is None or kind not in shared:
                width = 2 * self._heads * self._head_dim
                parts.append(hidden.new_zeros((*hidden.shape[1:3], width)))
                continue
            parts += [values.transpose(1, 2).flatten(2) for values in shared[kind]]
        return torch.cat(parts, dim=-1)

    def unpack(self, rows: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """See `StateForm.unpack`."""
        width = self._heads * self._head_dim
        sizes = [self._size] * self._num_streams + [width] * (2 * len(self._kinds))
        parts = rows.split(sizes, dim=-1)
        heads = [part.unflatten(-1, (self._heads, -1)).transpose(1, 2) for part in parts[self._num_streams :]]
        shared = {kind: (heads[2 * place], heads[2 * place + 1]) for place, kind in enumerate(self._kinds)}
        return torch.stack(parts[: self._num_streams]), {SHARED: shared}

    def energies(self, rows: torch.Tensor) -> torch.Tensor:
        """Of the stream that layers compute with."""
        return super().energies(rows[..., self._active * self._size : (self._active + 1) * self._size])


def state_form(family: Family, config: Any) -> StateForm:
    """The form of a model's rows."""
    return StreamsForm(config) if family.has_streams else StateForm()
