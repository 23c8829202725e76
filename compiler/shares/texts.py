"""Texts whose first halves the dense model has read, and whose second halves are read with fewer inputs."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.models.swapping import ffn_in_use
from coreinfer.compiler.prune.narrow import Cut
from coreinfer.compiler.text.corpus import Document, split_point
from transformers import DynamicCache

__all__ = ["BegunText", "begin_texts"]


@dataclass(frozen=True, kw_only=True)
class BegunText:
    """A text of which the first half is read.

    Attributes:
        token_ids: (1, tokens) of the second half.
        halves: keys and values of the first half, of each layer.
    """

    token_ids: torch.Tensor
    halves: Sequence[tuple[torch.Tensor, torch.Tensor]]

    def states(self, loaded: LoadedModel) -> torch.Tensor:
        """Read the second half: (tokens, size) what the head reads."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.halves):
            cache.update(keys, values, layer)
        return loaded.states(self.token_ids, cache)[0]


def begin_texts(loaded: LoadedModel, dense: Cut | None, documents: Sequence[Document]) -> list[BegunText]:
    """Read the first halves with the dense FFN, or with None as the model is; what else is in use is the caller's."""
    begun = []
    own = nullcontext() if dense is None else ffn_in_use(loaded, dense, 0)
    # Not in inference mode: gradients of second halves go through what attention looks at.
    with own, torch.no_grad():
        for document in documents:
            ids = torch.tensor([document.token_ids], device=loaded.device)
            start, cache = split_point(ids.shape[1]), DynamicCache()
            loaded.read(ids[:, :start], cache)
            halves = [(keys, values) for keys, values, *_ in cache]
            begun.append(BegunText(token_ids=ids[:, start:], halves=halves))
    return begun
