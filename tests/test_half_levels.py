"""Levels, energies, ratios and plans where inputs are read in half, by scores alone."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from coreinfer.compiler.shares.inputs import groups_of
from coreinfer.compiler.shares.plan import TARGETS, plan_shares
from coreinfer.compiler.shares.thresholds import (
    LEVELS,
    RATIOS,
    energies_at,
    half_ratios,
    thresholds_at_levels,
)

Floats = npt.NDArray[np.float32]


def random_scores(seed: int, count: int = 3000) -> Floats:
    return np.sort(np.random.default_rng(seed).gamma(1.5, size=count)).astype(np.float32)


@pytest.mark.parametrize("ratio", [1, 1.5, 3, 5])
def test_a_level_is_the_share_of_bytes_that_its_threshold_reads(ratio: float) -> None:
    scores = random_scores(1)
    found = thresholds_at_levels(scores, np.float32(ratio))
    assert (np.diff(found) <= 0).all()
    assert found[-1] == 0
    for level, threshold in zip(LEVELS, found, strict=True):
        whole, half = (scores > ratio * threshold).mean(), (scores > threshold).mean()
        assert (whole + half) / 2 == pytest.approx(level, abs=2 / len(scores))


@pytest.mark.parametrize("ratio", [1, 2, 3.5])
def test_energies_are_sums_of_squares(ratio: float) -> None:
    scores, low = random_scores(2), 0.11
    thresholds = thresholds_at_levels(scores, np.float32(ratio))
    found = energies_at(scores, thresholds, np.float32(ratio), np.float32(low))
    squares = scores.astype(float) ** 2
    for threshold, energy in zip(thresholds, found, strict=True):
        is_half = (scores > threshold) & (scores <= np.float32(ratio) * threshold)
        lost = squares[scores <= threshold].sum() + low * squares[is_half].sum()
        assert energy == pytest.approx(lost / squares.sum(), rel=1e-4, abs=1e-7)


def test_the_ratio_loses_least() -> None:
    """Where low bits hold next to nothing all that is read is read in half, and where they hold much nothing is."""
    loaded: Any = SimpleNamespace(record=SimpleNamespace(num_layers=1))
    places, lows = groups_of(loaded), np.array([[0.1, 0.9, 0.01, 0.3]], dtype=np.float32)
    scores = {place: random_scores(number) for number, place in enumerate(places)}
    found = half_ratios(loaded, scores, lows)
    for place, ratio, low in zip(places, found[0], lows[0], strict=True):
        lost = {}
        for other in RATIOS:
            # Where two levels lie around 0.6, the energy there is about between theirs.
            energies = energies_at(scores[place], thresholds_at_levels(scores[place], other), other, low)
            lost[float(other)] = float(np.interp(0.6, LEVELS, energies))
        assert lost[float(ratio)] <= 1.002 * min(lost.values())
    assert found[0, 1] == 1
    assert 2 <= found[0, 0] <= 4
    assert found[0, 2] >= found[0, 0]


def test_a_plan_knows_of_halves() -> None:
    """Of two groups with the same scores, each byte is spent where it is worth most, as trying all shares does."""
    scores, ratios, lows = random_scores(5), np.array([1, 3], dtype=np.float32), np.array([0, 0.1], dtype=np.float32)
    energies = np.stack(
        [
            energies_at(scores, thresholds_at_levels(scores, ratio), ratio, low)
            for ratio, low in zip(ratios, lows, strict=True)
        ]
    )
    measured = np.array([float(np.interp(0.5, LEVELS, own)) for own in energies])
    costs, weights = np.array([[1.0, 1.2]], dtype=np.float32), np.ones((1, 2), dtype=np.float32)
    plan = plan_shares(costs, energies[None], weights, measured_at=0.5)

    def loss(first: float, second: float) -> float:
        shares = (first, second)
        at = [float(np.interp(share, LEVELS, own)) for share, own in zip(shares, energies, strict=True)]
        return float((costs[0] * np.array(at) / measured).sum())

    # Near 1 levels lie too far apart to tell.
    for target, shares in zip(TARGETS[2:-2].tolist(), plan[2:-2, 0].tolist(), strict=True):
        tried = [loss(first, 2 * target - first) for first in np.linspace(max(0, 2 * target - 1), 1, 400).tolist()]
        assert loss(*shares) <= 1.03 * min(tried) + 1e-4
