"""What an engine sums of a prompt's FFN activations, by which the prompt then chooses neurons of its own."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from coreinfer.bundles.manifest import Manifest
from coreinfer.bundles.statistics import Selection, document_statistic

__all__ = ["PromptSums"]

Floats = npt.NDArray[np.float32]


class PromptSums:
    """Sums over the tokens of a prompt, or of a part of it; sums of parts add.

    Each expert of a mixture is an FFN of its own here: its activations are those of the tokens that the router sent to
    it, times what the router multiplies its outputs by.

    Attributes:
        statistics: selection -> (layers, ffn_dim) float32; a layer's experts lie one after another.
    """

    def __init__(self, manifest: Manifest, selections: Sequence[Selection]) -> None:
        model, self._plan = manifest.model, manifest.plan
        self._width = model.ffn_dim if model.experts is None else model.expert_neurons
        shape = (model.num_layers, model.ffn_dim)
        self.statistics = {selection: np.zeros(shape, dtype=np.float32) for selection in selections}

    def add(self, layer: int, expert: int, activations: Floats, weights: Floats | None) -> None:
        """Add tokens of one layer.

        Args:
            expert: 0 where the FFN is one.
            activations: (tokens, neurons or more): what lies beyond the last neuron is padding.
            weights: (tokens,) the router's; None where the FFN is one.
        """
        own = activations[:, : self._width]
        if weights is not None:
            own = own * weights[:, None]
        first = expert * self._width
        for selection, sums in self.statistics.items():
            sums[layer, first : first + self._width] += document_statistic(
                selection, own, alpha=self._plan.alpha, beta=self._plan.beta, sentence=False
            )
