"""Texts that are read together: a batch costs one read of the weights, and its products are large enough to be fast."""

import inspect
from collections.abc import Collection, Iterator, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.samples import batch_tokens
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

__all__ = ["Batches", "batch_texts", "dense_logits", "narrow_logits", "parts_of"]

Batches = Sequence[tuple[int, ...]]
"""Numbers of the texts that are read together."""
Halves = Sequence[torch.Tensor]
"""Of each layer keys and then values, (1, heads, tokens, head size) both."""
_MOST_PADDED, _SMALL_BATCH_TOKENS = 1.1, 128
"""Padded tokens of a batch, for each token of its texts; of a small batch any."""


def batch_texts(lengths: Sequence[int], labels: npt.NDArray[np.int64] | None, vocab_size: int) -> list[tuple[int, ...]]:
    """Put texts of a cluster and of like length together, in batches that do not depend on who reads them.

    Args:
        lengths: tokens of each text.
        labels: (texts,) clusters, or None.
        vocab_size: bounds a batch, whose logits are in memory.
    """
    most = batch_tokens(vocab_size)
    own = [0] * len(lengths) if labels is None else labels.tolist()
    batches, batch, num_tokens = [], list[int](), 0
    for number in sorted(range(len(lengths)), key=lambda number: (own[number], lengths[number], number)):
        # The longest comes last.
        padded, num_tokens = (len(batch) + 1) * lengths[number], num_tokens + lengths[number]
        is_wasteful = padded > max(_MOST_PADDED * num_tokens, _SMALL_BATCH_TOKENS)
        if batch and (own[batch[0]] != own[number] or padded > most or is_wasteful):
            batches.append(tuple(batch))
            batch, num_tokens = [], lengths[number]
        batch.append(number)
    return [*batches, tuple(batch)] if batch else batches


def parts_of(batches: Batches, numbers: Collection[int]) -> Iterator[tuple[int, ...]]:
    """Of each batch the texts that are among some."""
    for batch in batches:
        if part := tuple(number for number in batch if number in numbers):
            yield part


def dense_logits(
    loaded: LoadedModel, texts: Sequence[Sequence[int]], starts: Sequence[int]
) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Read whole texts: of each, logits of its second half but for the last token, and what the cache has of its first.

    Args:
        starts: where each second half begins.
    Returns:
        (tokens - start - 1, vocabulary), and as `Halves` with `start` tokens.
    """
    ids, cache = _padded(texts).to(loaded.device), DynamicCache()
    # Padding comes after a text, where causal attention does not look.
    logits = _logits(
        loaded, loaded.states(ids, cache), [(start, len(text) - 1) for text, start in zip(texts, starts, strict=True)]
    )
    # Copies: a view of the first half would hold on to the whole.
    halves = [
        [half[row : row + 1, :, :start].clone() for keys, values, *_ in cache for half in (keys, values)]
        for row, start in enumerate(starts)
    ]
    return list(zip(logits, halves, strict=True))


def narrow_logits(loaded: LoadedModel, texts: Sequence[Sequence[int]], halves: Sequence[Halves]) -> list[torch.Tensor]:
    """Read second halves after keys and values of first ones: (tokens - 1, vocabulary) of each.

    Args:
        texts: token ids of the second halves.
    """
    ids, starts = _padded(texts).to(loaded.device), [half[0].shape[2] for half in halves]
    states = loaded.states(ids, _joined(halves, loaded.device), arguments=_places(loaded, starts, ids.shape[1]))
    return _logits(loaded, states, [(0, len(text) - 1) for text in texts])


def _padded(texts: Sequence[Sequence[int]]) -> torch.Tensor:
    return pad_sequence([torch.tensor(text, dtype=torch.long) for text in texts], batch_first=True)


def _logits(loaded: LoadedModel, states: torch.Tensor, ranges: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Logits of some places of each row; the head sees no padding."""
    wanted = [states[row, start:end] for row, (start, end) in enumerate(ranges)]
    return list(loaded.head(torch.cat(wanted)).split([len(own) for own in wanted]))


def _joined(halves: Sequence[Halves], device: torch.device) -> DynamicCache:
    """One cache of all texts, which end at the same place: windows of attention count places, not positions."""
    longest, cache = max(half[0].shape[2] for half in halves), DynamicCache()
    for layer in range(len(halves[0]) // 2):
        keys, values = (
            torch.cat([_filled_up(half[2 * layer + kind].to(device), longest) for half in halves]) for kind in (0, 1)
        )
        cache.update(keys, values, layer)
    return cache


def _filled_up(half: torch.Tensor, length: int) -> torch.Tensor:
    return nn.functional.pad(half, (0, 0, length - half.shape[2], 0))


def _places(loaded: LoadedModel, starts: Sequence[int], num_tokens: int) -> dict[str, Any]:
    """What tells a model which places of a cache are filled, and at which positions its tokens are."""
    longest = max(starts)
    if min(starts) == longest:
        return {}
    first = torch.tensor([[start] for start in starts], device=loaded.device)
    places = torch.arange(longest + num_tokens, device=loaded.device)
    arguments = {"attention_mask": (places >= longest - first).long()}
    body = cast("nn.Module", loaded.model.base_model)
    # The others count the places of the mask.
    if "position_ids" in inspect.signature(type(body).forward).parameters:
        arguments["position_ids"] = first + torch.arange(num_tokens, device=loaded.device)
    return arguments
