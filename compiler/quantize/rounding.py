"""What rounding does to a layer, so that the repair of later layers can compensate it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.formats import float_matrix
from coreinfer.compiler.models.load import LoadedModel
from torch import nn

from .moments import Moments, ffn_moments
from .quantize import store_matrix

__all__ = ["Rounding"]


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How the matrices of FFN and attention will be stored.

    Attributes:
        kind: their format, but for the down projection.
        down_kinds: (layers,) formats of the down projections.
        moments: of the inputs of the linear modules.
    """

    kind: str
    down_kinds: tuple[str, ...]
    moments: Moments

    def down(
        self, loaded: LoadedModel, layer: int, weight: torch.Tensor, neuron_ids: npt.NDArray[np.int32]
    ) -> torch.Tensor:
        """Round a narrow down projection, (kept, hidden size) with a row for each of `neuron_ids`."""
        moment = ffn_moments(self.moments, loaded.family, layer, "down", neuron_ids)
        return _rounded(weight.T, self.down_kinds[layer], moment).T.to(weight)

    @contextmanager
    def layer(self, loaded: LoadedModel, layer: int) -> Iterator[None]:
        """Run the block with one layer's matrices rounded, all but the down projection."""
        path = f"{loaded.family.layers}.{layer}"
        own: dict[nn.Linear, nn.Parameter] = {}
        down = loaded.projection(layer, "down")
        try:
            for name, module in loaded.layers[layer].named_modules():
                if isinstance(module, nn.Linear) and module is not down:
                    own[module] = weight = module.get_parameter("weight")
                    values = _rounded(weight, self.kind, self.moments.get(f"{path}.{name}"))
                    module.weight = nn.Parameter(values.to(loaded.dtype), requires_grad=False)
            yield
        finally:
            for module, weight in own.items():
                module.weight = weight


def _rounded(weight: torch.Tensor, kind: str, moments: torch.Tensor | None) -> torch.Tensor:
    """What a matrix is when it was stored and read again, in float32."""
    parts = store_matrix("weight", weight, kind, moments)
    values = float_matrix(parts, "weight", (weight.shape[0], weight.shape[1]))
    return torch.from_numpy(values).to(weight.device)
