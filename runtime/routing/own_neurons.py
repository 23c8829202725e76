"""The neurons that a prompt chooses for itself, by what they did while it was read (modes stability and fused).

Of a mixture they are chosen as its packs are made: where packs narrow experts, each expert of a layer keeps as many
neurons, those with its own highest scores; where packs have whole experts, a layer keeps those that put out most; where
packs have some experts, each narrower, a layer keeps the experts that put out most, and each of them as many neurons.
"""

import numpy as np
import numpy.typing as npt
from coreinfer.bundles import Bundle, Manifest
from coreinfer.bundles.contract import tensor_name
from coreinfer.bundles.statistics import (
    Selection,
    mix_scores,
    scaled_to_one,
    scores_from_statistic,
    select_in_parts,
    select_neurons,
    select_of_parts,
)

__all__ = ["any_neurons", "choose_neurons", "equal_budgets", "mixed_with_cluster", "prompt_scores"]

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]

_UNSEEN = np.float32(1e-10)
"""Times the norms of its columns, the scores of an expert that no token of the prompt used: below those of any other,
whose root mean square is 1."""


def prompt_scores(bundle: Bundle, selection: Selection, statistic: Floats, num_tokens: int) -> Floats:
    """Score what can be kept by what a prompt made of it.

    An expert that the prompt did not use goes by the norms of its down projection's columns, as in a compile: the
    router may choose it later. A whole expert's score is the root of its neurons' squared scores.

    Args:
        statistic: (layers, ffn_dim) sums of `Decoder.prompt_statistics`.
        num_tokens: that were summed.
    Returns:
        (layers, ffn_dim) float32, with a root mean square of 1 a layer; where packs have whole experts, (layers,
        experts).
    """
    manifest, norms = bundle.manifest, bundle.down_norms
    scores = scores_from_statistic(selection, statistic, num_tokens, norms)
    experts = manifest.model.experts
    if experts is None:
        return scores
    parts = (len(scores), experts.num_experts, manifest.model.expert_neurons)
    unseen = ~statistic.reshape(parts).any(axis=2, keepdims=True)
    of_experts = np.where(unseen, _UNSEEN * norms.reshape(parts), scores.reshape(parts))
    if manifest.narrows_experts:
        return of_experts.reshape(scores.shape)
    return scaled_to_one(_of_whole_experts(of_experts))


def _of_whole_experts(scores: Floats) -> Floats:
    """Scores of experts, (layers, experts), by those of their neurons."""
    return np.asarray(np.sqrt(np.square(scores).sum(axis=2)), dtype=np.float32)


def mixed_with_cluster(bundle: Bundle, scores: Floats, cluster: int, num_tokens: int) -> Floats:
    """Weigh a prompt's scores against those of its cluster; see `mix_scores`."""
    pack, num_layers = bundle.pack(cluster), bundle.manifest.model.num_layers
    of_cluster = np.stack([pack[tensor_name(layer, "scores")].array for layer in range(num_layers)])
    half_tokens = bundle.manifest.plan.fused_half_tokens
    return mix_scores(scores, of_cluster, num_prompt_tokens=num_tokens, half_tokens=half_tokens)


def choose_neurons(manifest: Manifest, scores: Floats, budgets: tuple[int, ...]) -> tuple[Ids, ...]:
    """Pick the neurons of every layer by the scores of `prompt_scores`.

    Args:
        budgets: neurons of each layer, in the units of the bundle's packs (`Manifest.unit_neurons`); where packs list
            narrower experts, in as many as the plan has in the layer.
    Returns:
        Ascending ids below ffn_dim for each layer.
    """
    experts, size = manifest.model.experts, manifest.model.expert_neurons
    if experts is None:
        return tuple(select_neurons(scores, budgets))
    if (layer_experts := manifest.plan.layer_experts) is not None:
        parts = scores.reshape(len(scores), experts.num_experts, size)
        kept = select_neurons(_of_whole_experts(parts), layer_experts)
        widths = [budget // len(numbers) for budget, numbers in zip(budgets, kept, strict=True)]
        return tuple(map(select_of_parts, parts, kept, widths))
    if manifest.narrows_experts:
        return tuple(select_in_parts(scores, budgets, experts.num_experts))
    kept = select_neurons(scores, [budget // size for budget in budgets])
    within = np.arange(size, dtype=np.int32)
    return tuple(np.add.outer(ids * np.int32(size), within).ravel() for ids in kept)


def any_neurons(manifest: Manifest) -> tuple[Ids, ...]:
    """Return as many neurons of every layer as packs keep, whichever: a prompt's own take as many bytes."""
    num_choices = manifest.model.ffn_dim // (1 if manifest.narrows_experts else manifest.unit_neurons)
    alike = np.ones((manifest.model.num_layers, num_choices), dtype=np.float32)
    return choose_neurons(manifest, alike, manifest.plan.layer_budgets)


def equal_budgets(manifest: Manifest) -> tuple[int, ...]:
    """Return as many neurons for each layer as the plan keeps on average, in whole units of the bundle's packs.

    Where packs list narrower experts, in whole neurons of each that the plan has in a layer, at most all of them.
    """
    budgets, unit = manifest.plan.layer_budgets, manifest.unit_neurons
    if (counts := manifest.plan.layer_experts) is not None:
        most, mean = manifest.model.expert_neurons, sum(budgets) // len(budgets)
        return tuple(count * min(mean // count, most) for count in counts)
    return (sum(budgets) // len(budgets) // unit * unit,) * len(budgets)
