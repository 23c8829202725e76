"""Stage `reconstruct`, one layer: choose the neurons that stay and refit the down projection on them.

With h the activations that the narrow model really sees in this layer and y what the layer's FFN should put out,
the kept rows become W' = (G_SS + lam I)^-1 (C_S + lam W_S) with G = E[h h^T] and C = E[h y^T]: ridge least squares that
falls back to the model's own weights where data is thin. Where the family's down projection has a bias, h and y are
centred and the bias takes up the difference of the means.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .products import add_products, mirror
from .removal import System, remove_neurons, solve

__all__ = [
    "CLUSTER_WEIGHTS",
    "RIDGES",
    "LayerTokens",
    "MixedMoments",
    "Moments",
    "RepairTask",
    "Repaired",
    "mean_moments",
    "overall_moments",
    "repair_layer",
]

RIDGES = (1e-3, 1e-2, 1e-1)
"""Candidates for "auto", relative to the mean diagonal of the Gram matrix; no repair is the last candidate."""
CLUSTER_WEIGHTS = (0.3, 0.6)
"""Candidates for "auto"; the first is best for little text, the second for 40,000 tokens per cluster."""
_REMOVAL_RIDGE = 1e-2
_TOKEN_CHUNK = 8192

Ids = npt.NDArray[np.int32]
Solutions = list[tuple[torch.Tensor, torch.Tensor]]
"""A (kept, hidden size) down projection, transposed, and its (hidden size,) bias for each cluster."""
MixedMoments = tuple["Moments", "Moments | None"]
"""A cluster's moments, and those of all text; None for the latter where there is one cluster."""


@dataclass(frozen=True, kw_only=True)
class LayerTokens:
    """What one layer's FFN sees and should put out, token by token.

    Attributes:
        activations: (tokens, ffn_dim), input of the down projection.
        targets: (tokens, hidden size), the wanted output of the down projection, bias included.
    """

    activations: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class RepairTask:
    """One assignment's clusters in one layer.

    Attributes:
        calibration, validation: rows of each cluster's tokens.
        weights: (ffn_dim, hidden size) float32, the down projection transposed.
        bias: (hidden size,) float32, None where the family has none.
        metric: (hidden size, hidden size) what output errors cost.
        keeps: how many neurons of each cluster stay. A cluster that keeps all keeps the model's own weights.
        neuron_ids: the neurons of each cluster; None to remove by second order.
        cluster_weights: candidates for the weight of the cluster's moments against those of all text.
        ridges: candidates; None among them stands for no repair.
        moment_bytes: moments of all clusters are held in memory up to this size, and summed twice beyond it.
    """

    calibration: Sequence[torch.Tensor]
    validation: Sequence[torch.Tensor]
    weights: torch.Tensor
    bias: torch.Tensor | None
    metric: torch.Tensor
    keeps: Sequence[int]
    neuron_ids: Sequence[Ids] | None
    cluster_weights: Sequence[float]
    ridges: Sequence[float | None]
    moment_bytes: int = 4 << 30


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """One layer of one assignment.

    Attributes:
        neuron_ids: of each cluster, ascending.
        solutions: of each cluster; the bias is zero where the family has none.
        ridge: that was taken for all clusters; None where the model's own weights are left.
        cluster_weight: that was taken for all clusters.
    """

    neuron_ids: list[Ids]
    solutions: Solutions
    ridge: float | None
    cluster_weight: float


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Means over tokens of h h^T, h y^T, h and y; the last two only where the down projection has a bias."""

    gram: torch.Tensor
    cross: torch.Tensor
    mean_activation: torch.Tensor
    mean_target: torch.Tensor

    def parts(self) -> tuple[torch.Tensor, ...]:
        """All of them."""
        return self.gram, self.cross, self.mean_activation, self.mean_target


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    """One cluster weight's neurons, and for each ridge its solutions, as far as the clusters are through."""

    cluster_weight: float
    neuron_ids: list[Ids]
    candidates: list[Solutions]


def repair_layer(tokens: LayerTokens, task: RepairTask, moments: Iterable[MixedMoments] | None = None) -> Repaired:
    """Choose and refit one layer's neurons for every cluster, with one cluster weight and one ridge for all of them.

    Args:
        moments: each cluster's, and those of all text, where they are known; None to sum them over the tokens.

    Both are the candidates with the lowest cost on the validation tokens; no repair at all is a candidate of "auto", so
    that a repair which other text rejects is never shipped. Without validation tokens they are the first.
    """
    attempts = [
        _Attempt(cluster_weight=weight, neuron_ids=[], candidates=[[] for _ in task.ridges])
        for weight in task.cluster_weights
    ]
    for cluster, (own, overall) in enumerate(_moments(tokens, task) if moments is None else moments):
        for attempt in attempts:
            weight = attempt.cluster_weight
            mixed = own if overall is None else _weighted_sum([own, overall], [weight, 1 - weight])
            _solve_cluster(attempt, mixed, task, cluster)
    return _best(tokens, task, attempts)


def _solve_cluster(attempt: _Attempt, mixed: Moments, task: RepairTask, cluster: int) -> None:
    """Add the next cluster's neurons and solutions to an attempt."""
    system = _system(mixed, task)
    if task.neuron_ids is None:
        attempt.neuron_ids.append(remove_neurons(system, task.metric, keep=task.keeps[cluster]).neuron_ids)
    else:
        attempt.neuron_ids.append(task.neuron_ids[cluster])
    solutions = _solutions(system, mixed, task, attempt.neuron_ids[-1])
    for found, solution in zip(attempt.candidates, solutions, strict=True):
        found.append(solution)


def _best(tokens: LayerTokens, task: RepairTask, attempts: Sequence[_Attempt]) -> Repaired:
    """Take the attempt and the ridge that validation text likes best."""
    best, ridge = attempts[0], 0
    if len(attempts) * len(task.ridges) > 1 and any(len(rows) for rows in task.validation):
        costs = [_validation_costs(tokens, task, item.neuron_ids, item.candidates) for item in attempts]
        number = min(range(len(attempts)), key=lambda index: min(costs[index]))
        best, ridge = attempts[number], min(range(len(task.ridges)), key=costs[number].__getitem__)
    return Repaired(
        neuron_ids=best.neuron_ids,
        solutions=best.candidates[ridge],
        ridge=task.ridges[ridge],
        cluster_weight=best.cluster_weight,
    )


def _system(moments: Moments, task: RepairTask) -> System:
    gram, cross = moments.gram, moments.cross
    if task.bias is not None:
        gram = gram - torch.outer(moments.mean_activation, moments.mean_activation)
        cross = cross - torch.outer(moments.mean_activation, moments.mean_target)
    return System(gram=gram, cross=cross, own=task.weights, ridge=_REMOVAL_RIDGE)


def _solutions(system: System, moments: Moments, task: RepairTask, neuron_ids: Ids) -> Solutions:
    """One cluster's solution for each candidate ridge."""
    index = torch.from_numpy(neuron_ids).long().to(task.weights.device)
    none = torch.zeros(task.weights.shape[1], device=task.weights.device)
    own = (task.weights[index], none if task.bias is None else task.bias)
    if len(neuron_ids) == len(task.weights):
        return [own] * len(task.ridges)
    refitted = iter(solve(system, index, [ridge for ridge in task.ridges if ridge is not None]))
    solutions: Solutions = []
    for ridge in task.ridges:
        if ridge is None:
            solutions.append(own)
            continue
        down = next(refitted)
        bias = none if task.bias is None else moments.mean_target - moments.mean_activation[index] @ down
        solutions.append((down, bias))
    return solutions


def _moments(tokens: LayerTokens, task: RepairTask) -> Iterator[MixedMoments]:
    """Each cluster's moments, one at a time, and those of all text; None for the latter where there is one cluster."""
    centred = task.bias is not None
    if len(task.calibration) == 1:
        yield mean_moments(tokens, task.calibration[0], centred=centred), None
        return
    num_values = task.weights.shape[0] * (task.weights.shape[0] + task.weights.shape[1])
    own: Iterable[Moments]
    if len(task.calibration) * num_values * 4 > task.moment_bytes:
        overall = mean_moments(tokens, torch.cat([*task.calibration]), centred=centred)
        own = (mean_moments(tokens, rows, centred=centred) for rows in task.calibration)
    else:
        own = [mean_moments(tokens, rows, centred=centred) for rows in task.calibration]
        counts = [len(rows) for rows in task.calibration]
        overall = _weighted_sum(own, [count / sum(counts) for count in counts])
    for moments in own:
        yield moments, overall


def overall_moments(own: Sequence[Moments], counts: Sequence[int]) -> Moments | None:
    """Moments of all text from those of its clusters; None where there is one cluster.

    Args:
        counts: tokens of each cluster.
    """
    return None if len(own) == 1 else _weighted_sum(own, [count / sum(counts) for count in counts])


def _weighted_sum(moments: Sequence[Moments], weights: Sequence[float]) -> Moments:
    columns = zip(*(item.parts() for item in moments), strict=True)
    sums = [
        torch.stack([part * weight for part, weight in zip(parts, weights, strict=True)]).sum(dim=0)
        if parts[0].ndim == 1
        else _accumulate(parts, weights)
        for parts in columns
    ]
    return Moments(gram=sums[0], cross=sums[1], mean_activation=sums[2], mean_target=sums[3])


def _accumulate(parts: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    total = torch.zeros_like(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        total.add_(part, alpha=weight)
    return total


def mean_moments(tokens: LayerTokens, rows: torch.Tensor, *, centred: bool) -> Moments:
    """Moments of some tokens; means are left at 0 where nothing is centred."""
    ffn_dim, hidden_size = tokens.activations.shape[1], tokens.targets.shape[1]
    device, count = tokens.activations.device, max(1, len(rows))
    sums = Moments(
        gram=torch.zeros((ffn_dim, ffn_dim), device=device),
        cross=torch.zeros((ffn_dim, hidden_size), device=device),
        mean_activation=torch.zeros(ffn_dim, device=device),
        mean_target=torch.zeros(hidden_size, device=device),
    )
    add_products(sums.gram, sums.cross, tokens.activations, tokens.targets, rows)
    mirror(sums.gram)
    if centred:
        for part in rows.split(_TOKEN_CHUNK):
            sums.mean_activation.add_(tokens.activations[part].float().sum(dim=0))
            sums.mean_target.add_(tokens.targets[part].float().sum(dim=0))
    for total in sums.parts():
        total.div_(count)
    return sums


def _validation_costs(
    tokens: LayerTokens, task: RepairTask, neuron_ids: Sequence[Ids], candidates: Sequence[Solutions]
) -> list[float]:
    """What each candidate's output errors on the validation tokens cost."""
    costs = [0.0] * len(candidates)
    for cluster, (rows, ids) in enumerate(zip(task.validation, neuron_ids, strict=True)):
        index = torch.from_numpy(ids).long().to(task.weights.device)
        for part in rows.split(_TOKEN_CHUNK):
            kept, target = (
                tokens.activations.index_select(0, part).index_select(1, index).float(),
                tokens.targets[part].float(),
            )
            for number, solutions in enumerate(candidates):
                down, bias = solutions[cluster]
                errors = target - bias - kept @ down
                costs[number] += float(((errors @ task.metric) * errors).sum())
    return costs
