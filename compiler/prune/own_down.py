"""The model's own down projection, as repairs read it where they run: workers have the model, and nothing is sent."""

from dataclasses import dataclass

import torch
from coreinfer.compiler.team.team import Worker

from .candidates import Ids

__all__ = ["OWN_DOWN", "OwnDown", "own_down"]

OWN_DOWN = "own down projection"
"""Slot of a worker's last one."""


@dataclass(frozen=True, kw_only=True)
class OwnDown:
    """One layer's.

    Attributes:
        weights: (ffn_dim, hidden size) float32, the matrix transposed; of the candidates alone where there are some.
        bias: (hidden size,) float32, None where the family has none.
    """

    weights: torch.Tensor
    bias: torch.Tensor | None

    def rows(self, neuron_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrix of some neurons alone, and its bias; zero where the family has none."""
        device = self.weights.device
        bias = torch.zeros(self.weights.shape[1], device=device) if self.bias is None else self.bias
        return self.weights[neuron_ids.long().to(device)], bias


def own_down(worker: Worker, layer: int, candidates: Ids | None = None) -> OwnDown:
    """Find a layer's, of its candidates alone where there are some."""

    def make() -> OwnDown:
        module = worker.loaded.projection(layer, "down")
        weights = module.weight.detach()
        if candidates is not None:
            weights = weights[:, torch.from_numpy(candidates).long().to(weights.device)]
        return OwnDown(
            weights=weights.float().T.contiguous(),
            bias=None if module.bias is None else module.bias.detach().float(),
        )

    of = "" if candidates is None else f" of {hash(candidates.tobytes())}"
    return worker.recall(OWN_DOWN, f"{layer}{of}", make)
