"""How groups share what a token reads: most where it is worth most."""

import numpy as np
import numpy.typing as npt
from coreinfer.compiler.samples import NUM_SHARE_TARGETS

from .thresholds import LEVELS

__all__ = ["TARGETS", "plan_shares"]

Floats = npt.NDArray[np.float32]

TARGETS = np.linspace(0.3, 1, NUM_SHARE_TARGETS, dtype=np.float32)
"""Shares of the layers' bytes that there is a plan for."""
_LEAST = 0.15
"""Of a group: what is measured at half says little of what is lost below."""
_STEPS = 60


def plan_shares(costs: Floats, energies: Floats, weights: Floats, *, measured_at: float) -> Floats:
    """Give each group its share at each of `TARGETS`, so that the model loses least.

    What a group costs goes with the square error of its outputs, which its scores know at every share: KL(s) =
    KL(measured) E(s) / E(measured), and costs of groups add up. E is convex where inputs are left out or whole, for
    what is left out next is never less than what was left out before, and nearly where some are read in half, so that
    the best shares are those where the last byte of every group is worth the same.

    Args:
        costs: (layers, 4) KL of each group alone with the share `measured_at`.
        energies: (layers, 4, levels) of `lost_energies`.
        weights: (layers, 4) of each group.
    Returns:
        (targets, layers, 4) float32.
    """
    measured = np.apply_along_axis(lambda values: np.interp(measured_at, LEVELS, values), -1, energies)
    scale = np.asarray(np.maximum(costs, 1e-9) / np.maximum(measured, 1e-9), dtype=np.float32)
    # What a weight is worth that is read in addition, from one level to the next: (layers, 4, levels - 1), falling.
    gains = -np.diff(energies, axis=-1) * scale[..., None] / weights[..., None]
    gains = np.minimum.accumulate(gains, axis=-1)
    return np.stack([_at_target(gains, weights, float(target)) for target in TARGETS])


def _at_target(gains: Floats, weights: Floats, target: float) -> Floats:
    if target >= 1:
        return np.ones(weights.shape, dtype=np.float32)
    low, high = 0.0, float(gains.max()) + 1e-30
    shares = np.ones(weights.shape)
    for _ in range(_STEPS):
        price = (low + high) / 2
        shares = _worth(gains, price)
        low, high = (price, high) if np.average(shares, weights=weights) > target else (low, price)
    # Gains jump from level to level: what is missing or too much is shared by all.
    return _fitted(shares, weights, target)


def _worth(gains: Floats, price: float) -> npt.NDArray[np.float64]:
    """Take what is worth its price, of the level at the margin a part."""
    middles = (LEVELS[:-1] + LEVELS[1:]).astype(np.float64) / 2
    flat = gains.reshape(-1, gains.shape[-1])
    # Falling gains: from the far end they ascend.
    shares = [np.interp(price, row[::-1], middles[::-1], left=1.0, right=0.0) for row in flat.astype(np.float64)]
    return np.clip(np.asarray(shares).reshape(gains.shape[:-1]), _LEAST, 1.0)


def _fitted(shares: npt.NDArray[np.float64], weights: Floats, target: float) -> Floats:
    """Meet the target to the bit of a float: shares that are too high shrink, others grow towards 1."""
    mean = float(np.average(shares, weights=weights))
    fitted = shares * (target / mean) if mean > target else 1 - (1 - shares) * (1 - target) / max(1 - mean, 1e-9)
    return np.asarray(np.clip(fitted, 0, 1), dtype=np.float32)
