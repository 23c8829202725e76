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
from coreinfer.compiler.team.dealing import Stepwise, homes_of, in_turn
from coreinfer.compiler.team.team import Pending, Shared, Team, Worker

from .dealt import Find, LayerTokens, TokenCounts
from .means import Moments, ask_moments, ask_overall, weighted_sum
from .own_down import OwnDown
from .removal import REMOVAL_RIDGE, System, remove_neurons, solve
from .triangle import num_packed

__all__ = ["CLUSTER_WEIGHTS", "RIDGES", "Known", "RepairTask", "Repaired", "repair_layer"]

RIDGES = (1e-3, 1e-2, 1e-1)
"""Candidates for "auto", relative to the mean diagonal of the Gram matrix; no repair is the last candidate."""
CLUSTER_WEIGHTS = (0.3, 0.6)
"""Candidates for "auto"; the first is best for little text, the second for 40,000 tokens per cluster."""
_TOKEN_CHUNK = 8192
_STAGE = "reconstruct"

Ids = npt.NDArray[np.int32]
Solution = tuple[torch.Tensor, torch.Tensor]
"""A (kept, hidden size) down projection, transposed, and its (hidden size,) bias."""
Costs = list[list[list[float]]]
"""Of one cluster: costs[chunk of tokens][cluster weight][ridge]."""


@dataclass(frozen=True, kw_only=True)
class RepairTask:
    """One assignment's clusters in one layer.

    Attributes:
        calibration, validation: tokens of each cluster at each place, of the latter those that are read narrow.
        own: finds the model's down projection, where it is asked.
        shape: of its matrix, (ffn_dim, hidden size). Where only some neurons are candidates, that is how many they are,
            and ids are numbers among them.
        has_bias: whether the family's has one.
        metric: (hidden size, hidden size) what output errors cost.
        keeps: how many neurons of each cluster stay. A cluster that keeps all keeps the model's own weights.
        neuron_ids: the neurons of each cluster; None to remove by second order.
        cluster_weights: candidates for the weight of the cluster's moments against those of all text.
        ridges: candidates; None among them stands for no repair.
        dtype: of the solutions that are returned.
        moment_bytes: each worker holds moments in memory up to this size; beyond it they are summed twice.
    """

    calibration: TokenCounts
    validation: TokenCounts
    own: Callable[[Worker], OwnDown]
    shape: tuple[int, int]
    has_bias: bool
    metric: torch.Tensor
    keeps: Sequence[int]
    neuron_ids: Sequence[Ids] | None
    cluster_weights: Sequence[float]
    ridges: Sequence[float | None]
    dtype: torch.dtype
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
    solutions: list[Solution]
    ridge: float | None
    cluster_weight: float


@dataclass(frozen=True, kw_only=True)
class _Solved:
    """One cluster's neurons, and its solution for each ridge, by one cluster weight; None for the model's own."""

    neuron_ids: Ids
    solutions: list[Solution | None]

    def solution(self, ridge: int, own: Callable[[], OwnDown]) -> Solution:
        """The one for a ridge."""
        if (found := self.solutions[ridge]) is not None:
            return found
        return own().rows(torch.from_numpy(self.neuron_ids))


_Pending = Pending[list[_Solved]]
_Source = Moments | Callable[[Worker], Moments]
"""Moments, or what finds them where they are used."""
Known = Callable[[int | None], Callable[[Worker], Moments]]
"""A cluster, or None for all text -> what finds its moments where they are used."""


def repair_layer(
    team: Team, finds: Mapping[int, Find], task: RepairTask, known: Known | None = None
) -> Stepwise[Repaired]:
    """Choose and refit one layer's neurons for every cluster, with one cluster weight and one ridge for all of them.

    Both are the candidates with the lowest cost on the validation tokens; no repair at all is a candidate of "auto", so
    that a repair which other text rejects is never shipped. Without validation tokens they are the first.

    Args:
        finds: place -> finds the layer's tokens there.
        known: finds moments, where they are known; None to sum them over the tokens.
    """
    shared, homes = team.share(task), homes_of(task.calibration, team)
    if known is None:
        solved = _solve_summed(team, finds, task, shared, homes)
    else:
        solved = _solve_known(team, task, shared, homes, known)
    yield
    costs = _ask_costs(team, finds, task, shared, solved)
    yield
    weight, ridge = _best(task, costs)
    chosen = [team.call(homes[c], _STAGE, _choose, shared, solved[c], weight, ridge) for c in range(len(task.keeps))]
    yield
    found = [waiting.result() for waiting in chosen]
    return Repaired(
        neuron_ids=[ids for ids, _ in found],
        solutions=[solution for _, solution in found],
        ridge=task.ridges[ridge],
        cluster_weight=task.cluster_weights[weight],
    )


def _solve_known(
    team: Team, task: RepairTask, shared: Shared[RepairTask], homes: Mapping[int, int], known: Known
) -> dict[int, _Pending]:
    """Solve each cluster at its home."""
    everything = known(None) if len(task.keeps) > 1 else None
    return {
        cluster: team.call(place, _STAGE, _solve_cluster, shared, cluster, known(cluster), everything)
        for cluster, place in homes.items()
    }


def _solve_summed(
    team: Team,
    finds: Mapping[int, Find],
    task: RepairTask,
    shared: Shared[RepairTask],
    homes: Mapping[int, int],
) -> dict[int, _Pending]:
    """Solve each cluster at its home, as soon as its moments are there."""
    num_values = num_packed(task.shape[0]) + task.shape[0] * task.shape[1]
    own = partial(ask_moments, team, _STAGE, finds, task.calibration, centred=task.has_bias)
    found = None
    if len(homes) * num_values * 4 <= task.moment_bytes * team.size:
        found = {cluster: own(cluster) for cluster in homes}
    overall = ask_overall(team, _STAGE, finds, task.calibration, found, homes, centred=task.has_bias)

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
    worker: Worker, shared: Shared[RepairTask], cluster: int, own: _Source, overall: _Source | None
) -> list[_Solved]:
    """One cluster's neurons and solutions for each cluster weight."""
    task, found = shared.value(), []
    moments = [item if isinstance(item, Moments) else item(worker) for item in (own, overall) if item is not None]
    down = task.own(worker)
    for weight in task.cluster_weights:
        mixed = moments[0] if len(moments) == 1 else weighted_sum(moments, [weight, 1 - weight])
        system = _system(mixed, task, down)
        if task.neuron_ids is None:
            neuron_ids = remove_neurons(system, task.metric, keep=task.keeps[cluster]).neuron_ids
        else:
            neuron_ids = task.neuron_ids[cluster]
        found.append(_Solved(neuron_ids=neuron_ids, solutions=_solutions(system, mixed, task, neuron_ids)))
    return found


def _choose(
    worker: Worker, shared: Shared[RepairTask], solved: list[_Solved], weight: int, ridge: int
) -> tuple[Ids, Solution]:
    task = shared.value()
    down, bias = solved[weight].solution(ridge, partial(task.own, worker))
    return solved[weight].neuron_ids, (down.to(task.dtype), bias)


def _ask_costs(
    team: Team, finds: Mapping[int, Find], task: RepairTask, shared: Shared[RepairTask], solved: Mapping[int, _Pending]
) -> list[Pending[Costs]]:
    """Ask for what candidates cost on each place's validation text, unless there is one of each."""
    if len(task.cluster_weights) == len(task.ridges) == 1:
        return []
    return [
        team.call(place, _STAGE, _validation_costs, finds[place], shared, cluster, solved[cluster])
        for cluster, places in enumerate(task.validation)
        for place in places
    ]


def _best(task: RepairTask, asked: Sequence[Pending[Costs]]) -> tuple[int, int]:
    """Numbers of the cluster weight and of the ridge that validation text likes best."""
    totals = np.zeros((len(task.cluster_weights), len(task.ridges)))
    for waiting in asked:
        for chunk in waiting.result():
            totals += np.array(chunk)
    costs = totals.tolist()
    weight = min(range(len(costs)), key=lambda number: min(costs[number]))
    return weight, min(range(len(task.ridges)), key=costs[weight].__getitem__)


def _system(moments: Moments, task: RepairTask, down: OwnDown) -> System:
    gram, cross = moments.gram, moments.cross
    if task.has_bias:
        gram = gram - torch.outer(moments.mean_activation, moments.mean_activation)
        cross = cross - torch.outer(moments.mean_activation, moments.mean_target)
    return System(gram=gram, cross=cross, own=down.weights, ridge=REMOVAL_RIDGE)


def _solutions(system: System, moments: Moments, task: RepairTask, neuron_ids: Ids) -> list[Solution | None]:
    """One cluster's solution for each candidate ridge."""
    index = torch.from_numpy(neuron_ids).long().to(system.gram.device)
    none = torch.zeros(task.shape[1], device=index.device)
    if len(neuron_ids) == task.shape[0]:
        return [None] * len(task.ridges)
    refitted = iter(solve(system, index, [ridge for ridge in task.ridges if ridge is not None]))
    solutions: list[Solution | None] = []
    for ridge in task.ridges:
        if ridge is None:
            solutions.append(None)
            continue
        matrix = next(refitted)
        bias = moments.mean_target - moments.mean_activation[index] @ matrix if task.has_bias else none
        solutions.append((matrix, bias))
    return solutions


@torch.inference_mode()
def _validation_costs(
    worker: Worker, find: Find, shared: Shared[RepairTask], cluster: int, solved: Sequence[_Solved]
) -> Costs:
    """What each candidate's output errors on a place's validation tokens of a cluster cost."""
    seen, task = find(worker), shared.value()
    own, rows = partial(task.own, worker), seen.rows.validation[cluster]
    return [_chunk_costs(seen.tokens, part, task, own, solved) for part in rows.split(_TOKEN_CHUNK)]


def _chunk_costs(
    tokens: LayerTokens,
    rows: torch.Tensor,
    task: RepairTask,
    own: Callable[[], OwnDown],
    solved: Sequence[_Solved],
) -> list[list[float]]:
    costs, target = [], tokens.targets[rows].float()
    for one in solved:
        index = torch.from_numpy(one.neuron_ids).long().to(rows.device)
        kept = tokens.activations.index_select(0, rows).index_select(1, index).float()
        solutions = (one.solution(ridge, own) for ridge in range(len(task.ridges)))
        errors = (target - bias - kept @ down for down, bias in solutions)
        costs.append([float(((error @ task.metric) * error).sum()) for error in errors])
    return costs
