"""What the neurons of each expert put out, by which every expert of a mixture is narrowed as an FFN is.

The statistic of a neuron is the sum over the tokens of its expert of (w h)^2, times the squared norm of its column of
the down projection: what leaving it out would change, w being what the router multiplies the expert's output by.
Expert by expert is run, so that of activations no more than one expert's of one batch are in memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.contract import expert_role
from coreinfer.compiler.models.layerwise import Batch, layer_output
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.runtime.engines.torch.mixture import ExpertRun, Mixture

__all__ = ["NeuronSums", "neuron_sums"]

Labels = npt.NDArray[np.int64]

_UNSEEN = 1e-20
"""In the place of the squared activations of an expert that no token chose: its columns' norms alone decide then."""


@dataclass(frozen=True, kw_only=True)
class NeuronSums:
    """One layer's sums over tokens.

    Attributes:
        statistics: assignment name -> (clusters, neurons of all experts) float32.
        tokens: assignment name -> (clusters, experts) float32, tokens that chose each expert.
        weights: assignment name -> (clusters, experts) float32, what the router multiplied each expert's outputs by.
        energy: of all neurons together, each token's divided by the squared norm of the hidden state that leaves the
            layer.
    """

    statistics: Mapping[str, npt.NDArray[np.float32]]
    tokens: Mapping[str, npt.NDArray[np.float32]]
    weights: Mapping[str, npt.NDArray[np.float32]]
    energy: float


def neuron_sums(
    loaded: LoadedModel,
    layer: int,
    batches: Sequence[Batch],
    labels: Mapping[str, Labels],
    num_clusters: Mapping[str, int],
) -> NeuronSums:
    """Run all text through a layer, and sum up what its experts' neurons did.

    Args:
        labels: assignment name -> (tokens,) clusters, in the order of all documents.
        num_clusters: assignment name -> clusters in all.
    """
    mixture, experts = loaded.mixture(layer), loaded.record.experts
    assert experts is not None
    norms = _column_energies(mixture, experts.num_experts)
    # The last row takes the padding.
    sums = {name: torch.zeros((count + 1, *norms.shape), device=loaded.device) for name, count in num_clusters.items()}
    counts, weights = ({name: values.new_zeros(values.shape[:2]) for name, values in sums.items()} for _ in range(2))
    energy = 0.0
    for batch in batches:
        owners = {name: _owners(batch, own, num_clusters[name]) for name, own in labels.items()}
        energies = torch.zeros(batch.mask.numel(), device=loaded.device)
        mixture.watch = partial(_add, sums, counts, weights, owners, energies, norms)
        try:
            batch.hidden = layer_output(loaded, layer, batch, batch.hidden)
        finally:
            mixture.watch = None
        stream = batch.real(batch.hidden).float().square().sum(dim=-1)
        energy += float((energies[batch.mask.reshape(-1)] / stream.clamp_min(1e-30)).sum())
    statistics = {name: _statistic(values[:-1], norms) for name, values in sums.items()}
    tokens, routed = ({name: found[name][:-1].cpu().numpy() for name in found} for found in (counts, weights))
    return NeuronSums(statistics=statistics, tokens=tokens, weights=routed, energy=energy)


def _column_energies(mixture: Mixture, num_experts: int) -> torch.Tensor:
    """Squared norms of the columns of each expert's down projection: (experts, neurons)."""
    downs = (mixture.tensors[expert_role(number, "down")] for number in range(num_experts))
    return torch.stack([down.float().square().sum(dim=0) for down in downs])


def _owners(batch: Batch, labels: Labels, padding: int) -> torch.Tensor:
    """The cluster of each place of a batch: (batch x length,)."""
    owners = torch.full((batch.mask.numel(),), padding, dtype=torch.long)
    owners[batch.mask.reshape(-1).cpu()] = torch.from_numpy(labels)[batch.rows.cpu()]
    return owners.to(batch.mask.device)


def _add(
    sums: Mapping[str, torch.Tensor],
    counts: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    owners: Mapping[str, torch.Tensor],
    energies: torch.Tensor,
    norms: torch.Tensor,
    run: ExpertRun,
) -> None:
    squares = (run.activations.float() * run.weights.float()[:, None]).square()
    for name, total in sums.items():
        total[:, run.expert].index_add_(0, owners[name][run.rows], squares)
        counts[name][:, run.expert] += torch.bincount(owners[name][run.rows], minlength=len(total))
        weights[name][:, run.expert].index_add_(0, owners[name][run.rows], run.weights.float())
    energies[run.rows] += squares @ norms[run.expert]


def _statistic(sums: torch.Tensor, norms: torch.Tensor) -> npt.NDArray[np.float32]:
    unseen = sums.sum(dim=(0, 2)) == 0
    values: npt.NDArray[np.float32] = ((sums + _UNSEEN * unseen[:, None]) * norms).flatten(1).cpu().numpy()
    return values
