"""Stage `reconstruct` of one expert: choose the neurons that stay, and refit its down projection on them.

An expert that is given h puts out w (h W + b), where w is what the router multiplies it by. Over the tokens that chose
it, G = sum w^2 h h^T is its Gram matrix, and what it should put out is linear in h, so that the kept rows become
W' = (G_SS + lam I)^-1 (G_S W + lam W_S), S being the neurons that stay. Where experts have biases, h is centred by its
mean, weighed with w^2 as well, and the bias takes up the difference. Sums of a cluster and of all text are divided by
all their tokens, those that chose other experts among them, and mixed: what an expert hardly does in a cluster counts
little there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.contract import expert_role
from coreinfer.compiler.prune.dealt import PlaceText, own_rows
from coreinfer.compiler.prune.own_down import OwnDown
from coreinfer.compiler.prune.products import packed_gram
from coreinfer.compiler.prune.removal import REMOVAL_RIDGE, System, remove_neurons, solve
from coreinfer.compiler.prune.triangle import unpack_upper
from coreinfer.compiler.team.adding import Arrays
from coreinfer.compiler.team.team import Shared, Worker

from .expert_text import ExpertTokens, expert_tokens

__all__ = [
    "ExpertTask",
    "RefitProblem",
    "Solved",
    "SolvedExpert",
    "expert_costs",
    "expert_sums",
    "own_expert_down",
    "refit_problem",
    "solve_expert",
    "sums_over",
]

_TOKEN_CHUNK = 8192

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class ExpertTask:
    """One expert, for all clusters of one assignment.

    Attributes:
        name: of the assignment.
        neuron_ids: of each cluster, the expert's neurons that stay by their scores, ascending; none where it lacks it.
        removes: whether as many are chosen by second order instead, where enough tokens chose the expert.
        num_tokens: of each cluster, calibration tokens, whichever experts they chose.
        cluster_weights: candidates for the weight of the cluster's sums against those of all text.
        ridges: candidates, relative to the mean diagonal of the Gram matrix; None stands for no repair.
    """

    name: str
    layer: int
    expert: int
    neuron_ids: Sequence[Ids]
    removes: bool
    num_tokens: Sequence[int]
    cluster_weights: Sequence[float]
    ridges: Sequence[float | None]


@dataclass(frozen=True, kw_only=True)
class SolvedExpert:
    """One cluster's solution by one cluster weight and one ridge.

    Attributes:
        neuron_ids: (kept,) of the expert, ascending.
        down: (kept, hidden size) bfloat16, as it is stored: the down projection, transposed.
        bias: (hidden size,) float32; zero where experts have none.
    """

    neuron_ids: Ids
    down: torch.Tensor
    bias: torch.Tensor


Solved = list[list[SolvedExpert]]
"""Of each cluster, its solutions: all ridges by the first cluster weight, then by the next."""


@torch.inference_mode()
def expert_sums(worker: Worker, text: Shared[PlaceText], task: Shared[ExpertTask]) -> Arrays:
    """A place's sums over the calibration tokens that chose an expert, cluster by cluster.

    Returns:
        grams (clusters, packed), means (clusters, neurons), masses, the sums of w^2, and counts (clusters,).
    """
    asked = task.value()
    tokens = expert_tokens(worker, text.value().passage, asked.layer, asked.expert)
    clusters = own_rows(worker, text.value(), asked.name).calibration
    parts = [sums_over(tokens, _places_in(tokens, rows)) for rows in clusters]
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


def _places_in(tokens: ExpertTokens, rows: torch.Tensor) -> torch.Tensor:
    """Which of an expert's tokens are among some rows of all tokens."""
    return torch.isin(tokens.rows, rows).nonzero()[:, 0]


def sums_over(tokens: ExpertTokens, places: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums over some places among the tokens that chose an expert, as `expert_sums` has them of each cluster."""
    weighted, weights = tokens.weighted[places], tokens.weights[places]
    return {
        "grams": packed_gram(weighted),
        "means": weights @ weighted.float(),
        "masses": weights.square().sum(),
        "counts": weights.new_tensor(len(places)),
    }


@torch.inference_mode()
def solve_expert(worker: Worker, task: Shared[ExpertTask], metric: Shared[torch.Tensor], sums: Arrays) -> Solved:
    """Solve for each cluster.

    Args:
        metric: (hidden size, hidden size) what output errors cost.
        sums: of `expert_sums`, of all places.
    """
    asked = task.value()
    own, costs = own_expert_down(worker, asked.layer, asked.expert), metric.value().to(worker.loaded.device)
    return [_solve_cluster(asked, own, costs, sums, cluster) for cluster in range(len(asked.neuron_ids))]


def own_expert_down(worker: Worker, layer: int, expert: int) -> OwnDown:
    """Find the down projection of one of the model's own experts."""
    tensors = worker.loaded.mixture(layer).tensors
    bias = tensors.get(expert_role(expert, "down_bias"))
    return OwnDown(
        weights=tensors[expert_role(expert, "down")].float().T.contiguous(),
        bias=None if bias is None else bias.float(),
    )


def _solve_cluster(
    task: ExpertTask, own: OwnDown, metric: torch.Tensor, sums: Arrays, cluster: int
) -> list[SolvedExpert]:
    """A cluster in which fewer tokens chose the expert than neurons stay goes by the sums of all text alone.

    Where even all text has fewer, or all neurons stay, the expert's own rows are left; none where the cluster lacks it.
    """
    ids, counts = task.neuron_ids[cluster], sums["counts"]
    if len(ids) in (0, len(own.weights)) or float(counts.sum()) < len(ids):
        return [_own_rows(own, ids)] * (len(task.cluster_weights) * len(task.ridges))
    is_few = float(counts[cluster]) < len(ids)
    found: list[SolvedExpert] = []
    for weight in task.cluster_weights:
        problem = refit_problem(_mix(sums, task.num_tokens, cluster, 0.0 if is_few else weight), own)
        kept = remove_neurons(problem.system, metric, keep=len(ids)).neuron_ids if task.removes else ids
        found += _solutions(problem, own, kept, task.ridges)
    return found


def _own_rows(own: OwnDown, ids: Ids) -> SolvedExpert:
    down, bias = own.rows(torch.from_numpy(ids))
    return SolvedExpert(neuron_ids=ids, down=down.to(torch.bfloat16), bias=bias)


def _mix(sums: Arrays, num_tokens: Sequence[int], cluster: int, weight: float) -> Arrays:
    """Means over a cluster's tokens and over all tokens, mixed."""
    own, rest = weight / max(1, num_tokens[cluster]), (1 - weight) / max(1, sum(num_tokens))
    return {name: own * values[cluster] + rest * values.sum(dim=0) for name, values in sums.items()}


@dataclass(frozen=True, kw_only=True)
class RefitProblem:
    """The least squares problem of an expert in a cluster, and the mean of its activations."""

    system: System
    mean: torch.Tensor


def refit_problem(mixed: Arrays, own: OwnDown) -> RefitProblem:
    """Make it of sums of `expert_sums`, divided by tokens."""
    gram = unpack_upper(mixed["grams"], len(own.weights))
    mean = mixed["means"] / mixed["masses"].clamp_min(1e-30)
    if own.bias is not None:
        gram -= mixed["masses"] * torch.outer(mean, mean)
    system = System(gram=gram, cross=gram @ own.weights, own=own.weights, ridge=REMOVAL_RIDGE)
    return RefitProblem(system=system, mean=mean)


def _solutions(problem: RefitProblem, own: OwnDown, ids: Ids, ridges: Sequence[float | None]) -> list[SolvedExpert]:
    """One for each ridge."""
    index, left = torch.from_numpy(ids).long().to(own.weights.device), _own_rows(own, ids)
    fitted = iter(solve(problem.system, index, [ridge for ridge in ridges if ridge is not None]))
    found = []
    for ridge in ridges:
        if ridge is None:
            found.append(left)
            continue
        down, bias = next(fitted), left.bias
        if own.bias is not None:
            bias = own.bias + problem.mean @ own.weights - problem.mean[index] @ down
        found.append(SolvedExpert(neuron_ids=ids, down=down.to(torch.bfloat16), bias=bias))
    return found


@torch.inference_mode()
def expert_costs(
    worker: Worker, text: Shared[PlaceText], task: Shared[ExpertTask], metric: Shared[torch.Tensor], solved: Solved
) -> npt.NDArray[np.float64]:
    """What output errors of each solution cost on a place's validation tokens, of all clusters: (solutions,)."""
    asked = task.value()
    tokens = expert_tokens(worker, text.value().passage, asked.layer, asked.expert)
    own = own_expert_down(worker, asked.layer, asked.expert)
    matrix, costs = metric.value().to(worker.loaded.device), np.zeros(len(solved[0]))
    for rows, solutions in zip(own_rows(worker, text.value(), asked.name).validation, solved, strict=True):
        for part in _places_in(tokens, rows).split(_TOKEN_CHUNK):
            errors = _errors(tokens.weighted[part].float(), tokens.weights[part], own, solutions)
            costs += [float(((error @ matrix) * error).sum()) for error in errors]
    return costs


def _errors(
    weighted: torch.Tensor, weights: torch.Tensor, own: OwnDown, solutions: Sequence[SolvedExpert]
) -> Iterator[torch.Tensor]:
    """What is missing of an expert's outputs by each solution: (tokens, hidden size)."""
    wanted = weighted @ own.weights
    for solution in solutions:
        index = torch.from_numpy(solution.neuron_ids).long().to(weighted.device)
        error = wanted - weighted[:, index] @ solution.down.float()
        if own.bias is not None:
            error += torch.outer(weights, own.bias - solution.bias)
        yield error
