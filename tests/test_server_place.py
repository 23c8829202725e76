"""The place of a prompt on the map."""

import numpy as np
import pytest
from coreinfer.server.place import SOFTNESS, place_weights


def test_near_one_cluster() -> None:
    weights = place_weights(np.array([0.9, 0.3, 0.8]))
    assert weights.argmax() == 1
    assert weights[1] > 0.99
    assert weights.sum() == pytest.approx(1)


def test_between_two_and_like_none() -> None:
    assert place_weights(np.array([0.5, 0.5, 2.0])) == pytest.approx([0.5, 0.5, 0], abs=1e-9)
    assert place_weights(np.ones(4)) == pytest.approx([0.25] * 4)


def test_one_softness_nearer_weighs_e_times_more() -> None:
    weights = place_weights(np.array([0.5, 0.5 + SOFTNESS]))
    assert weights[0] / weights[1] == pytest.approx(np.e)


def test_one_cluster() -> None:
    assert place_weights(np.array([1.7])) == pytest.approx([1.0])
