"""Fewer experts and narrower ones: how many of a layer's experts a cluster has, and how wide these are.

A layer's neurons are divided as what is lost says: an expert more takes room that would have made the others wider. All
divisions of a layer's budget into experts of one width are compared by two costs that `expert_losses` measures on the
cluster's text: what the layer's output loses where the router has to do without the experts that are left out, and what
those that stay lose at their width.

Where the bytes that a token reads are given, widths alone decide about these: an expert that is left out saves a token
nothing. There the layers' widths are divided as is lost, and then experts go that hardly add to it, for packs to be
small.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from coreinfer.bundles.manifest import ExpertsRecord
from coreinfer.bundles.statistics import select_of_parts
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.prune.profile import Profile
from coreinfer.compiler.prune.select import Choice, cluster_scores
from coreinfer.compiler.samples import NEURON_BLOCK

__all__ = [
    "Split",
    "SplitLosses",
    "choose_listed",
    "cluster_splits",
    "expert_energies",
    "expert_orders",
    "expert_widths",
    "mean_splits",
    "tried_counts",
]

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

_HARDLY = 0.1
"""An expert to which a cluster's tokens give less than this part of an even share of the router's weight goes first."""
_MARGIN = 0.02
"""Part of what a division by bytes a token loses that packs may lose more, for fewer experts."""
_TIE = 1e-9
_MOST_COUNTS = 16
"""Numbers of experts that are tried at most; what others cost is interpolated."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """How many experts a layer has, and how many neurons each."""

    num_experts: int
    width: int

    @property
    def num_neurons(self) -> int:
        """Of all of them."""
        return self.num_experts * self.width


@dataclass(frozen=True, kw_only=True)
class SplitLosses:
    """What fewer experts, and narrower ones, cost the clusters of an assignment: halves of d^T F d a token.

    Attributes:
        num_tokens: (clusters,) calibration tokens.
        orders: (clusters, layers, experts) numbers of experts; those that stay longest are first.
        counts: (counts,) ascending, numbers of experts that were tried, from a token's to all.
        left_out: (clusters, layers, counts) what a layer's output loses where it has only the first so many.
        widths: (widths,) ascending, neurons of an expert up to all.
        narrowed: (clusters, layers, experts, widths) what each expert, by its number, loses at a width.
        tokens: (clusters, layers, experts) tokens that chose each.
    """

    num_tokens: Ids
    orders: Ids
    counts: Ids
    left_out: Floats
    widths: Ids
    narrowed: Floats
    tokens: Floats

    def costs(self, cluster: int, layer: int) -> Floats:
        """What a layer costs a cluster by its numbers of experts, from one on, and their widths: (experts, widths)."""
        order, tokens = self.orders[cluster, layer], self.tokens[cluster, layer]
        missing = np.interp(np.arange(1, len(order) + 1), self.counts, self.left_out[cluster, layer])
        # Those that stay also serve the tokens of those that go.
        loads = tokens.sum() / np.maximum(1, tokens[order].cumsum())
        narrowed = self.narrowed[cluster, layer, order].cumsum(axis=0)
        return np.asarray(missing[:, None] + loads[:, None] * narrowed)


def tried_counts(experts: ExpertsRecord) -> Ids:
    """Numbers of experts to try, ascending."""
    return np.unique(np.linspace(experts.num_chosen, experts.num_experts, _MOST_COUNTS).round()).astype(np.int64)


def expert_widths(expert_neurons: int) -> Ids:
    """Widths of an expert: multiples of 32, and all of its neurons."""
    return np.array([*range(NEURON_BLOCK, expert_neurons, NEURON_BLOCK), expert_neurons], dtype=np.int64)


def expert_orders(config: CompileConfig, profile: Profile, name: str, num_experts: int) -> Ids:
    """Order the experts of an assignment's clusters by what they put out, cluster and all text mixed as for scores.

    Experts that a cluster hardly uses come last, whatever they do in other text.

    Returns:
        (clusters, layers, experts) numbers, those that stay longest first.
    """
    weight = config.effective_cluster_weight
    own = expert_energies(profile, name, num_experts)
    overall = profile.statistics[name].sum(axis=0).reshape(*own.shape[1:], -1).sum(axis=-1, dtype=np.float64)
    mixed = weight * own + (1 - weight) * overall / max(1, profile.num_tokens[name].sum())
    routed = profile.expert_weights[name].astype(np.float64)
    is_hardly_used = routed * num_experts < _HARDLY * routed.sum(axis=-1, keepdims=True)
    # The last key decides first.
    return np.lexsort((-mixed, is_hardly_used), axis=-1)


def expert_energies(profile: Profile, name: str, num_experts: int) -> Floats:
    """Mean statistic of each expert over a cluster's tokens: (clusters, layers, experts)."""
    statistic = profile.statistics[name]
    sums = statistic.reshape(*statistic.shape[:2], num_experts, -1).sum(axis=-1, dtype=np.float64)
    return np.asarray(sums / np.maximum(1, profile.num_tokens[name])[:, None, None])


def cluster_splits(config: CompileConfig, losses: SplitLosses, cluster: int, budgets: Sequence[int]) -> list[Split]:
    """Divide each layer's neurons for one cluster, as its text loses least.

    Args:
        budgets: (layers,) neurons; but for `uniform` ones their sum counts alone. Where the options have a budget of
            bytes a token, neurons of all experts, of which a layer may have fewer at that width.
    """
    costs = np.stack([losses.costs(cluster, layer) for layer in range(len(budgets))])
    return _divide(config, losses, costs, budgets)


def mean_splits(config: CompileConfig, losses: SplitLosses, budgets: Sequence[int]) -> list[Split]:
    """The same as all clusters together lose least: for prompts that choose for themselves."""
    costs = [
        np.average([losses.costs(cluster, layer) for cluster in range(len(losses.orders))], axis=0, weights=weights)
        for layer, weights in enumerate([np.maximum(1, losses.num_tokens)] * len(budgets))
    ]
    return _divide(config, losses, np.stack(costs), budgets)


def _divide(config: CompileConfig, losses: SplitLosses, costs: Floats, budgets: Sequence[int]) -> list[Split]:
    """Choose among all divisions of all layers, (layers, experts, widths) `costs`."""
    least, most = int(losses.counts[0]), int(losses.counts[-1])
    sizes = np.multiply.outer(np.arange(1, most + 1), losses.widths)
    floor = min(config.min_layer_keep * sizes[-1, -1], *budgets)
    is_allowed = (np.arange(1, most + 1) >= least)[:, None] & (sizes >= floor)
    open_costs = np.where(is_allowed, costs, np.inf)
    if config.budget_mb is None:
        chosen = _within(config, open_costs, sizes, budgets)
    else:
        chosen = _by_reading(config, losses.widths, open_costs, budgets)
    return [Split(num_experts=count + 1, width=int(losses.widths[width])) for count, width in chosen]


def _within(config: CompileConfig, costs: Floats, sizes: Ids, budgets: Sequence[int]) -> list[tuple[int, int]]:
    """Choose a division of each layer, all layers together or with `uniform` budgets each for itself.

    Args:
        costs: (layers, experts, widths), infinite where they are not allowed.
        sizes: (experts, widths).
        budgets: (layers,) of the layers' sizes.
    Returns:
        (layers,) places in `sizes`.
    """
    options = costs.reshape(len(costs), -1)
    parts = [options[layer : layer + 1] for layer in range(len(costs))]
    if config.effective_budgets == "uniform":
        chosen = [_cheapest(own, sizes.ravel(), budget)[0] for own, budget in zip(parts, budgets, strict=True)]
    else:
        chosen = _cheapest(options, sizes.ravel(), sum(budgets))
    return [divmod(place, sizes.shape[1]) for place in chosen]


def _by_reading(config: CompileConfig, widths: Ids, costs: Floats, budgets: Sequence[int]) -> list[tuple[int, int]]:
    """Choose by what a token reads, which is the width of as many experts as it uses, however many there are.

    The blocks of an expert that layers may have are divided so that least is lost. Then experts go while no more than a
    margin is lost beside that, for packs to be small; where all neurons fit, none goes.

    Args:
        widths: (widths,) neurons of an expert.
        costs: as `_within` takes them.
        budgets: (layers,) neurons of all experts at the width that a layer has if layers are alike.
    Returns:
        As `_within` does.
    """
    num_layers, most = costs.shape[:2]
    blocks = -(-widths // NEURON_BLOCK)
    room = [-(-budget // (NEURON_BLOCK * most)) for budget in budgets]
    if sum(room) >= num_layers * blocks[-1]:
        return [(most - 1, len(widths) - 1)] * num_layers
    chosen = _within(config, costs, np.broadcast_to(blocks, costs.shape[1:]), room)
    by_count = np.stack([own[:, width] for own, (_, width) in zip(costs, chosen, strict=True)])
    sizes = np.multiply.outer(widths[[width for _, width in chosen]], np.arange(1, most + 1))
    if config.effective_budgets == "uniform":
        counts = [_smallest(by_count[layer : layer + 1], sizes[layer : layer + 1])[0] for layer in range(num_layers)]
    else:
        counts = _smallest(by_count, sizes)
    return [(count, width) for count, (_, width) in zip(counts, chosen, strict=True)]


def _smallest(costs: Floats, sizes: Ids) -> list[int]:
    """Choose an option for each layer, so that sizes are small, and costs together at most `_MARGIN` above the least.

    Args:
        costs: (layers, options), infinite where they are not allowed.
        sizes: (layers, options) neurons.
    Returns:
        (layers,) options.
    """
    layers = np.arange(len(costs))
    allowed = (1 + _MARGIN) * costs.min(axis=1).sum()
    low, high = 0.0, 2.0 * max(float(costs[np.isfinite(costs)].max()), 1e-30)
    for _ in range(200):
        price = (low + high) / 2
        if costs[layers, (costs + price * sizes).argmin(axis=1)].sum() > allowed:
            high = price
        else:
            low = price
    return [int(option) for option in (costs + low * sizes).argmin(axis=1)]


def _cheapest(costs: Floats, sizes: Ids, budget: int) -> list[int]:
    """Choose an option for each layer, so that costs together are small and sizes together within a budget.

    At a price a neuron each layer takes what is cheapest; the lowest price that fits is found by bisection. What is
    left of the budget then goes, step by step, to the layer that gains most by it. Where nothing fits, the smallest are
    taken.

    Args:
        costs: (layers, options), infinite where they are not allowed.
        sizes: (options,) neurons.
    Returns:
        (layers,) options.
    """
    largest = max(float(costs[np.isfinite(costs)].max()), 1e-30)
    # Of options that lose as much the larger: experts that this text never used are for other text.
    costs = costs - _TIE * largest * sizes / sizes.max()
    low, high = 0.0, 2.0 * largest
    for _ in range(200):
        price = (low + high) / 2
        if sizes[(costs + price * sizes).argmin(axis=1)].sum() > budget:
            low = price
        else:
            high = price
    chosen = (costs + high * sizes).argmin(axis=1)
    layers = np.arange(len(costs))
    while True:
        left = budget - sizes[chosen].sum()
        gains = costs[layers, chosen][:, None] - costs
        gains[sizes - sizes[chosen][:, None] > left] = 0
        layer, option = np.unravel_index(int(gains.argmax()), gains.shape)
        if gains[layer, option] <= 0:
            return [int(option) for option in chosen]
        chosen[layer] = option


def choose_listed(
    config: CompileConfig,
    profile: Profile,
    name: str,
    norms: npt.NDArray[np.float32],
    budgets: Sequence[Sequence[int]],
    losses: SplitLosses,
) -> Choice:
    """Pick each cluster's experts, and as many neurons of each, by their scores.

    Args:
        norms: of `cluster_scores`.
        budgets: budgets[cluster][layer] neurons.
    """
    num_clusters, num_layers, num_experts = losses.orders.shape
    splits = [cluster_splits(config, losses, cluster, own) for cluster, own in enumerate(budgets)]
    widths = np.array([[split.width for split in layers] for layers in splits])
    statistic = profile.statistics[name]
    few = np.repeat(profile.expert_tokens[name] < widths[..., None], statistic.shape[2] // num_experts, axis=2)
    scores = cluster_scores(config, statistic, profile.num_tokens[name], norms, few)
    parts = scores.reshape(num_clusters, num_layers, num_experts, -1)

    def neurons_of(cluster: int, layer: int) -> npt.NDArray[np.int32]:
        split = splits[cluster][layer]
        kept = np.sort(losses.orders[cluster, layer, : split.num_experts])
        return select_of_parts(parts[cluster, layer], kept, split.width)

    neuron_ids = [[neurons_of(cluster, layer) for layer in range(num_layers)] for cluster in range(num_clusters)]
    return Choice(scores=scores, neuron_ids=neuron_ids, lists_experts=True)
