"""Stage `profile`: moments of the FFN activations, per cluster and layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from coreinfer.bundles.statistics import document_statistic
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.models.layerwise import LayerActivations, walk_layers
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.samples import PROFILE_TOKENS
from coreinfer.compiler.text.corpus import Document

__all__ = ["Profile", "Watch", "profile_model", "spread_over_clusters"]

Watch = Callable[[LayerActivations], None]
"""Looks at each layer that a text runs through."""
Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

_LEAST_DOCUMENTS = 8


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

    def num_clusters(self, name: str) -> int:
        """Clusters of an assignment."""
        return len(self.statistics[name])


def profile_model(
    config: CompileConfig,
    loaded: LoadedModel,
    documents: Sequence[Document],
    assignments: dict[str, Labels],
    cache: Cache,
    key: str,
    progress: Progress,
    further: Sequence[Document] = (),
    watch: Watch | None = None,
) -> Profile:
    """Sum up each document's statistic into the cluster that each assignment puts it in.

    Where neurons are not removed by scores, large corpora are sampled, spread evenly over the clusters.

    Args:
        documents: calibration text only.
        assignments: name -> (documents,) cluster ids, such as the clusters and a random control; the clusters first.
        further: documents that are run for the sake of `watch`.
        watch: also looks at the layers, outputs included, unless the cache has the profile.
    """
    num_clusters = {name: int(labels.max()) + 1 for name, labels in assignments.items()}
    if config.effective_removal == "second-order":
        picked = spread_over_clusters(
            documents, next(iter(assignments.values())), PROFILE_TOKENS, least=_LEAST_DOCUMENTS
        )
        documents = [documents[index] for index in picked]
        assignments = {name: labels[picked] for name, labels in assignments.items()}

    def compute() -> dict[str, Any]:
        return _sums(config, loaded, documents, assignments, num_clusters, further, watch, progress)

    arrays = cache.arrays(key, compute)
    lengths = np.array([len(document.token_ids) for document in documents])
    return Profile(
        statistics={name: arrays[f"statistic.{name}"] for name in assignments},
        num_tokens={name: _count(labels, lengths, num_clusters[name]) for name, labels in assignments.items()},
        relative_energies=arrays["relative_energies"],
    )


def spread_over_clusters(documents: Sequence[Document], labels: Labels, num_tokens: int, *, least: int) -> Labels:
    """Take documents evenly from each cluster, of about `num_tokens` together, at least `least` of each if it has them.

    Args:
        labels: (documents,) cluster ids.
    Returns:
        Their indices, ascending.
    """
    total = sum(len(document.token_ids) for document in documents)
    step = max(1, total // num_tokens)
    picked = []
    for cluster in range(int(labels.max()) + 1):
        members = np.flatnonzero(labels == cluster)
        picked.append(members[:: max(1, min(step, len(members) // least))])
    return np.sort(np.concatenate(picked))


def _count(labels: Labels, lengths: npt.NDArray[np.int64], num_clusters: int) -> npt.NDArray[np.int64]:
    return np.bincount(labels, weights=lengths, minlength=num_clusters).astype(np.int64)


def _sums(
    config: CompileConfig,
    loaded: LoadedModel,
    documents: Sequence[Document],
    assignments: dict[str, Labels],
    num_clusters: dict[str, int],
    further: Sequence[Document],
    watch: Watch | None,
    progress: Progress,
) -> dict[str, Any]:
    num_layers, ffn_dim = loaded.record.num_layers, loaded.record.ffn_dim
    sums = {name: np.zeros((num_clusters[name], num_layers, ffn_dim), dtype=np.float32) for name in assignments}
    energies = np.zeros((num_layers, ffn_dim), dtype=np.float32)
    with progress.stage("profile", num_layers) as advance:
        for layer in walk_layers(loaded, [*documents, *further], advance, outputs=watch is not None):
            for index in range(len(documents)):
                statistic, energy = _statistics(config, layer, index)
                for name, labels in assignments.items():
                    sums[name][labels[index], layer.layer] += statistic
                energies[layer.layer] += energy
            if watch is not None:
                watch(layer)
    energies /= max(1, sum(len(document.token_ids) for document in documents))
    return {
        **{f"statistic.{name}": value for name, value in sums.items()},
        "relative_energies": energies,
    }


def _statistics(config: CompileConfig, layer: LayerActivations, index: int) -> tuple[Floats, Floats]:
    """The selection's statistic of a document, and its share of the relative energies: (ffn_dim,) both."""
    values = layer.document(index).float()
    squares = values.square()
    shares = 1.0 / layer.stream_energies[layer.starts[index] : layer.starts[index + 1]].clamp_min(1e-30)
    if config.selection == "output-aware":
        # As `document_statistic` does, of squares that are there already.
        statistic = squares.sum(dim=0).cpu().numpy()
    else:
        statistic = document_statistic(config.selection, values.cpu().numpy(), alpha=config.alpha, beta=config.beta)
    return statistic, (shares @ squares).cpu().numpy()
