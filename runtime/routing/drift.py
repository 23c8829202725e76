"""Whether a text has drifted to another cluster while it was decoded."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .router import lead

__all__ = ["MARGIN", "DriftWatch"]

# By which share another cluster must be nearer than the one in use; docs/dev/log.md has the measurement.
MARGIN = 0.05


class DriftWatch:
    """Follows the clusters of the stretches of one generation.

    A pack is swapped when two stretches in a row, which share no token, are nearest to the same other cluster, each by
    a margin. One stretch may quote or digress; a lasting change shows in both.
    """

    def __init__(self, cluster: int, *, stretch_tokens: int) -> None:
        """Begin a generation.

        Args:
            cluster: the cluster that it begins with.
            stretch_tokens: length of a stretch; 0 to never route again.
        """
        self.cluster = cluster
        self._stretch_tokens = stretch_tokens
        self._candidate: int | None = None

    @property
    def candidate(self) -> int | None:
        """The cluster that the last stretch was nearest to, if it is another one: the next may swap to it."""
        return self._candidate

    def stretch(self, token_ids: Sequence[int]) -> Sequence[int]:
        """Return the tokens to route now, given all decoded tokens; empty except at the end of a stretch."""
        if self._stretch_tokens == 0 or len(token_ids) % self._stretch_tokens:
            return ()
        return token_ids[-self._stretch_tokens :]

    def swaps(self, distances: npt.NDArray[np.float64]) -> bool:
        """Judge a stretch.

        Args:
            distances: (clusters,) of its text to all clusters.
        Returns:
            Whether `cluster` has become another one.
        """
        nearest = int(distances.argmin())
        leaves = nearest != self.cluster and lead(distances[nearest], distances[self.cluster]) >= MARGIN
        if leaves and nearest == self._candidate:
            self.cluster, self._candidate = nearest, None
            return True
        self._candidate = nearest if leaves else None
        return False
