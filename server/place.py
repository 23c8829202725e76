"""Where a prompt is on the map of clusters."""

import numpy as np
import numpy.typing as npt

__all__ = ["SOFTNESS", "place_weights"]

Doubles = npt.NDArray[np.float64]

SOFTNESS = 0.05
"""A cluster that is nearer by this much weighs e times more."""


def place_weights(distances: Doubles) -> Doubles:
    """Say how much each cluster pulls a prompt towards itself.

    The map's axes are the two main components of the sentence encoder's centroids (`map_positions`), and a device has
    only the static encoder, so that a prompt cannot be projected as the clusters were. It is drawn at the weighted mean
    of their positions instead, by a softmax of -distance / SOFTNESS: near a cluster if it is much nearer to it than to
    all others, between clusters if it could belong to several, in the middle if it is like none. It never lies outside
    of all clusters, however strange it is: that is what its distance says.

    Args:
        distances: (clusters,) 1 - cosine.
    Returns:
        (clusters,) weights that sum to 1.
    """
    scores = np.exp(-(distances - distances.min()) / SOFTNESS)
    return np.asarray(scores / scores.sum(), dtype=np.float64)
