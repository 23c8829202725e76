"""Second-order removal of neurons: remove the neurons that cost least after the others have compensated them.

The FFN's output is h W with activations h and W (ffn_dim, hidden size). With G = E[h h^T], C = E[h y^T] for a wanted
output y, and lam a ridge towards the model's own weights W0, the best W is X = H^-1 (C + lam W0), H = G + lam I.
Without neuron i, the rest refitted, the error grows by x_i^T M x_i / [H^-1]_ii in the metric M (Optimal Brain Surgeon,
Hassibi and Stork 1992; for whole neurons SlimGPT, arXiv 2412.18110, and OSSCAR, arXiv 2403.12983). Neurons go some at a
time: X and H^-1 are updated exactly for the whole lot, which is only chosen as if its members were independent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["BLOCK", "REMOVAL_RIDGE", "Removal", "System", "remove_neurons", "solve"]

BLOCK = 32
REMOVAL_RIDGE = 1e-2
"""Of the system by which a cluster's neurons are removed, whichever ridge its repair takes."""
_FINE_STEP = 16
_DENSITY = 0.85
"""Matrices are cut down to what is left as soon as no more of their rows are left than this share."""


@dataclass(frozen=True, kw_only=True)
class System:
    """The least squares problem of one layer's down projection.

    Attributes:
        gram: (ffn_dim, ffn_dim) float32, mean of h h^T.
        cross: (ffn_dim, hidden size) float32, mean of h y^T with y the wanted outputs.
        own: (ffn_dim, hidden size) float32, the model's weights, which the ridge pulls towards.
        ridge: lam divided by the mean diagonal of the Gram matrix.
    """

    gram: torch.Tensor
    cross: torch.Tensor
    own: torch.Tensor
    ridge: float

    @property
    def lam(self) -> torch.Tensor:
        """The ridge itself; a layer that never fires still has one."""
        return self.ridge * self.gram.diagonal().mean().clamp_min(1e-12)


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What is left after removing neurons.

    Attributes:
        neuron_ids: (kept,) int32, ascending.
        losses: (steps + 1,) float64, mean squared error added in the metric after each step, from 0 upwards.
        removed_ids: (ffn_dim - kept,) int32, in the order in which they went.
    """

    neuron_ids: npt.NDArray[np.int32]
    losses: npt.NDArray[np.float64]
    removed_ids: npt.NDArray[np.int32]


def remove_neurons(system: System, metric: torch.Tensor, *, keep: int, step: int = _FINE_STEP) -> Removal:
    """Remove neurons until `keep` are left.

    Args:
        metric: (hidden size, hidden size) M, symmetric and positive definite: what output errors cost.
        step: how many go at a time.
    """
    inverse = _inverse(system)
    # In the metric's root, costs are squared norms, and the updates below are the same.
    weights = inverse @ (system.cross + system.lam * system.own) @ torch.linalg.cholesky(metric)
    neuron_ids = torch.arange(len(inverse), device=inverse.device)
    left = torch.ones_like(neuron_ids, dtype=torch.bool)
    num_left, losses, gone = len(inverse), [0.0], [neuron_ids[:0]]
    while num_left > keep:
        if num_left <= _DENSITY * len(left):
            rest = left.nonzero()[:, 0]
            neuron_ids, weights = neuron_ids[rest], weights.index_select(0, rest)
            inverse = inverse.index_select(0, rest).index_select(1, rest)
            left = torch.ones_like(neuron_ids, dtype=torch.bool)
        # What is removed has empty rows, but for rounding.
        costs = torch.where(left, weights.square().sum(dim=1) / inverse.diagonal(), torch.inf)
        worst = costs.topk(min(step, num_left - keep), largest=False).indices
        removed, rows = weights[worst], inverse[worst]
        # (E^T H^-1 E)^-1 of the removed rows E: what their removal does to all others at once.
        core = torch.linalg.inv(rows[:, worst].double()).float()
        losses.append(losses[-1] + float((removed * (core @ removed)).sum()))
        pull = rows.T @ core
        # In place: a product of its own would be as large as the inverse, and this loop is bound by memory.
        weights.addmm_(pull, removed, alpha=-1)
        inverse.addmm_(pull, rows, alpha=-1)
        left[worst] = False
        gone.append(neuron_ids[worst])
        num_left -= len(worst)
    return Removal(
        neuron_ids=_as_array(neuron_ids[left]), losses=np.array(losses), removed_ids=_as_array(torch.cat(gone))
    )


def _as_array(neuron_ids: torch.Tensor) -> npt.NDArray[np.int32]:
    return neuron_ids.cpu().numpy().astype(np.int32)


def _inverse(system: System) -> torch.Tensor:
    matrix = system.gram.clone()
    matrix.diagonal().add_(system.lam)
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        # Rounding made it indefinite: the same in double precision.
        return torch.cholesky_inverse(torch.linalg.cholesky(matrix.double())).float()
    return torch.cholesky_inverse(factor)


def solve(system: System, neuron_ids: torch.Tensor, ridges: Sequence[float]) -> list[torch.Tensor]:
    """Fit the kept rows of the down projection, once for each ridge.

    Args:
        neuron_ids: (kept,) ascending.
        ridges: take the place of the system's own.
    Returns:
        A (kept, hidden size) float32 matrix for each ridge.
    """
    kept = system.gram[neuron_ids][:, neuron_ids]
    # A neuron that never fires has an empty row; the ridge alone then keeps its own weights.
    scale = kept.diagonal().mean().clamp_min(1e-12)
    target, own = system.cross[neuron_ids], system.own[neuron_ids]
    return [_solve_one(kept, ridge * scale, target + ridge * scale * own) for ridge in ridges]


def _solve_one(kept: torch.Tensor, lam: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    matrix = kept.clone()
    matrix.diagonal().add_(lam)
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        return torch.cholesky_solve(right.double(), torch.linalg.cholesky(matrix.double())).float()
    # The same as cholesky_solve in half the time: BLAS divides long rows faster than as many short columns.
    halfway = torch.linalg.solve_triangular(factor.T, right.T, upper=True, left=False)
    solution: torch.Tensor = torch.linalg.solve_triangular(factor, halfway, upper=False, left=False)
    return solution.T
