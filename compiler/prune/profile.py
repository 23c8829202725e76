"""Stage `profile`: moments of the FFN activations, per cluster and layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.statistics import document_statistic
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.models.walking import LayerActivations
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.samples import PROFILE_TOKENS
from coreinfer.compiler.team.adding import Arrays, add_arrays, add_up
from coreinfer.compiler.team.dealing import Stepwise, deal, overlapped
from coreinfer.compiler.team.passage import WALK, Passage, begin_passages, layer_of, lengths_of
from coreinfer.compiler.team.team import Shared, Team, Worker, forget
from coreinfer.compiler.text.corpus import Document

if TYPE_CHECKING:
    from .sums import KeptSums

__all__ = ["Profile", "profile_model", "spread_over_clusters"]

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

_STAGE = "profile"
_ENERGIES = "relative_energies"
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
        expert_tokens: assignment name -> (clusters, layers, experts) tokens that chose each expert; of mixtures whose
            experts are narrowed, else empty.
        expert_weights: the same of what the router multiplied the expert's outputs by.
    """

    statistics: dict[str, Floats]
    num_tokens: dict[str, npt.NDArray[np.int64]]
    relative_energies: Floats
    expert_tokens: dict[str, Floats] = field(default_factory=dict)
    expert_weights: dict[str, Floats] = field(default_factory=dict)

    def num_clusters(self, name: str) -> int:
        """Clusters of an assignment."""
        return len(self.statistics[name])


def profile_model(
    config: CompileConfig,
    team: Team,
    documents: Sequence[Document],
    assignments: dict[str, Labels],
    cache: Cache,
    key: str,
    progress: Progress,
    kept: "KeptSums | None" = None,
) -> Profile:
    """Sum up each document's statistic into the cluster that each assignment puts it in.

    Where neurons are not removed by scores, large corpora are sampled, spread evenly over the clusters.

    Args:
        documents: calibration text only.
        assignments: name -> (documents,) cluster ids, such as the clusters and a random control; the clusters first.
        kept: is made of the same run of the text, unless the cache has the profile; its text are these documents, and
            validation text.
    """
    num_clusters = {name: int(labels.max()) + 1 for name, labels in assignments.items()}
    if config.effective_removal == "second-order":
        picked = spread_over_clusters(
            documents, next(iter(assignments.values())), PROFILE_TOKENS, least=_LEAST_DOCUMENTS
        )
        documents = [documents[index] for index in picked]
        assignments = {name: labels[picked] for name, labels in assignments.items()}

    def compute() -> dict[str, Any]:
        return _sums(config, team, documents, assignments, num_clusters, kept, progress)

    arrays = cache.arrays(key, compute)
    lengths = np.array([len(document.token_ids) for document in documents])
    return Profile(
        statistics={name: arrays[f"statistic.{name}"] for name in assignments},
        num_tokens={name: _count(labels, lengths, num_clusters[name]) for name, labels in assignments.items()},
        relative_energies=arrays[_ENERGIES],
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
    team: Team,
    documents: Sequence[Document],
    assignments: Mapping[str, Labels],
    num_clusters: Mapping[str, int],
    kept: "KeptSums | None",
    progress: Progress,
) -> dict[str, Any]:
    num_layers = team.loaded.record.num_layers
    dealt = (
        deal(lengths_of(documents), team, next(iter(assignments.values()))) if kept is None else kept.text.calibration
    )
    own = {place: [documents[index] for index in ids] for place, ids in dealt.items()}
    passages = begin_passages(team, own) if kept is None else kept.text.passages
    texts = {
        place: team.share(
            _Text(
                passage=passages[place],
                labels={name: labels[ids] for name, labels in assignments.items()},
                num_clusters=num_clusters,
                config=config,
            )
        )
        for place, ids in dealt.items()
    }

    def sum_layer(layer: int) -> Stepwise[Arrays]:
        parts = {place: team.call(place, _STAGE, _layer_sums, text, layer) for place, text in texts.items()}
        keep_rest = None if kept is None else kept.keep(team, _STAGE, layer)
        yield
        total = add_up(team, _STAGE, add_arrays, parts)
        keeping = [] if keep_rest is None else keep_rest()
        yield
        for waiting in keeping:
            waiting.result()
        return total.result()

    found: list[Arrays] = []
    with progress.stage(_STAGE, num_layers) as advance:
        for _, sums_of_layer in overlapped(team, range(num_layers), sum_layer):
            found.append(sums_of_layer)
            advance()
        forget(team, _STAGE, WALK)
    sums = {name: np.stack([layer[name] for layer in found], axis=-2) for name in found[0]}
    sums[_ENERGIES] /= max(1, sum(len(document.token_ids) for document in documents))
    return sums


@torch.inference_mode()
def _layer_sums(worker: Worker, shared: "Shared[_Text]", layer: int) -> Arrays:
    """One layer's sums over a place's documents: of each assignment (clusters, ffn_dim), and energies (ffn_dim,)."""
    text, ffn_dim = shared.value(), worker.loaded.record.ffn_dim
    run = layer_of(worker, text.passage, layer)
    sums = {name: np.zeros((text.num_clusters[name], ffn_dim), dtype=np.float32) for name in text.labels}
    energies = np.zeros(ffn_dim, dtype=np.float32)
    for index in range(len(next(iter(text.labels.values())))):
        statistic, energy = _statistics(text.config, run, index)
        for name, labels in text.labels.items():
            sums[name][labels[index]] += statistic
        energies += energy
    return {**{f"statistic.{name}": value for name, value in sums.items()}, _ENERGIES: energies}


@dataclass(frozen=True, kw_only=True)
class _Text:
    """One place's part of the calibration text.

    Attributes:
        passage: its documents come first there.
        labels: assignment name -> cluster ids of these documents.
        num_clusters: assignment name -> clusters in all.
    """

    passage: Shared[Passage]
    labels: Mapping[str, Labels]
    num_clusters: Mapping[str, int]
    config: CompileConfig


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
