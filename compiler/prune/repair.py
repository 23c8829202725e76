"""Stage `reconstruct`, one layer: choose the neurons that stay and refit the down projection on them.

With h the activations that the narrow model really sees in this layer and y what the layer's FFN should put out,
the kept rows become W' = (G_SS + lam I)^-1 (C_S + lam W_S) with G = E[h h^T] and C = E[h y^T]: ridge least squares that
falls back to the model's own weights where data is thin. Where the family's down projection has a bias, h and y are
centred and the bias takes up the difference of the means.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.compiler.team.dealing import homes_of, in_turn
from coreinfer.compiler.team.team import Pending, Shared, Team, Worker

from .dealt import Find, LayerTokens, TokenCounts
from .means import Moments, ask_moments, ask_overall, weighted_sum
from .removal import System, remove_neurons, solve

__all__ = ["CLUSTER_WEIGHTS", "RIDGES", "Known", "RepairTask", "Repaired", "repair_layer"]

RIDGES = (1e-3, 1e-2, 1e-1)
"""Candidates for "auto", relative to the mean diagonal of the Gram matrix; no repair is the last candidate."""
CLUSTER_WEIGHTS = (0.3, 0.6)
"""Candidates for "auto"; the first is best for little text, the second for 40,000 tokens per cluster."""
_REMOVAL_RIDGE = 1e-2
_TOKEN_CHUNK = 8192
_STAGE = "reconstruct"

Ids = npt.NDArray[np.int32]
Solutions = list[tuple[torch.Tensor, torch.Tensor]]
"""A (kept, hidden size) down projection, transposed, and its (hidden size,) bias for each ridge or cluster."""
Costs = list[list[list[float]]]
"""Of one cluster: costs[chunk of tokens][cluster weight][ridge]."""


@dataclass(frozen=True, kw_only=True)
class RepairTask:
    """One assignment's clusters in one layer.

    Attributes:
        calibration, validation: tokens of each cluster at each place, of the latter those that are read narrow.
        weights: (ffn_dim, hidden size) float32, the down projection transposed.
        bias: (hidden size,) float32, None where the family has none.
        metric: (hidden size, hidden size) what output errors cost.
        keeps: how many neurons of each cluster stay. A cluster that keeps all keeps the model's own weights.
        neuron_ids: the neurons of each cluster; None to remove by second order.
        cluster_weights: candidates for the weight of the cluster's moments against those of all text.
        ridges: candidates; None among them stands for no repair.
        moment_bytes: each worker holds moments in memory up to this size; beyond it they are summed twice.
    """

    calibration: TokenCounts
    validation: TokenCounts
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
class _Solved:
    """One cluster's neurons, and its solutions for each ridge, by one cluster weight."""

    neuron_ids: Ids
    solutions: Solutions


_Pending = Pending[list[_Solved]]
Known = Callable[[int, int], Pending[Moments]]
"""Asks for a cluster's moments, which are known, at a place."""


def repair_layer(team: Team, finds: Mapping[int, Find], task: RepairTask, known: Known | None = None) -> Repaired:
    """Choose and refit one layer's neurons for every cluster, with one cluster weight and one ridge for all of them.

    Both are the candidates with the lowest cost on the validation tokens; no repair at all is a candidate of "auto", so
    that a repair which other text rejects is never shipped. Without validation tokens they are the first.

    Args:
        finds: place -> finds the layer's tokens there.
        known: cluster and place -> the cluster's moments, where they are known; None to sum them over the tokens.
    """
    shared, homes = team.share(task), homes_of(task.calibration, team)
    solved = _solve_clusters(team, finds, task, shared, known, homes)
    weight, ridge = _best(team, finds, task, shared, solved)
    chosen = [team.call(homes[c], _STAGE, _choose, solved[c], weight, ridge) for c in range(len(task.keeps))]
    found = [waiting.result() for waiting in chosen]
    return Repaired(
        neuron_ids=[ids for ids, _ in found],
        solutions=[solution for _, solution in found],
        ridge=task.ridges[ridge],
        cluster_weight=task.cluster_weights[weight],
    )


def _solve_clusters(
    team: Team,
    finds: Mapping[int, Find],
    task: RepairTask,
    shared: Shared[RepairTask],
    known: Known | None,
    homes: Mapping[int, int],
) -> dict[int, _Pending]:
    """Solve each cluster at its home, as soon as its moments are there."""
    centred, num_values = task.bias is not None, task.weights.shape[0] * sum(task.weights.shape)
    own = partial(ask_moments, team, _STAGE, finds, task.calibration, centred=centred)
    found = None
    if known is not None:
        found = {cluster: known(cluster, place) for cluster, place in homes.items()}
    elif len(homes) * num_values * 4 <= task.moment_bytes * team.size:
        found = {cluster: own(cluster) for cluster in homes}
    overall = ask_overall(team, _STAGE, finds, task.calibration, found, homes, centred=centred)

    def ask(cluster: int) -> _Pending:
        place, moments = homes[cluster], own(cluster) if found is None else found[cluster]
        everything = None if overall is None else overall[place]
        return team.call(place, _STAGE, _solve_cluster, shared, cluster, moments, everything)

    solved = {}
    for cluster, one in in_turn(team, homes, ask):
        # Not all at once: moments that are summed twice would all be there before the first is used.
        one.wait()
        solved[cluster] = one
    return solved


@torch.inference_mode()
def _solve_cluster(
    _worker: Worker, shared: Shared[RepairTask], cluster: int, own: Moments, overall: Moments | None
) -> list[_Solved]:
    """One cluster's neurons and solutions for each cluster weight."""
    task, found = shared.value(), []
    for weight in task.cluster_weights:
        mixed = own if overall is None else weighted_sum([own, overall], [weight, 1 - weight])
        system = _system(mixed, task)
        if task.neuron_ids is None:
            neuron_ids = remove_neurons(system, task.metric, keep=task.keeps[cluster]).neuron_ids
        else:
            neuron_ids = task.neuron_ids[cluster]
        found.append(_Solved(neuron_ids=neuron_ids, solutions=_solutions(system, mixed, task, neuron_ids)))
    return found


def _choose(
    _worker: Worker, solved: list[_Solved], weight: int, ridge: int
) -> tuple[Ids, tuple[torch.Tensor, torch.Tensor]]:
    return solved[weight].neuron_ids, solved[weight].solutions[ridge]


def _best(
    team: Team, finds: Mapping[int, Find], task: RepairTask, shared: Shared[RepairTask], solved: Mapping[int, _Pending]
) -> tuple[int, int]:
    """Numbers of the cluster weight and of the ridge that validation text likes best."""
    shape = (len(task.cluster_weights), len(task.ridges))
    if shape == (1, 1) or not any(task.validation):
        return 0, 0
    asked = {
        (cluster, place): team.call(place, _STAGE, _validation_costs, finds[place], shared, cluster, solved[cluster])
        for cluster, places in enumerate(task.validation)
        for place in places
    }
    totals = np.zeros(shape)
    for waiting in asked.values():
        for chunk in waiting.result():
            totals += np.array(chunk)
    costs = totals.tolist()
    weight = min(range(len(costs)), key=lambda number: min(costs[number]))
    return weight, min(range(len(task.ridges)), key=costs[weight].__getitem__)


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


@torch.inference_mode()
def _validation_costs(
    worker: Worker, find: Find, shared: Shared[RepairTask], cluster: int, solved: Sequence[_Solved]
) -> Costs:
    """What each candidate's output errors on a place's validation tokens of a cluster cost."""
    seen, task = find(worker), shared.value()
    return [_chunk_costs(seen.tokens, rows, task, solved) for rows in seen.rows.validation[cluster].split(_TOKEN_CHUNK)]


def _chunk_costs(
    tokens: LayerTokens, rows: torch.Tensor, task: RepairTask, solved: Sequence[_Solved]
) -> list[list[float]]:
    costs, target = [], tokens.targets[rows].float()
    for one in solved:
        index = torch.from_numpy(one.neuron_ids).long().to(task.weights.device)
        kept = tokens.activations.index_select(0, rows).index_select(1, index).float()
        errors = (target - bias - kept @ down for down, bias in one.solutions)
        costs.append([float(((error @ task.metric) * error).sum()) for error in errors])
    return costs
