"""The hidden states of the dense model and of the narrow ones, on their way through the layers.

Each document's first half is read dense, its second half narrow, with the dense first half in its attention. A narrow
stream has hidden states of second halves only, and computes nothing else: what attention looks at of the first halves
are keys and values of the dense pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.compiler.models.later import Beginning, KeepBeginning
from coreinfer.compiler.models.layerwise import (
    Batch,
    document_starts,
    goes_on,
    pick,
    prepare_batches,
    run_layer,
    run_partly,
)
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.text.corpus import Document

from .dealt import LayerTokens
from .rows import Rows, narrow_tokens

__all__ = ["Part", "Reading", "Stream", "Text", "begin_stream", "begin_text", "move", "read_dense", "read_narrow"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A batch, and its tokens that are read narrow.

    Attributes:
        places: (batch, length) bool, where these are.
        rows: (tokens that are read narrow,) their places in the order of all documents.
        first_halves: (batch, length) bool, where the other tokens are.
        first_rows: (other tokens,) their places in the order of all documents.
    """

    batch: Batch
    places: torch.Tensor
    rows: torch.Tensor
    first_halves: torch.Tensor
    first_rows: torch.Tensor

    @property
    def first_place(self) -> int:
        """The first place of any row that is read narrow."""
        return int(self.places.any(dim=0).nonzero()[0])


@dataclass(frozen=True, kw_only=True)
class Text:
    """Documents in batches.

    Attributes:
        starts: where each document's tokens begin.
        parts: the batches.
    """

    starts: npt.NDArray[np.int64]
    parts: list[Part]

    def empty_tokens(self, loaded: LoadedModel, num_neurons: int) -> LayerTokens:
        """Room for one layer's activations, by far the most that is in memory; streams share it."""
        num_tokens, empty = int(self.starts[-1]), partial(torch.empty, dtype=loaded.keeps_in, device=loaded.device)
        return LayerTokens(
            activations=empty((num_tokens, num_neurons)),
            targets=empty((num_tokens, loaded.record.hidden_size)),
        )


@dataclass(kw_only=True)
class Stream:
    """One assignment's narrow model on its way through the layers.

    Attributes:
        name: of the assignment.
        rows: of each cluster's tokens.
        hidden: of each part, (its tokens that are read narrow, row); all others are the dense model's.
    """

    name: str
    rows: Rows
    hidden: list[torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a dense pass through a layer leaves of a batch.

    Attributes:
        entering: (batch, length - start, row) before the layer, of the places from `start` on.
        beginning: of the places before the first that is read narrow; None where the layer has to be run as a whole.
    """

    entering: torch.Tensor
    beginning: Beginning | None

    @property
    def start(self) -> int:
        """Where narrow runs begin."""
        return 0 if self.beginning is None else self.beginning.num_places


def begin_text(loaded: LoadedModel, documents: Sequence[Document]) -> Text:
    """Batch documents, whose hidden states are then those that enter the first layer."""
    starts = document_starts(documents)
    flags = torch.from_numpy(narrow_tokens(starts)).to(loaded.device)
    parts = [_part(batch, flags) for batch in prepare_batches(loaded, documents, starts)]
    return Text(starts=starts, parts=parts)


def _part(batch: Batch, is_narrow: torch.Tensor) -> Part:
    chosen = is_narrow[batch.rows]
    places = batch.mask.clone()
    places[batch.mask] = chosen
    return Part(
        batch=batch,
        places=places,
        rows=batch.rows[chosen],
        first_halves=batch.mask & ~places,
        first_rows=batch.rows[~chosen],
    )


def begin_stream(name: str, rows: Rows, text: Text) -> Stream:
    """Let an assignment's stream begin with the dense hidden states."""
    return Stream(name=name, rows=rows, hidden=[pick(part.batch.hidden, part.places) for part in text.parts])


def read_dense(
    loaded: LoadedModel,
    layer: int,
    part: Part,
    tokens: LayerTokens,
    neuron_ids: torch.Tensor | None = None,
    *,
    begins: bool,
) -> Reading:
    """Run a batch through the dense layer: its hidden states move on.

    Its tokens are the layer's, but for those that are read narrow: narrow streams set their own.

    Args:
        neuron_ids: of whom the activations are kept; None for all.
        begins: whether narrow runs may go on from this one.
    """
    batch, entering = part.batch, part.batch.hidden
    keep = KeepBeginning(part.first_place) if begins and goes_on(batch, layer) else None
    run = run_layer(loaded, layer, batch, entering, keep)
    activations = pick(run.activations, part.first_halves)
    if neuron_ids is not None:
        activations = activations.index_select(1, neuron_ids)
    _set_rows(tokens.activations, part.first_rows, activations)
    _set_rows(tokens.targets, part.first_rows, pick(run.ffn_output, part.first_halves))
    if not loaded.family.adds_ffn_output:
        _set_rows(tokens.targets, part.rows, pick(run.ffn_output, part.places))
    batch.hidden = run.output
    if keep is None or keep.beginning is None:
        return Reading(entering=entering, beginning=None)
    # A copy, so that the rest goes: of all batches it would be as much as the hidden states themselves.
    return Reading(entering=entering[:, keep.beginning.num_places :].clone(), beginning=keep.beginning)


def read_narrow(
    loaded: LoadedModel, layer: int, part: Part, reading: Reading, own: torch.Tensor, tokens: LayerTokens
) -> torch.Tensor:
    """Run a batch after a stream's narrowed layers: what is read narrow takes its place among the layer's tokens.

    Args:
        own: (tokens that are read narrow, row) of the stream.
    Returns:
        Their hidden states after the layer, without what its FFN adds where that is just added.
    """
    start = reading.start
    places = part.places[:, start:]
    hidden = _put(reading.entering, places, own)
    run = run_partly(loaded, layer, part.batch, hidden, places, _no_output(loaded, hidden), reading.beginning)
    without_ffn = pick(run.output, places)
    _set_rows(tokens.activations, part.rows, run.activations)
    if loaded.family.adds_ffn_output:
        target = pick(part.batch.hidden, part.places).float() - without_ffn.float()
        _set_rows(tokens.targets, part.rows, target)
    return without_ffn


def move(
    loaded: LoadedModel,
    layer: int,
    part: Part,
    reading: Reading,
    own: torch.Tensor,
    without_ffn: torch.Tensor,
    outputs: torch.Tensor,
) -> torch.Tensor:
    """A stream's hidden states after the narrow layer: (tokens that are read narrow, hidden size).

    Args:
        without_ffn: of `read_narrow`.
        outputs: (all tokens, hidden size), what the narrow FFN puts out; only what is read narrow is looked at.
    """
    narrow = outputs.index_select(0, part.rows).to(own.dtype)
    if loaded.family.adds_ffn_output:
        return (without_ffn.float() + narrow.float()).to(without_ffn.dtype)
    places = part.places[:, reading.start :]
    hidden = _put(reading.entering, places, own)
    ffn_output = _put(_no_output(loaded, hidden), places, narrow)
    nowhere = torch.zeros_like(places)
    run = run_partly(loaded, layer, part.batch, hidden, nowhere, ffn_output, reading.beginning)
    return pick(run.output, places)


def _no_output(loaded: LoadedModel, hidden: torch.Tensor) -> torch.Tensor:
    """An FFN's output of zeros: (batch, length, hidden size)."""
    return hidden.new_zeros((*hidden.shape[:2], loaded.record.hidden_size))


def _set_rows(values: torch.Tensor, rows: torch.Tensor, own: torch.Tensor) -> None:
    """Set some rows of (tokens, n) values: whole rows are copied, where indexing would go number by number."""
    values.index_copy_(0, rows, own.to(values.dtype))


def _put(values: torch.Tensor, places: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Copy (batch, length, n) values with others at some places."""
    result = values.contiguous().reshape(-1, values.shape[-1]).clone()
    result.index_copy_(0, places.reshape(-1).nonzero()[:, 0], own)
    return result.reshape(values.shape)
