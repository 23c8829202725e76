"""A place's documents before a layer of a mixture of experts, batch by batch: whoever looks at a layer runs it."""

from collections.abc import Sequence
from functools import partial

from coreinfer.compiler.models.layerwise import document_starts, layer_output, prepare_batches
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.team.passage import WALK
from coreinfer.compiler.team.team import Worker
from coreinfer.compiler.text.corpus import Document

__all__ = ["TextWalk", "walk_of"]


class TextWalk:
    """Documents before a layer.

    Attributes:
        layer: that was not run yet.
        starts: where each document's tokens begin.
        batches: with the hidden states that enter the layer; what runs it puts those that leave it there.
    """

    def __init__(self, loaded: LoadedModel, documents: Sequence[Document]) -> None:
        self._loaded = loaded
        self.layer, self.starts = 0, document_starts(documents)
        self.batches = prepare_batches(loaded, documents, self.starts)

    def pass_on(self) -> None:
        """Run the layer, and look at nothing."""
        for batch in self.batches:
            batch.hidden = layer_output(self._loaded, self.layer, batch, batch.hidden)
        self.layer += 1


def walk_of(worker: Worker, key: str, documents: Sequence[Document], layer: int) -> TextWalk:
    """Find a text's walk, at most at a layer: where this worker is, or at the first if it is past that layer.

    Args:
        key: no other text of this compile has it.
    """
    begin = partial(TextWalk, worker.loaded, documents)
    walk = worker.recall(WALK, key, begin)
    if walk.layer > layer:
        worker.forget(WALK)
        walk = worker.recall(WALK, key, begin)
    return walk
