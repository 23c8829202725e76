"""The place of a prompt on the map."""

import numpy as np
import numpy.typing as npt
import pytest
from coreinfer.bundles.cluster_map import pull_of_clusters

SOFTNESS = 0.05


def pulls(distances: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return pull_of_clusters(distances, softness=SOFTNESS)


def test_near_one_cluster() -> None:
    weights = pulls(np.array([0.9, 0.3, 0.8]))
    assert weights.argmax() == 1
    assert weights[1] > 0.99
    assert weights.sum() == pytest.approx(1)


def test_between_two_and_like_none() -> None:
    assert pulls(np.array([0.5, 0.5, 2.0])) == pytest.approx([0.5, 0.5, 0], abs=1e-9)
    assert pulls(np.ones(4)) == pytest.approx([0.25] * 4)


def test_one_softness_nearer_weighs_e_times_more() -> None:
    weights = pulls(np.array([0.5, 0.5 + SOFTNESS]))
    assert weights[0] / weights[1] == pytest.approx(np.e)


def test_one_cluster() -> None:
    assert pulls(np.array([1.7])) == pytest.approx([1.0])


def test_texts_side_by_side_are_each_as_alone() -> None:
    distances = np.array([[0.9, 0.3, 0.8], [0.1, 0.1, 0.5]])
    assert pulls(distances) == pytest.approx(np.stack([pulls(row) for row in distances]))
