"""Stages `select` and `reconstruct` for the clusters and for the controls, all at the same bytes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.families import ffn_tensors

from .cache import Cache, stage_key
from .config import CompileConfig
from .corpus import Document
from .layerwise import LayerActivations, walk_layers
from .models import LoadedModel
from .profiling import Profile
from .progress import Progress
from .repair import RIDGES, RepairTask, mean_gram, repair_layer
from .selecting import Choice, choose_neurons

__all__ = ["CLUSTERS", "Assignment", "NarrowModel", "RepairInputs", "choose_all", "narrow_layer", "repair_all"]

CLUSTERS = "clusters"
"""Name of the assignment that is shipped; the others are controls."""

_GRAM_BYTES = 4 << 30
"""Gram matrices of all clusters are held in memory up to this size, and made twice beyond it."""

Labels = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint16]


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """One way to put documents into clusters.

    Attributes:
        name: "clusters", or the control's name.
        calibration, validation, held_out: (documents,) cluster ids of each part of the corpus.
    """

    name: str
    calibration: Labels
    validation: Labels
    held_out: Labels


@dataclass(frozen=True, kw_only=True)
class NarrowModel:
    """The narrow FFNs of one assignment.

    Attributes:
        choice: scores and neuron ids.
        downs: downs[layer][cluster] is the repaired down projection (kept, hidden size) as bfloat16 bits, or None.
        ridges: ridge of each layer, None where the repair was rejected.
    """

    choice: Choice
    downs: list[list[Bits | None]]
    ridges: tuple[float | None, ...]


def choose_all(
    config: CompileConfig,
    profile: Profile,
    loaded: LoadedModel,
    assignments: Sequence[Assignment],
    budgets: list[int],
) -> dict[str, Choice]:
    """Choose neurons for every assignment, with the same budgets."""
    return {
        item.name: choose_neurons(
            config, profile.statistics[item.name], profile.num_tokens[item.name], loaded.column_norms, budgets
        )
        for item in assignments
    }


@dataclass(frozen=True, kw_only=True)
class RepairInputs:
    """What the down projections are refitted from.

    Attributes:
        calibration, validation: documents; the assignments say which cluster each belongs to.
        assignments: the clusters first, then the controls.
        choices: assignment name -> neurons.
    """

    config: CompileConfig
    loaded: LoadedModel
    calibration: Sequence[Document]
    validation: Sequence[Document]
    assignments: Sequence[Assignment]
    choices: dict[str, Choice]


def repair_all(inputs: RepairInputs, cache: Cache, key: str, progress: Progress) -> dict[str, NarrowModel]:
    """Refit the down projections, layer by layer; each layer's result is cached as soon as it is there."""
    num_layers = inputs.loaded.record.num_layers
    if inputs.config.reconstruct:
        repaired = _repaired_layers(inputs, cache, key, progress)
    else:
        repaired = [_unrepaired(inputs.choices)] * num_layers
    return {name: _collect(name, choice, repaired) for name, choice in inputs.choices.items()}


def _repaired_layers(inputs: RepairInputs, cache: Cache, key: str, progress: Progress) -> list[dict[str, Any]]:
    num_layers = inputs.loaded.record.num_layers
    keys = [stage_key("repair", upstream=key, layer=layer) for layer in range(num_layers)]
    results = [cache.find_arrays(layer_key) or {} for layer_key in keys]
    if all(results):
        return results
    documents = [*inputs.calibration, *inputs.validation]
    with progress.stage("reconstruct", num_layers) as advance:
        for layer in walk_layers(inputs.loaded, documents, advance):
            if not results[layer.layer]:
                results[layer.layer] = cache.arrays(keys[layer.layer], partial(_repair_one_layer, inputs, layer))
    return results


def _repair_one_layer(inputs: RepairInputs, layer: LayerActivations) -> dict[str, Any]:
    ids = {name: [layers[layer.layer] for layers in choice.neuron_ids] for name, choice in inputs.choices.items()}
    if len(ids[CLUSTERS][0]) == inputs.loaded.record.ffn_dim:
        return _unrepaired(inputs.choices)
    weights = inputs.loaded.projection(layer.layer, "down").weight.detach().float().T.contiguous()
    main, controls = inputs.assignments[0], inputs.assignments[1:]
    task = RepairTask(
        neuron_ids=ids[main.name],
        validation=_members(main.validation, len(main.calibration), len(ids[main.name])),
        cluster_weight=_repair_weight(inputs.config),
    )
    grams, overall = _cluster_grams(layer, _members(main.calibration, 0))
    solutions, ridge = repair_layer(layer, weights, task, _ridges(inputs.config), grams, overall)
    if ridge is None:
        return _unrepaired(inputs.choices)
    arrays = _as_arrays(main.name, solutions, ridge)
    for item in controls:
        # Asked to choose for themselves, controls chose the same ridge in nearly every layer (docs/log.md).
        task = RepairTask(neuron_ids=ids[item.name], validation=(), cluster_weight=task.cluster_weight)
        own = _control_grams(layer, item, overall)
        solutions, _ = repair_layer(layer, weights, task, (ridge,), own, overall)
        arrays |= _as_arrays(item.name, solutions, ridge)
    return arrays


def _cluster_grams(
    layer: LayerActivations, clusters: Sequence[Sequence[int]]
) -> tuple[Iterable[torch.Tensor], torch.Tensor]:
    """Mean of h h^T over each cluster's documents, and over all: each cluster's are summed only once if they fit."""
    if len(clusters) * layer.activations.shape[1] ** 2 * 4 > _GRAM_BYTES:
        everything = [document for documents in clusters for document in documents]
        return (mean_gram(layer, documents) for documents in clusters), mean_gram(layer, everything)
    grams = [mean_gram(layer, documents) for documents in clusters]
    return grams, _weighted_mean(grams, [_num_tokens(layer, documents) for documents in clusters])


def _ridges(config: CompileConfig) -> tuple[float, ...]:
    return RIDGES if config.ridge == "auto" else (float(config.ridge),)


def _unrepaired(names: Iterable[str]) -> dict[str, Any]:
    """Say for the cache that a layer keeps its own weights under every assignment."""
    return {f"{name}.ridge": np.array([np.nan]) for name in names}


def _as_arrays(name: str, solutions: Sequence[torch.Tensor], ridge: float) -> dict[str, Any]:
    """Name one assignment's results for the cache."""
    repaired = {f"{name}.{cluster}": bf16_bits(solution) for cluster, solution in enumerate(solutions)}
    return {f"{name}.ridge": np.array([ridge]), **repaired}


def _repair_weight(config: CompileConfig) -> float:
    """Gram matrices of one cluster alone are too thin for a repair, whatever the scores are made of."""
    return 0.3 if config.cluster_weight is None else config.cluster_weight


def _members(labels: Labels, offset: int, num_clusters: int | None = None) -> list[list[int]]:
    """Documents of each cluster, as indices into the activations, where this part begins at `offset`."""
    count = int(labels.max()) + 1 if num_clusters is None else num_clusters
    return [(np.flatnonzero(labels == cluster) + offset).tolist() for cluster in range(count)]


def _num_tokens(layer: LayerActivations, documents: Sequence[int]) -> int:
    return int(sum(layer.starts[index + 1] - layer.starts[index] for index in documents))


def _weighted_mean(grams: Sequence[torch.Tensor], num_tokens: Sequence[int]) -> torch.Tensor:
    total = torch.zeros_like(grams[0])
    for gram, count in zip(grams, num_tokens, strict=True):
        total += gram * (count / max(1, sum(num_tokens)))
    return total


def _control_grams(layer: LayerActivations, item: Assignment, overall: torch.Tensor) -> Iterator[torch.Tensor]:
    """Gram matrices of a control's clusters, made one at a time; one cluster for all has that of all text."""
    members = _members(item.calibration, 0)
    if len(members) == 1:
        yield overall
    else:
        yield from (mean_gram(layer, documents) for documents in members)


def _collect(name: str, choice: Choice, repaired: Sequence[dict[str, Any]]) -> NarrowModel:
    num_clusters = len(choice.neuron_ids)
    ridges = [float(arrays[f"{name}.ridge"][0]) for arrays in repaired]
    return NarrowModel(
        choice=choice,
        downs=[[arrays.get(f"{name}.{cluster}") for cluster in range(num_clusters)] for arrays in repaired],
        ridges=tuple(None if np.isnan(ridge) else ridge for ridge in ridges),
    )


def bf16_bits(values: torch.Tensor) -> Bits:
    """Round a tensor to bfloat16 and give its bit patterns."""
    bits: Bits = values.to(torch.bfloat16).contiguous().view(torch.int16).cpu().numpy().view(np.uint16)
    return bits


def narrow_layer(loaded: LoadedModel, narrow: NarrowModel, layer: int, cluster: int) -> dict[str, torch.Tensor]:
    """Cut one layer's FFN down to a cluster's neurons.

    Returns:
        Role -> tensor as `assign_ffn` takes them: gate and up (kept, hidden), down (hidden, kept), biases.
    """
    dense = ffn_tensors(loaded.layers[layer], loaded.family)
    ids = torch.from_numpy(narrow.choice.neuron_ids[cluster][layer]).long().to(loaded.device)
    tensors = {role: tensor[ids] for role, tensor in dense.items() if role not in ("down", "down_bias")}
    repaired = narrow.downs[layer][cluster]
    if repaired is None:
        tensors["down"] = dense["down"][:, ids]
    else:
        bits = torch.from_numpy(repaired.view(np.int16)).view(torch.bfloat16)
        tensors["down"] = bits.T.to(device=loaded.device, dtype=dense["down"].dtype).contiguous()
    if "down_bias" in dense:
        tensors["down_bias"] = dense["down_bias"]
    return tensors
