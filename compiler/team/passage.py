"""The documents of one place on their way through the dense model; hidden states stay where they were computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from uuid import uuid4

from coreinfer.compiler.models.walking import LayerActivations, LayerWalk
from coreinfer.compiler.text.corpus import Document

from .team import Shared, Team, Worker

__all__ = ["WALK", "Passage", "begin_passages", "layer_of", "lengths_of", "without_text"]

WALK = "walk"
"""Slot of a worker's hidden states: those of one text at a time."""


@dataclass(frozen=True, kw_only=True)
class Passage:
    """Documents that go through the layers together.

    Attributes:
        key: no other passage of this compile has it.
        documents: token ids only.
        outputs: whether the FFN's outputs are wanted too.
    """

    key: str
    documents: Sequence[Document]
    outputs: bool


def begin_passages(
    team: Team, documents: Mapping[int, Sequence[Document]], *, outputs: bool = False
) -> dict[int, Shared[Passage]]:
    """Send each place its documents; the hidden states are made when the first layer is asked for."""
    return {
        place: team.share(Passage(key=uuid4().hex, documents=without_text(own), outputs=outputs))
        for place, own in documents.items()
    }


def lengths_of(documents: Sequence[Document]) -> list[int]:
    """Tokens of each document."""
    return [len(document.token_ids) for document in documents]


def without_text(documents: Sequence[Document]) -> list[Document]:
    """Documents as the model reads them: what they say need not be sent."""
    return [Document(text="", routing_text="", token_ids=document.token_ids) for document in documents]


def layer_of(worker: Worker, passage: Shared[Passage], layer: int) -> LayerActivations:
    """Go on to a layer, from where this worker is, or from the first if it is past it or has not begun."""
    own = passage.value()
    begin = partial(LayerWalk, worker.loaded, own.documents, outputs=own.outputs)
    walk = worker.recall(WALK, own.key, begin)
    if walk.layer > layer:
        worker.forget(WALK)
        walk = worker.recall(WALK, own.key, begin)
    return walk.to(layer)
