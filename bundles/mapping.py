"""The map of clusters: where a text lies between them."""

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["place_texts"]

_SHARPNESS = 10.0


def place_texts(similarities: npt.NDArray[Any], centers: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Place texts on the map whose clusters lie at `ClusterRecord.map_x` and `map_y`.

    A text lies at the mean of the clusters' places, weighed by exp(10 cosine): near the clusters that it is like. Of
    the projections tried this one keeps clusters apart best but for one fitted to them (docs/dev/log.md).

    Args:
        similarities: (texts, clusters) cosines of texts to centroids.
        centers: (clusters, 2) places of the clusters.
    Returns:
        (texts, 2) places, within the clusters' convex hull.
    """
    scaled = _SHARPNESS * np.asarray(similarities, dtype=np.float64)
    weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return np.asarray(weights @ np.asarray(centers, dtype=np.float64) / weights.sum(axis=1, keepdims=True))
