"""Documents on their way through a model's layers: what each layer's FFN did with all of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.compiler.progress import Advance
from coreinfer.compiler.text.corpus import Document

from .layerwise import document_starts, prepare_batches, run_layer
from .load import LoadedModel

__all__ = ["LayerActivations", "LayerWalk", "walk_layers"]


@dataclass(frozen=True, kw_only=True)
class LayerActivations:
    """What one layer's FFN did on all documents.

    Attributes:
        layer: its number.
        activations: (tokens, ffn_dim), input of the down projection, documents one after another.
        ffn_outputs: (tokens, hidden size), output of the down projection; None unless asked for.
        starts: (documents + 1,) where each document's tokens begin; the last entry is the number of tokens.
        stream_energies: (tokens,) float32, squared norm of the hidden state that leaves the layer.
    """

    layer: int
    activations: torch.Tensor
    ffn_outputs: torch.Tensor | None
    starts: npt.NDArray[np.int64]
    stream_energies: torch.Tensor

    def document(self, index: int) -> torch.Tensor:
        """Activations of one document: (tokens, ffn_dim)."""
        return self.activations[self.starts[index] : self.starts[index + 1]]


class LayerWalk:
    """Documents before a layer, which move on layer by layer; layers share the memory of their activations."""

    def __init__(self, loaded: LoadedModel, documents: Sequence[Document], *, outputs: bool = False) -> None:
        """Begin before the first layer.

        Args:
            documents: token ids of each are run as one sequence.
            outputs: whether the FFN's outputs are wanted too.
        """
        self._loaded, self._outputs = loaded, outputs
        self._starts = document_starts(documents)
        with torch.inference_mode():
            self._batches = prepare_batches(loaded, documents, self._starts)
            num_tokens, width = int(self._starts[-1]), loaded.record.hidden_size if outputs else 0
            empty = partial(torch.empty, device=loaded.device)
            self._activations = empty((num_tokens, loaded.record.ffn_dim), dtype=loaded.keeps_in)
            self._ffn_outputs = empty((num_tokens, width), dtype=loaded.keeps_in)
            self._stream_energies = empty(num_tokens, dtype=torch.float32)
        self.layer = -1

    def to(self, layer: int) -> LayerActivations:
        """Go on to a layer, which must not lie behind; what was returned of the one before is overwritten."""
        assert layer >= self.layer
        with torch.inference_mode():
            while self.layer < layer:
                self.layer += 1
                self._run()
        return LayerActivations(
            layer=layer,
            activations=self._activations,
            ffn_outputs=self._ffn_outputs if self._outputs else None,
            starts=self._starts,
            stream_energies=self._stream_energies,
        )

    def _run(self) -> None:
        loaded, form = self._loaded, self._loaded.states_form
        for batch in self._batches:
            run = run_layer(loaded, self.layer, batch, batch.hidden)
            batch.hidden = run.output
            self._activations.index_copy_(0, batch.rows, batch.real(run.activations).to(loaded.keeps_in))
            if self._outputs:
                self._ffn_outputs.index_copy_(0, batch.rows, batch.real(run.ffn_output).to(loaded.keeps_in))
            self._stream_energies[batch.rows] = form.energies(batch.real(run.output))


def walk_layers(
    loaded: LoadedModel, documents: Sequence[Document], advance: Advance, *, outputs: bool = False
) -> Iterator[LayerActivations]:
    """Yield the FFN activations of each layer in turn; `advance` is called once a layer. See `LayerWalk`."""
    walk = LayerWalk(loaded, documents, outputs=outputs)
    for layer in range(loaded.record.num_layers):
        yield walk.to(layer)
        advance()
