"""Bytes of weights that a decoded token reads at a token share, of the files as they are stored."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from coreinfer.bundles.contract import ATTENTION_GROUPS, tensor_name
from coreinfer.bundles.manifest import ffn_bytes
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.quality.sizes import base_bytes
from coreinfer.compiler.quality.stored import StoredPacks
from coreinfer.compiler.report.describe import formats_of

from .inputs import group_weights
from .measure import Measured

__all__ = ["ReadSizes", "read_sizes"]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ReadSizes:
    """What tokens read of a model without experts.

    Attributes:
        ffn_dim: neurons of a layer.
        weights: (layers, 4) of each group's matrices, the FFN whole.
        bytes_per_weight: of the layers' matrices, scales included.
        rest_bytes: that a token reads whatever its share, the head among them.
    """

    ffn_dim: int
    weights: Floats
    bytes_per_weight: float
    rest_bytes: float

    def token_bytes(self, packs: StoredPacks | None, measured: Mapping[int, Measured]) -> int:
        """Return what a token of some clusters' text read, head included: the mean over the tokens.

        Args:
            packs: of the clusters; those that have none read the dense FFN.
            measured: cluster -> what was measured of it.
        """
        num_tokens = [found.tally.num_tokens for found in measured.values()]
        own = [self._cluster_bytes(packs, cluster, found) for cluster, found in measured.items()]
        return round(float(np.average(own, weights=num_tokens if sum(num_tokens) else None)))

    def _cluster_bytes(self, packs: StoredPacks | None, cluster: int, measured: Measured) -> float:
        weights = self.weights.copy()
        if packs is not None and cluster not in packs.thin:
            weights[:, len(ATTENTION_GROUPS) :] *= self._kept(packs, cluster)[:, None]
        return self.rest_bytes + self.bytes_per_weight * float(weights.sum(dtype=np.float64)) * measured.counts.share(
            weights
        )

    def _kept(self, packs: StoredPacks, cluster: int) -> Floats:
        """What share of its neurons each layer of a pack has: (layers,)."""
        file = packs.ffn(cluster)
        names = [tensor_name(layer, "neuron_ids") for layer in range(len(self.weights))]
        # A layer that keeps all neurons lists none.
        counts = [file.shape_of(name)[1][0] if name in file else self.ffn_dim for name in names]
        return np.asarray(np.array(counts) / self.ffn_dim, dtype=np.float32)


def read_sizes(config: CompileConfig, loaded: LoadedModel) -> ReadSizes:
    """Size up a model without experts."""
    record, weights = loaded.record, group_weights(loaded)
    num_attention = len(ATTENTION_GROUPS)
    whole = ffn_bytes(record, formats_of(config).ffn, (record.ffn_dim,) * record.num_layers)
    bytes_per_weight = whole / float(weights[:, num_attention:].sum())
    attention_bytes = bytes_per_weight * float(weights[:, :num_attention].sum())
    return ReadSizes(
        ffn_dim=record.ffn_dim,
        weights=weights,
        bytes_per_weight=bytes_per_weight,
        rest_bytes=base_bytes(config, loaded) - attention_bytes,
    )
