"""Stage `reconstruct`: refit the down projection on the neurons that are kept.

With h the activations, G = E[h h^T], S the kept neurons and W the down projection (ffn_dim, hidden size), the kept
rows become W' = (G_SS + lam I)^-1 (G_S: W + lam W_S), which minimizes E|h W - h_S W'|^2 + lam |W' - W_S|^2: ridge least
squares that falls back to the model's own weights where data is thin. SlimGPT and OSSCAR solve the same problem.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .layerwise import LayerActivations

__all__ = ["RIDGES", "RepairTask", "gram_matrix", "mean_gram", "repair_layer", "ridge_solutions"]

RIDGES = (1e-3, 1e-2, 1e-1)
"""Candidates for "auto", relative to the mean diagonal of the Gram matrix; no repair is the last candidate."""
_TOKEN_CHUNK = 8192
_COLUMN_BLOCKS = 6


@dataclass(frozen=True, kw_only=True)
class RepairTask:
    """One assignment's clusters to repair in one layer.

    Attributes:
        neuron_ids: kept neurons of each cluster, ascending.
        validation: documents of each cluster that are not calibrated on, as indices into the activations.
        cluster_weight: weight of the cluster's Gram matrix against that of all text.
    """

    neuron_ids: Sequence[npt.NDArray[np.int32]]
    validation: Sequence[Sequence[int]]
    cluster_weight: float


def gram_matrix(activations: torch.Tensor) -> torch.Tensor:
    """Sum h h^T over tokens in float32.

    Only blocks on and above the diagonal are multiplied: the result is symmetric.

    Args:
        activations: (tokens, n) of any float dtype.
    Returns:
        (n, n) float32.
    """
    num_columns = activations.shape[1]
    gram = torch.zeros((num_columns, num_columns), dtype=torch.float32, device=activations.device)
    step = max(64, -(-num_columns // _COLUMN_BLOCKS))
    for chunk in activations.split(_TOKEN_CHUNK):
        values = chunk.float()
        for start in range(0, num_columns, step):
            gram[start : start + step, start:] += values[:, start : start + step].T @ values[:, start:]
    upper = gram.triu()
    return upper + upper.triu(1).T


def ridge_solutions(
    gram: torch.Tensor, weights: torch.Tensor, neuron_ids: torch.Tensor, ridges: Sequence[float]
) -> list[torch.Tensor]:
    """Solve for the kept rows of the down projection, once for each ridge.

    Args:
        gram: (ffn_dim, ffn_dim) mean of h h^T.
        weights: (ffn_dim, hidden size), the down projection transposed.
        neuron_ids: (kept,) ascending.
        ridges: lam divided by the mean diagonal of G_SS.
    Returns:
        A (kept, hidden size) float32 matrix for each ridge.
    """
    rows = gram[neuron_ids]
    kept, target = rows[:, neuron_ids], rows @ weights
    # A neuron that never fires has an empty row; the ridge alone then keeps its own weights.
    scale = kept.diagonal().mean().clamp_min(1e-12)
    own = weights[neuron_ids]
    return [_solve(kept, ridge * scale, target + ridge * scale * own) for ridge in ridges]


def _solve(kept: torch.Tensor, lam: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    system = kept.clone()
    system.diagonal().add_(lam)
    factor, info = torch.linalg.cholesky_ex(system)
    if int(info):
        # Rounding made it indefinite: the same system in double precision.
        return torch.cholesky_solve(right.double(), torch.linalg.cholesky(system.double())).float()
    return torch.cholesky_solve(right, factor)


def repair_layer(
    layer: LayerActivations,
    weights: torch.Tensor,
    task: RepairTask,
    ridges: Sequence[float],
    grams: Iterable[torch.Tensor],
    overall: torch.Tensor,
) -> tuple[list[torch.Tensor], float | None]:
    """Repair one layer for every cluster, with one ridge for all of them.

    The ridge is the candidate with the least squared error on the validation documents; no repair at all is a
    candidate too, so that a repair which other text rejects is never shipped.

    Args:
        weights: (ffn_dim, hidden size) float32, the down projection transposed.
        ridges: candidates; without any validation text the first is taken.
        grams: (ffn_dim, ffn_dim) mean of h h^T over each cluster's documents; taken one at a time.
        overall: the same over all calibration documents.
    Returns:
        A (kept, hidden size) float32 matrix for each cluster, and the ridge; None for no repair.
    """
    candidates: list[list[torch.Tensor]] = [[] for _ in ridges]
    plain = []
    for ids, gram in zip(task.neuron_ids, grams, strict=True):
        index = _index(ids, weights)
        mixed = task.cluster_weight * gram + (1 - task.cluster_weight) * overall
        for found, solution in zip(candidates, ridge_solutions(mixed, weights, index, ridges), strict=True):
            found.append(solution)
        plain.append(weights[index])
    if not any(task.validation):
        return candidates[0], ridges[0]
    errors = _validation_errors(layer, weights, task, [*candidates, plain])
    best = min(range(len(errors)), key=errors.__getitem__)
    return (candidates[best], ridges[best]) if best < len(ridges) else (plain, None)


def mean_gram(layer: LayerActivations, documents: Sequence[int]) -> torch.Tensor:
    """Mean of h h^T over the tokens of some documents: (ffn_dim, ffn_dim) float32."""
    activations = layer.of_documents(documents)
    return gram_matrix(activations) / max(1, len(activations))


def _index(neuron_ids: npt.NDArray[np.int32], weights: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(neuron_ids).long().to(weights.device)


def _validation_errors(
    layer: LayerActivations, weights: torch.Tensor, task: RepairTask, candidates: Sequence[Sequence[torch.Tensor]]
) -> list[float]:
    """Squared error of the FFN's output on the validation documents, for each candidate."""
    errors = [0.0] * len(candidates)
    for cluster, (documents, ids) in enumerate(zip(task.validation, task.neuron_ids, strict=True)):
        index = _index(ids, weights)
        for chunk in layer.of_documents(documents).split(_TOKEN_CHUNK):
            values = chunk.float()
            target, kept = values @ weights, values[:, index]
            for number, solutions in enumerate(candidates):
                errors[number] += float((target - kept @ solutions[cluster]).square().sum())
    return errors
