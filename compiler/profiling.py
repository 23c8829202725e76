"""Stage `profile`: moments of the FFN activations, per cluster and layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from coreinfer.bundles.statistics import document_statistic

from .cache import Cache
from .config import CompileConfig
from .corpus import Document
from .layerwise import walk_layers
from .models import LoadedModel
from .progress import Progress

__all__ = ["Profile", "profile_model"]

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Sums over calibration tokens.

    Attributes:
        statistics: assignment name -> (clusters, layers, ffn_dim) sums of the selection's statistic.
        num_tokens: assignment name -> (clusters,) tokens that were summed.
        relative_energies: (layers, ffn_dim) mean over tokens of h^2 divided by the squared norm of the hidden state
            that leaves the layer at that token. Dividing token by token keeps the few tokens with massive
            activations (attention sinks) from hiding all others.
    """

    statistics: dict[str, Floats]
    num_tokens: dict[str, npt.NDArray[np.int64]]
    relative_energies: Floats


def profile_model(
    config: CompileConfig,
    loaded: LoadedModel,
    documents: Sequence[Document],
    assignments: dict[str, Labels],
    cache: Cache,
    key: str,
    progress: Progress,
) -> Profile:
    """Sum up each document's statistic into the cluster that each assignment puts it in.

    Args:
        documents: calibration text only.
        assignments: name -> (documents,) cluster ids, such as the clusters and a random control.
    """

    def compute() -> dict[str, Any]:
        return _sums(config, loaded, documents, assignments, progress)

    arrays = cache.arrays(key, compute)
    lengths = np.array([len(document.token_ids) for document in documents])
    return Profile(
        statistics={name: arrays[f"statistic.{name}"] for name in assignments},
        num_tokens={name: _count(labels, lengths) for name, labels in assignments.items()},
        relative_energies=arrays["relative_energies"],
    )


def _count(labels: Labels, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.bincount(labels, weights=lengths).astype(np.int64)


def _sums(
    config: CompileConfig,
    loaded: LoadedModel,
    documents: Sequence[Document],
    assignments: dict[str, Labels],
    progress: Progress,
) -> dict[str, Any]:
    num_layers, ffn_dim = loaded.record.num_layers, loaded.record.ffn_dim
    sums = {
        name: np.zeros((int(labels.max()) + 1, num_layers, ffn_dim), dtype=np.float32)
        for name, labels in assignments.items()
    }
    energies = np.zeros((num_layers, ffn_dim), dtype=np.float32)
    with progress.stage("profile", num_layers) as advance:
        for layer in walk_layers(loaded, documents, advance):
            shares = (1.0 / layer.stream_energies.clamp_min(1e-30)).cpu().numpy()
            for index in range(len(documents)):
                activations = layer.document(index).float().cpu().numpy()
                statistic = document_statistic(config.selection, activations, alpha=config.alpha, beta=config.beta)
                for name, labels in assignments.items():
                    sums[name][labels[index], layer.layer] += statistic
                energies[layer.layer] += shares[layer.starts[index] : layer.starts[index + 1]] @ np.square(activations)
    energies /= max(1, sum(len(document.token_ids) for document in documents))
    return {
        **{f"statistic.{name}": value for name, value in sums.items()},
        "relative_energies": energies,
    }
