"""Calibration and validation text, dealt to the places of a team: each sees its own documents' tokens only."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.compiler.models.layerwise import document_starts
from coreinfer.compiler.team.dealing import deal
from coreinfer.compiler.team.passage import Passage, begin_passages, layer_of, lengths_of
from coreinfer.compiler.team.team import Shared, Team, Worker
from coreinfer.compiler.text.corpus import Document, split_point

from .narrow import Assignment
from .rows import Labels, Rows, rows_of

__all__ = [
    "DealtText",
    "Find",
    "LayerTokens",
    "PlaceText",
    "Seen",
    "TokenCounts",
    "deal_text",
    "find_dense",
    "own_rows",
]

Ids = npt.NDArray[np.int64]
TokenCounts = Sequence[Mapping[int, int]]
"""Of each cluster: place -> tokens there; without places that have none."""


@dataclass(frozen=True, kw_only=True)
class LayerTokens:
    """What one layer's FFN sees and should put out, token by token.

    Attributes:
        activations: (tokens, ffn_dim), input of the down projection.
        targets: (tokens, hidden size), the wanted output of the down projection, bias included.
    """

    activations: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a worker has of one layer for one assignment: tokens, and which of them belong to which cluster."""

    tokens: LayerTokens
    rows: Rows


Find = Callable[[Worker], Seen]
"""Finds, where it runs, what a repair reads of that place's text."""


@dataclass(frozen=True, kw_only=True)
class PlaceText:
    """One place's text.

    Attributes:
        passage: calibration documents first.
        labels: assignment name -> clusters of these documents.
    """

    passage: Shared[Passage]
    labels: Mapping[str, Labels]


@dataclass(frozen=True, kw_only=True)
class DealtText:
    """All places' text.

    Attributes:
        texts: place -> its text, as it is sent there.
        passages: place -> its documents, as they are sent there.
        calibration: place -> indices of its calibration documents.
        calibration_tokens: assignment name -> its clusters' tokens.
        validation_tokens: assignment name -> its clusters' tokens that are read narrow.
    """

    texts: Mapping[int, Shared[PlaceText]]
    passages: Mapping[int, Shared[Passage]]
    calibration: Mapping[int, Ids]
    calibration_tokens: Mapping[str, TokenCounts]
    validation_tokens: Mapping[str, TokenCounts]


def deal_text(
    team: Team, calibration: Sequence[Document], validation: Sequence[Document], assignments: Sequence[Assignment]
) -> DealtText:
    """Deal both parts of the text, each by the clusters of the first assignment."""
    by, nothing = assignments[0], np.zeros(0, dtype=np.int64)
    first, second = (
        deal(lengths_of(calibration), team, by.calibration),
        deal(lengths_of(validation), team, by.validation),
    )
    own = {place: (first.get(place, nothing), second.get(place, nothing)) for place in sorted({*first, *second})}
    documents = {
        place: [*(calibration[i] for i in ids), *(validation[i] for i in further)]
        for place, (ids, further) in own.items()
    }
    passages = begin_passages(team, documents, outputs=True)
    labels = {place: {item.name: _labels(item, *ids) for item in assignments} for place, ids in own.items()}
    lengths = np.array([len(document.token_ids) for document in calibration], dtype=np.int64)
    narrow = np.array([_num_narrow(document) for document in validation], dtype=np.int64)
    return DealtText(
        texts={place: team.share(PlaceText(passage=passages[place], labels=labels[place])) for place in own},
        passages=passages,
        calibration=first,
        calibration_tokens={
            item.name: _count(item.calibration, lengths, first, item.num_clusters) for item in assignments
        },
        validation_tokens={
            item.name: _count(item.validation, narrow, second, item.num_clusters) for item in assignments
        },
    )


def _labels(item: Assignment, calibration: Ids, validation: Ids) -> Labels:
    return Labels(
        calibration=item.calibration[calibration],
        validation=item.validation[validation],
        num_clusters=item.num_clusters,
    )


def _num_narrow(document: Document) -> int:
    return len(document.token_ids) - split_point(len(document.token_ids))


def _count(labels: Ids, num_tokens: Ids, dealt: Mapping[int, Ids], num_clusters: int) -> TokenCounts:
    counts: list[dict[int, int]] = [{} for _ in range(num_clusters)]
    for place, ids in dealt.items():
        totals = np.bincount(labels[ids], weights=num_tokens[ids], minlength=num_clusters)
        for cluster in np.flatnonzero(totals).tolist():
            counts[cluster][place] = int(totals[cluster])
    return counts


def find_dense(worker: Worker, text: Shared[PlaceText], name: str, layer: int) -> Seen:
    """What an assignment's repair reads of a layer of the dense model."""
    own = text.value()
    run = layer_of(worker, own.passage, layer)
    assert run.ffn_outputs is not None
    tokens = LayerTokens(activations=run.activations, targets=run.ffn_outputs)
    return Seen(tokens=tokens, rows=own_rows(worker, own, name))


def own_rows(worker: Worker, text: PlaceText, name: str) -> Rows:
    """Rows of an assignment's clusters among a place's tokens, which are the same in all layers."""
    passage = text.passage.value()
    make = partial(rows_of, text.labels[name], document_starts(passage.documents), worker.loaded.device)
    return worker.recall(f"rows of {name}", passage.key, make)
