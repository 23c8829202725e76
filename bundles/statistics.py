"""From activations to the neurons that are kept.

All functions take the activations h of one layer, the down projection's input: act(fc1 x) for ungated FFNs,
act(gate x) * up x for gated ones. The compiler applies them to calibration text, an engine to a prompt.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .errors import ConfigError

__all__ = [
    "SELECTIONS",
    "Selection",
    "document_statistic",
    "mix_scores",
    "scaled_to_one",
    "scores_from_statistic",
    "select_in_parts",
    "select_neurons",
    "select_of_parts",
    "top_neurons",
]

Array = npt.NDArray[np.float32]
Selection = Literal["output-aware", "coreinfer", "griffin"]
SELECTIONS: tuple[Selection, ...] = ("output-aware", "coreinfer", "griffin")


def document_statistic(
    selection: Selection, activations: Array, *, alpha: float, beta: float, sentence: bool = True
) -> Array:
    """Sum up one document's activations for one way of selection; sums of several documents add.

    Args:
        selection: "output-aware": sum over tokens of h^2.
            "griffin": the same after scaling each token to norm 1 (GRIFFIN, arXiv 2404.01365, section 4).
            "coreinfer": 1 where the neuron is sentence-wise core (CoreInfer, arXiv 2410.18311, section 3).
        activations: (tokens, ffn_dim) float32.
        alpha: share of a token's positive activations that are token-wise core; coreinfer only.
        beta: share of neurons that are sentence-wise core; coreinfer only.
        sentence: for coreinfer, mark the sentence-wise core neurons; without, return the counts that rank them, as
            the stability-guided mode needs.
    Returns:
        (ffn_dim,) float32.
    """
    if selection == "coreinfer":
        counts = token_core_counts(activations, alpha=alpha)
        return sentence_core(counts, beta=beta) if sentence else counts
    squares = np.square(activations)
    if selection == "griffin":
        squares /= np.maximum(squares.sum(axis=1, keepdims=True), np.float32(1e-30))
    return np.asarray(squares.sum(axis=0), dtype=np.float32)


def token_core_counts(activations: Array, *, alpha: float) -> Array:
    """Count for each neuron the tokens for which it is token-wise core.

    A neuron is core for a token when its activation is among the top `alpha` share of the token's positive
    activations; the share is rounded up, ties go to the lower neuron id.

    Args:
        activations: (tokens, ffn_dim) float32.
    Returns:
        (ffn_dim,) float32 counts.
    """
    num_neurons = activations.shape[1]
    num_positive = np.count_nonzero(activations > 0, axis=1)
    num_core = np.ceil(alpha * num_positive - 1e-9).astype(np.int64)
    ascending = np.sort(activations, axis=1)
    last = np.take_along_axis(ascending, (num_neurons - np.maximum(num_core, 1))[:, None], axis=1)
    above = activations > last
    ties = activations == last
    num_missing = num_core - np.count_nonzero(above, axis=1)
    core = above | (ties & (np.cumsum(ties, axis=1) <= num_missing[:, None]))
    return np.asarray(np.count_nonzero(core, axis=0), dtype=np.float32)


def sentence_core(counts: Array, *, beta: float) -> Array:
    """Mark the `beta` share of neurons with the highest counts; ties go to the lower neuron id.

    Args:
        counts: (ffn_dim,) from `token_core_counts`.
    Returns:
        (ffn_dim,) float32 of 0 and 1.
    """
    marks = np.zeros_like(counts)
    marks[top_neurons(counts, max(1, round(beta * counts.size)))] = 1
    return marks


def scores_from_statistic(
    selection: Selection, statistic: Array, num_tokens: int, column_norms: npt.NDArray[np.float32]
) -> Array:
    """Turn a sum of document statistics into scores, scaled to a root mean square of 1.

    The scale makes scores of a prompt and of a cluster comparable. For "output-aware" the score of neuron i is
    sqrt(E[h_i^2]) * ||W_down[:, i]||, the activation part as in FLAP (arXiv 2312.11983) and the norm as in WINA.

    Args:
        statistic: (..., ffn_dim) sums.
        num_tokens: tokens that were summed.
        column_norms: (..., ffn_dim) norms of the down projection's columns.
    Returns:
        (..., ffn_dim) float32, higher is more important.
    """
    if selection == "coreinfer":
        scores = statistic
    else:
        scores = np.sqrt(statistic / max(num_tokens, 1))
        if selection == "output-aware":
            scores = scores * column_norms
    return scaled_to_one(scores)


def scaled_to_one(scores: Array) -> Array:
    """Divide scores (..., units) by their root mean square, so that those of a prompt and of a cluster compare."""
    scale = np.sqrt(np.mean(np.square(scores), axis=-1, keepdims=True))
    return np.asarray(scores / np.maximum(scale, 1e-30), dtype=np.float32)


def mix_scores(prompt: Array, cluster: Array, *, num_prompt_tokens: int, half_tokens: int) -> Array:
    """Weigh a prompt's own scores against its cluster's: w * prompt + (1 - w) * cluster, w = n / (n + n0).

    The rank fusion of GLASS (arXiv 2508.14302) has the same purpose; here scores are mixed, not ranks.

    Args:
        prompt, cluster: (layers, ffn_dim) scores with a root mean square of 1 a layer.
        num_prompt_tokens: n.
        half_tokens: n0, the prompt length at which both count alike.
    """
    weight = num_prompt_tokens / (num_prompt_tokens + half_tokens)
    return np.asarray(weight * prompt + (1 - weight) * cluster, dtype=np.float32)


def top_neurons(scores: Array, budget: int) -> npt.NDArray[np.int32]:
    """Pick the highest scores; ties go to the lower neuron id.

    Args:
        scores: (ffn_dim,), higher is more important.
        budget: how many to keep, 1 <= budget <= ffn_dim.
    Returns:
        (budget,) int32 neuron ids, ascending.
    Raises:
        ConfigError: the budget is out of range.
    """
    if not 1 <= budget <= scores.size:
        raise ConfigError(f"a layer budget of {budget} neurons: expected 1 to {scores.size}")
    order = np.argsort(-scores, kind="stable")[:budget]
    return np.sort(order).astype(np.int32)


def select_neurons(scores: Array, budgets: Sequence[int]) -> list[npt.NDArray[np.int32]]:
    """Pick the neurons of every layer.

    Args:
        scores: (layers, ffn_dim).
        budgets: neurons to keep in each layer.
    Returns:
        One ascending int32 array of neuron ids a layer.
    """
    return [top_neurons(layer_scores, budget) for layer_scores, budget in zip(scores, budgets, strict=True)]


def select_in_parts(scores: Array, budgets: Sequence[int], num_parts: int) -> list[npt.NDArray[np.int32]]:
    """Pick as many neurons of every equal part of a layer, its experts, by the scores within the part.

    Args:
        scores: (layers, ffn_dim).
        budgets: neurons to keep in each layer, of all its parts together.
    Returns:
        One ascending int32 array of neuron ids a layer.
    """
    parts = scores.reshape(len(scores) * num_parts, -1)
    chosen = select_neurons(parts, [budget // num_parts for budget in budgets for _ in range(num_parts)])
    starts = parts.shape[1] * np.arange(num_parts, dtype=np.int32)
    layers = [chosen[first : first + num_parts] for first in range(0, len(chosen), num_parts)]
    return [np.concatenate([ids + start for ids, start in zip(layer, starts, strict=True)]) for layer in layers]


def select_of_parts(scores: Array, numbers: npt.NDArray[np.integer[Any]], width: int) -> npt.NDArray[np.int32]:
    """Pick as many neurons of some of a layer's equal parts, its experts, by the scores within the part.

    Args:
        scores: (parts, neurons of each).
        numbers: (chosen,) ascending, of the parts.
        width: neurons to keep of each.
    Returns:
        (chosen x width,) int32 ascending ids among the neurons of all parts.
    """
    ids = [top_neurons(scores[number], width) + np.int32(number * scores.shape[1]) for number in numbers]
    return np.concatenate(ids)
