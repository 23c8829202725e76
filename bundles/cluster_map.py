"""The map of clusters: where a text lies between them."""

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["PROMPT_SOFTNESS", "place_texts", "pull_of_clusters"]

Doubles = npt.NDArray[np.float64]

PROMPT_SOFTNESS = 0.05
"""Of the prompts that a server places."""
_TEXT_SOFTNESS = 0.1
"""Of the calibration texts in a report: of the projections tried this one keeps clusters apart best but for one fitted
to them (docs/dev/log.md)."""


def pull_of_clusters(distances: npt.NDArray[Any], *, softness: float) -> Doubles:
    """Return each cluster's weight in the position of a text: a softmax of -distance / softness.

    The map's axes are the two main components of the sentence encoder's centroids (`map_positions`), and a device has
    only the static encoder, so that a prompt cannot be projected as the clusters were. It is drawn at the weighted mean
    of their positions instead: near a cluster if it is much nearer to it than to all others, between clusters if it
    could belong to several, in the middle if it is like none. It never lies outside of all clusters, however strange it
    is: that is what its distance says.

    Args:
        distances: (..., clusters) 1 - cosine.
        softness: a cluster that is nearer by this much weighs e times more.
    Returns:
        (..., clusters) weights that sum to 1.
    """
    exact = np.asarray(distances, dtype=np.float64)
    weights = np.exp((exact.min(axis=-1, keepdims=True) - exact) / softness)
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def place_texts(similarities: npt.NDArray[Any], centers: npt.NDArray[Any]) -> Doubles:
    """Place texts on the map whose clusters lie at `ClusterRecord.map_x` and `map_y`.

    Args:
        similarities: (texts, clusters) cosines of texts to centroids.
        centers: (clusters, 2) positions of the clusters.
    Returns:
        (texts, 2) positions, within the clusters' convex hull.
    """
    distances = 1 - np.asarray(similarities, dtype=np.float64)
    return np.asarray(pull_of_clusters(distances, softness=_TEXT_SOFTNESS) @ np.asarray(centers, dtype=np.float64))
