"""Stage `reconstruct` of a mixture of experts: each expert of each layer is refitted for itself, on the dense model.

Sums of one expert at a time are in memory, and what comes of it: its down projection for all clusters and ridges.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.manifest import ModelRecord
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.prune.dealt import DealtText, deal_text
from coreinfer.compiler.prune.layer_repair import (
    NarrowInputs,
    Results,
    candidate_ridges,
    candidate_weights,
    find_results,
    own_result,
    store_results,
)
from coreinfer.compiler.prune.layer_results import LayerResult
from coreinfer.compiler.prune.narrow import CLUSTERS, bf16_bits
from coreinfer.compiler.team.adding import add_arrays, add_up
from coreinfer.compiler.team.dealing import home, in_turn
from coreinfer.compiler.team.passage import WALK
from coreinfer.compiler.team.team import Pending, forget

from .expert_repair import ExpertTask, Solved, SolvedExpert, expert_costs, expert_sums, solve_expert

__all__ = ["narrow_experts"]

_STAGE = "reconstruct"

Costs = npt.NDArray[np.float64]


def narrow_experts(inputs: NarrowInputs, cache: Cache, keys: Sequence[str], progress: Progress) -> list[Results]:
    """Repair all layers; each one's result is kept in the cache under its key as soon as it is computed."""
    text = deal_text(inputs.team, inputs.calibration, inputs.validation, inputs.assignments)
    results = []
    with progress.stage(_STAGE, len(keys)) as advance:
        for layer, key in enumerate(keys):
            if (found := find_results(inputs, cache, key)) is None:
                found = store_results(cache, key, _narrow_layer(inputs, text, layer))
            results.append(found)
            advance()
        forget(inputs.team, _STAGE, WALK)
    return results


def _narrow_layer(inputs: NarrowInputs, text: DealtText, layer: int) -> Results:
    results = Results()
    for item in inputs.assignments:
        results[item.name] = _repair_layer(inputs, text, layer, item.name, results.get(CLUSTERS))
    return results


def _repair_layer(
    inputs: NarrowInputs, text: DealtText, layer: int, name: str, clusters: LayerResult | None
) -> LayerResult:
    """Repair one layer's experts for one assignment, with one cluster weight and one ridge for all of them.

    Args:
        clusters: the clusters' result, for a control, which goes by what they chose for themselves.
    """
    left = own_result(inputs, name, layer)
    keeps_all = min(map(len, left.neuron_ids)) == inputs.loaded.record.ffn_dim
    removes = inputs.config.effective_removal == "second-order"
    if keeps_all or (clusters is not None and clusters.ridge is None and not removes):
        return left
    weights = candidate_weights(inputs.config) if clusters is None else (clusters.cluster_weight,)
    ridges = candidate_ridges(inputs.config) if clusters is None else (clusters.ridge,)
    solved, costs = _solve(inputs, text, layer, _tasks(inputs, text, layer, name, weights, ridges))
    best = int(np.argmin(costs))
    of_clusters = [[expert[cluster][best] for expert in solved] for cluster in range(len(left.neuron_ids))]
    return _result(inputs.loaded.record, of_clusters, weights[best // len(ridges)], ridges[best % len(ridges)])


def _result(
    record: ModelRecord, solved: Sequence[Sequence[SolvedExpert]], cluster_weight: float, ridge: float | None
) -> LayerResult:
    """Put the experts of each cluster one after another; those that a cluster lacks have no neurons and no bias."""
    starts = record.expert_neurons * np.arange(len(solved[0]), dtype=np.int32)
    neuron_ids = tuple(
        np.concatenate([one.neuron_ids + start for one, start in zip(experts, starts, strict=True)])
        for experts in solved
    )
    if ridge is None:
        return LayerResult(neuron_ids=neuron_ids, ridge=None, cluster_weight=cluster_weight)
    there = [[one for one in experts if len(one.neuron_ids)] for experts in solved] if record.ffn_bias else []
    biases = [np.stack([one.bias.cpu().numpy() for one in experts]) for experts in there]
    return LayerResult(
        neuron_ids=neuron_ids,
        ridge=ridge,
        cluster_weight=cluster_weight,
        downs=tuple(bf16_bits(torch.cat([one.down for one in experts])) for experts in solved),
        biases=tuple(biases),
    )


def _tasks(
    inputs: NarrowInputs,
    text: DealtText,
    layer: int,
    name: str,
    cluster_weights: Sequence[float],
    ridges: Sequence[float | None],
) -> list[ExpertTask]:
    record = inputs.loaded.record
    assert record.experts is not None
    num_experts, inner = record.experts.num_experts, record.expert_neurons
    bounds = inner * np.arange(1, num_experts)
    choices = [layers[layer] for layers in inputs.choices[name].neuron_ids]
    kept = [np.split(ids % inner, np.searchsorted(ids, bounds)) for ids in choices]
    return [
        ExpertTask(
            name=name,
            layer=layer,
            expert=expert,
            neuron_ids=[ids[expert] for ids in kept],
            removes=inputs.config.effective_removal == "second-order",
            num_tokens=[sum(places.values()) for places in text.calibration_tokens[name]],
            cluster_weights=cluster_weights,
            ridges=ridges,
        )
        for expert in range(num_experts)
    ]


def _solve(
    inputs: NarrowInputs, text: DealtText, layer: int, tasks: Sequence[ExpertTask]
) -> tuple[list[Solved], Costs]:
    """Solve one expert after another.

    Returns:
        Each one's solutions, and what all experts' errors on the validation text cost by each.
    """
    team, metric = inputs.team, inputs.team.share(inputs.metrics[layer])

    def ask(task: ExpertTask) -> tuple[Pending[Solved], list[Pending[Costs]]]:
        shared = team.share(task)
        parts = {place: team.call(place, _STAGE, expert_sums, own, shared) for place, own in text.texts.items()}
        total = add_up(team, _STAGE, add_arrays, parts)
        solved = team.call(home(team, task.expert), _STAGE, solve_expert, shared, metric, total)
        if len(task.cluster_weights) == len(task.ridges) == 1:
            return solved, []
        costs = [
            team.call(place, _STAGE, expert_costs, own, shared, metric, solved) for place, own in text.texts.items()
        ]
        return solved, costs

    found, totals = [], np.zeros(len(tasks[0].cluster_weights) * len(tasks[0].ridges))
    for _, (solved, costs) in in_turn(team, tasks, ask):
        found.append(solved.result())
        totals += sum(cost.result() for cost in costs)
    return found, totals
