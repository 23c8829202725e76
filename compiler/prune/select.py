"""Stage `select`: layer budgets, scores, neuron ids."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.manifest import ModelRecord
from coreinfer.bundles.statistics import scores_from_statistic, select_in_parts
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.samples import NEURON_BLOCK

from .mixtures.experts import expert_budgets
from .profile import Profile

__all__ = ["Choice", "choose_neurons", "cheapest_budgets", "cluster_scores", "layer_budgets"]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What one assignment of documents to clusters keeps.

    Attributes:
        scores: (clusters, layers, ffn_dim), root mean square 1 over each layer.
        neuron_ids: neuron_ids[cluster][layer] is an ascending int32 array; of a mixture whose experts stay whole, their
            numbers, as `ffn_dim` is how many there are.
        lists_experts: whether clusters have some of a mixture's experts, with as many neurons each, and say which.
    """

    scores: Floats
    neuron_ids: list[list[npt.NDArray[np.int32]]]
    lists_experts: bool = False

    def experts_of(self, record: ModelRecord, cluster: int, layer: int) -> list[int]:
        """The experts, ascending, of which a cluster has neurons in a layer."""
        return [int(number) for number in np.unique(self.neuron_ids[cluster][layer] // record.expert_neurons)]

    def keeps_whole_experts(self, record: ModelRecord) -> bool:
        """Whether what is kept of a mixture are experts, not neurons of each."""
        return record.experts is not None and self.scores.shape[-1] == record.experts.num_experts


def layer_budgets(
    config: CompileConfig,
    keep: float,
    profile: Profile,
    column_norms: Floats,
    curves: Floats | None = None,
    record: ModelRecord | None = None,
) -> list[int]:
    """Decide how many neurons each layer keeps: multiples of 32 that together make the keep ratio.

    Args:
        keep: the keep ratio in all; that of the options is what was asked for.
        curves: of `removal_curves`; only for budgets "sensitivity".
        record: of the model; budgets of a mixture are numbers of experts, or neurons of all its experts together.
    Raises:
        ConfigError: the floor leaves no room for the keep ratio.
    """
    if record is None or record.experts is None:
        energies = (profile.relative_energies * np.square(column_norms)).sum(axis=1)
        return _budgets(config, keep, energies, column_norms.shape[1], curves)
    if config.experts == "whole":
        return expert_budgets(config, keep, profile.relative_energies, record.experts)
    if config.experts == "both":
        # Divided later, by what is lost, all layers together or each for itself.
        if config.budget_mb is not None:
            return _whole_blocks(keep, record, record.experts.num_experts)
        return [round(keep * record.ffn_dim)] * record.num_layers
    widths = _budgets(config, keep, profile.relative_energies.sum(axis=1), record.expert_neurons, None)
    return [width * record.experts.num_experts for width in widths]


def _whole_blocks(keep: float, record: ModelRecord, num_experts: int) -> list[int]:
    """Neurons of all experts of each layer, where layers share the blocks of an expert that a keep ratio has."""
    per_layer = -(-record.expert_neurons // NEURON_BLOCK)
    each, left = divmod(round(keep * record.num_layers * per_layer), record.num_layers)
    blocks = [each + (layer < left) for layer in range(record.num_layers)]
    return [num_experts * min(record.expert_neurons, NEURON_BLOCK * own) for own in blocks]


def _budgets(config: CompileConfig, keep: float, energies: Floats, ffn_dim: int, curves: Floats | None) -> list[int]:
    """Budget layers of `ffn_dim` neurons, or the experts of each; `energies` (layers,) are what FFNs put out."""
    num_layers = len(energies)
    if keep == 1 or ffn_dim <= NEURON_BLOCK:
        return [ffn_dim] * num_layers
    if config.effective_budgets == "uniform":
        # A budget is a maximum: what is rounded up in each layer would be more than it.
        return [_to_block(keep * ffn_dim, ffn_dim, at_most=config.budget_mb is not None)] * num_layers
    if config.min_layer_keep > keep:
        raise ConfigError(
            f"--min-layer-keep {config.min_layer_keep:g}: expected at most --keep {keep:g}; lower one of them"
        )
    if config.effective_budgets == "sensitivity":
        assert curves is not None
        return cheapest_budgets(curves, keep, config.min_layer_keep, ffn_dim)
    # Every layer keeps a block at least, which must not come on top of the keep ratio.
    floor = max(config.min_layer_keep, min(keep, NEURON_BLOCK / ffn_dim))
    shares = _proportional_shares(np.sqrt(energies.astype(np.float64)), keep, floor)
    return _round_to_blocks(shares * ffn_dim, ffn_dim)


def cheapest_budgets(curves: Floats, keep: float, floor: float, ffn_dim: int) -> list[int]:
    """Remove blocks where they cost least, until the keep ratio is reached.

    Layers are gone through along the lower convex hulls of their curves, so that a cheap stretch after an expensive
    block is found too; the sum of all curves is then minimal for that many blocks, except in the last stretch.

    Args:
        curves: (layers, removed blocks + 1) cost of removing this many blocks of a layer.
        keep, floor: kept neurons / all neurons, of all layers together, and the minimum of each layer.
    """
    num_layers = len(curves)
    least_kept = max(NEURON_BLOCK, math.ceil(floor * ffn_dim / NEURON_BLOCK - 1e-9) * NEURON_BLOCK)
    most_removed = min(curves.shape[1] - 1, max(0, (ffn_dim - least_kept) // NEURON_BLOCK))
    stretches = [
        (slope, layer, size)
        for layer in range(num_layers)
        for slope, size in _hull(np.maximum.accumulate(curves[layer, : most_removed + 1]))
    ]
    total = round(num_layers * ffn_dim * (1 - keep) / NEURON_BLOCK)
    removed = [0] * num_layers
    # A hull's slopes grow, so that sorting keeps each layer's stretches in order.
    for _, layer, size in sorted(stretches, key=lambda stretch: stretch[0]):
        removed[layer] += min(size, total - sum(removed))
    return [ffn_dim - NEURON_BLOCK * blocks for blocks in removed]


def _hull(costs: Floats) -> list[tuple[float, int]]:
    """Slopes and lengths of the lower convex hull of a rising curve, from its start."""
    stretches, start = [], 0
    while start < len(costs) - 1:
        ends = np.arange(start + 1, len(costs))
        slopes = (costs[ends] - costs[start]) / (ends - start)
        # Of equal slopes the farthest, so that slopes strictly grow.
        best = int(len(slopes) - 1 - np.argmin(slopes[::-1]))
        stretches.append((float(slopes[best]), int(ends[best] - start)))
        start = int(ends[best])
    return stretches


def _to_block(num_neurons: float, ffn_dim: int, *, at_most: bool) -> int:
    blocks = num_neurons / NEURON_BLOCK
    # Blocks of all layers are a whole number, which one layer's share of them misses by rounding.
    whole = math.floor(blocks + 1e-6) if at_most else round(blocks)
    return min(ffn_dim, max(NEURON_BLOCK, whole * NEURON_BLOCK))


def _proportional_shares(weights: npt.NDArray[np.float64], mean: float, floor: float) -> npt.NDArray[np.float64]:
    """Find shares clip(c * weights, floor, 1) whose mean is `mean`, by bisection on c: (layers,)."""
    weights = np.maximum(weights / max(float(weights.max()), 1e-30), 1e-9)
    low, high = 0.0, 1.0 / float(weights.min())
    for _ in range(100):
        middle = (low + high) / 2
        if np.clip(middle * weights, floor, 1.0).mean() < mean:
            low = middle
        else:
            high = middle
    return np.clip(high * weights, floor, 1.0)


def _round_to_blocks(wanted: npt.NDArray[np.float64], ffn_dim: int) -> list[int]:
    """Round to multiples of 32 with the same sum, by largest remainder; a layer's last block may be cut short."""
    budgets = np.maximum(np.floor(wanted / NEURON_BLOCK) * NEURON_BLOCK, NEURON_BLOCK)
    total = round(float(wanted.sum()) / NEURON_BLOCK) * NEURON_BLOCK
    for layer in np.argsort(-(wanted - budgets), kind="stable"):
        if budgets.sum() >= total:
            break
        budgets[layer] = min(budgets[layer] + NEURON_BLOCK, ffn_dim)
    return [int(budget) for budget in budgets]


def cluster_scores(
    config: CompileConfig,
    statistic: Floats,
    num_tokens: Any,
    column_norms: Floats,
    few: npt.NDArray[np.bool_] | None = None,
) -> Floats:
    """Score neurons from each cluster's moments mixed with those of all text.

    Args:
        statistic: (clusters, layers, ffn_dim) sums.
        num_tokens: (clusters,) tokens summed.
        column_norms: (layers, ffn_dim).
        few: (clusters, layers, ffn_dim) neurons that go by all text alone; None for no neuron.
    Returns:
        (clusters, layers, ffn_dim) float32.
    """
    overall = statistic.sum(axis=0) / max(1, int(num_tokens.sum()))
    scores = []
    for cluster, (cluster_sum, count) in enumerate(zip(statistic, num_tokens, strict=True)):
        weight: Any = config.effective_cluster_weight
        if few is not None:
            weight = np.where(few[cluster], 0.0, weight)
        mixed = weight * cluster_sum / max(1, int(count)) + (1 - weight) * overall
        scores.append(scores_from_statistic(config.selection, mixed.astype(np.float32), 1, column_norms))
    return np.stack(scores)


def choose_neurons(
    config: CompileConfig,
    statistic: Floats,
    num_tokens: Any,
    norms: Floats,
    budgets: Sequence[Sequence[int]],
    *,
    num_parts: int = 1,
    part_tokens: Floats | None = None,
) -> Choice:
    """Pick each cluster's neurons: the highest scores within each layer's budget.

    Args:
        budgets: budgets[cluster][layer].
        num_parts: equal parts of a layer, its experts, each of which keeps as many.
        part_tokens: (clusters, layers, parts) tokens of each part; where they are fewer than the neurons that it keeps,
            it keeps what all clusters have. None where all tokens are each part's.
    """
    few = None
    if part_tokens is not None:
        few = np.repeat(num_parts * part_tokens < np.array(budgets)[..., None], statistic.shape[2] // num_parts, axis=2)
    scores = cluster_scores(config, statistic, num_tokens, norms, few)
    neuron_ids = [select_in_parts(own, kept, num_parts) for own, kept in zip(scores, budgets, strict=True)]
    return Choice(scores=scores, neuron_ids=neuron_ids)
