"""What the experts of one layer do with a text, at one place: it goes through the dense model layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from coreinfer.compiler.models.layerwise import Batch, document_starts, layer_output, prepare_batches
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.team.passage import WALK, Passage
from coreinfer.compiler.team.team import Shared, Worker
from coreinfer.compiler.text.corpus import Document
from coreinfer.runtime.engines.torch.mixture import ExpertRun

__all__ = ["ExpertTokens", "expert_tokens"]


@dataclass(frozen=True, kw_only=True)
class ExpertTokens:
    """The tokens that chose one expert.

    Attributes:
        rows: (chosen,) places among the tokens of all documents, one after another.
        weights: (chosen,) float32, what the router multiplies the expert's outputs by.
        weighted: (chosen, neurons), input of the down projection times these weights.
    """

    rows: torch.Tensor
    weights: torch.Tensor
    weighted: torch.Tensor


class _ExpertWalk:
    """Documents before a layer, which move on layer by layer; what experts did is there for the last layer alone."""

    def __init__(self, loaded: LoadedModel, documents: Sequence[Document]) -> None:
        self._loaded = loaded
        self._seen: dict[int, list[ExpertTokens]] = {}
        self._batches = prepare_batches(loaded, documents, document_starts(documents))
        self.layer = -1

    def to(self, layer: int) -> None:
        """Go on to a layer, which must not lie behind."""
        assert layer >= self.layer
        while self.layer < layer:
            self.layer += 1
            self._seen = {}
            for batch in self._batches:
                self._run(batch, keeps=self.layer == layer)

    def _run(self, batch: Batch, *, keeps: bool) -> None:
        mixture = self._loaded.mixture(self.layer)
        numbers = batch.rows.new_zeros(batch.mask.numel())
        numbers[batch.mask.reshape(-1)] = batch.rows
        mixture.watch = partial(self._keep, batch.mask.reshape(-1), numbers) if keeps else None
        try:
            batch.hidden = layer_output(self._loaded, self.layer, batch, batch.hidden)
        finally:
            mixture.watch = None

    def _keep(self, is_real: torch.Tensor, numbers: torch.Tensor, run: ExpertRun) -> None:
        real = is_real[run.rows]
        weights = run.weights[real]
        tokens = ExpertTokens(
            rows=numbers[run.rows[real]],
            weights=weights.float(),
            weighted=run.activations[real] * weights[:, None],
        )
        self._seen.setdefault(run.expert, []).append(tokens)

    def tokens(self, expert: int) -> ExpertTokens:
        """An expert's; none where nothing chose it."""
        seen, device = self._seen.get(expert, []), self._loaded.device
        none = ExpertTokens(
            rows=torch.zeros(0, dtype=torch.long, device=device),
            weights=torch.zeros(0, device=device),
            weighted=torch.zeros((0, self._loaded.record.expert_neurons), device=device, dtype=self._loaded.dtype),
        )
        return ExpertTokens(
            rows=torch.cat([none.rows, *(part.rows for part in seen)]),
            weights=torch.cat([none.weights, *(part.weights for part in seen)]),
            weighted=torch.cat([none.weighted, *(part.weighted for part in seen)]),
        )


def expert_tokens(worker: Worker, shared: Shared[Passage], layer: int, expert: int) -> ExpertTokens:
    """Go on to a layer, from where this worker is, and look at one expert's tokens; see `layer_of`."""
    passage = shared.value()
    begin = partial(_ExpertWalk, worker.loaded, passage.documents)
    walk = worker.recall(WALK, passage.key, begin)
    if walk.layer > layer:
        worker.forget(WALK)
        walk = worker.recall(WALK, passage.key, begin)
    walk.to(layer)
    return walk.tokens(expert)
