"""The result of narrowing one layer, and its form in the cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .narrow import Bits

__all__ = ["LayerResult", "arrays_of", "results_of"]

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class LayerResult:
    """One layer of one assignment, narrowed.

    Attributes:
        neuron_ids: of each cluster, ascending int32.
        ridge: of the repair; None where the model's own weights are left.
        cluster_weight: weight of a cluster's moments that was taken for the repair, or would have been.
        downs: of each cluster, the repaired down projection (kept, hidden size) as bfloat16 bits; () without a repair.
        biases: of each cluster, its bias (hidden size,) float32; () without a repair, and in families that have none.
            Of narrow experts downs are their rows, one expert after another, and biases (experts, hidden size).
    """

    neuron_ids: tuple[npt.NDArray[np.int32], ...]
    ridge: float | None
    cluster_weight: float
    downs: tuple[Bits, ...] = ()
    biases: tuple[npt.NDArray[np.float32], ...] = ()

    def down(self, cluster: int) -> Bits | None:
        """The repaired down projection of a cluster; None where it is the model's own."""
        return self.downs[cluster] if self.downs else None

    def bias(self, cluster: int) -> npt.NDArray[np.float32] | None:
        """Its bias; None where it is the model's own, or there is none."""
        return self.biases[cluster] if self.biases else None


_CLUSTER_FIELDS = ("neuron_ids", "downs", "biases")


def arrays_of(results: Mapping[str, LayerResult]) -> dict[str, npt.NDArray[Any]]:
    """Turn one layer's results, by the names of their assignments, into arrays for the cache."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, result in results.items():
        arrays[f"{name}.cluster_weight"] = np.array([result.cluster_weight])
        # No ridge is an empty array.
        arrays[f"{name}.ridge"] = np.array([] if result.ridge is None else [result.ridge])
        for field in _CLUSTER_FIELDS:
            arrays |= {f"{name}.{field}.{cluster}": part for cluster, part in enumerate(getattr(result, field))}
    return arrays


def results_of(arrays: Arrays, names: Sequence[str]) -> dict[str, LayerResult]:
    """Turn arrays back into the results of the assignments that they were made of."""
    return {name: _result(arrays, name) for name in names}


def _result(arrays: Arrays, name: str) -> LayerResult:
    ridge = arrays[f"{name}.ridge"].tolist()
    return LayerResult(
        neuron_ids=_parts(arrays, f"{name}.neuron_ids"),
        ridge=ridge[0] if ridge else None,
        cluster_weight=float(arrays[f"{name}.cluster_weight"][0]),
        downs=_parts(arrays, f"{name}.downs"),
        biases=_parts(arrays, f"{name}.biases"),
    )


def _parts(arrays: Arrays, field: str) -> tuple[Any, ...]:
    """Arrays of all clusters, in order."""
    count = sum(key.startswith(f"{field}.") for key in arrays)
    return tuple(arrays[f"{field}.{cluster}"] for cluster in range(count))
