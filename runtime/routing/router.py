"""The router: which cluster a prompt belongs to, and how far it is from it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from coreinfer.bundles import Bundle, BundleCorrupt
from coreinfer.bundles.encoder import embed_token_ids, routing_excerpt
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.tensors import TensorFile
from tokenizers import Tokenizer

from .centroids import read_index

__all__ = ["UNSURE_MARGIN", "Route", "Router", "lead"]

# Below it the two nearest clusters are all but a coin toss; docs/dev/log.md has the measurement.
UNSURE_MARGIN = 0.02


@dataclass(frozen=True, kw_only=True)
class Route:
    """The cluster that a text belongs to.

    Attributes:
        cluster: nearest cluster.
        distance: 1 - cosine to its centroid.
        margin: share of the second nearest distance by which the nearest is nearer, see `lead`; 1 with one cluster.
        familiar: whether the distance is within the 99th percentile of calibration text.
    """

    cluster: int
    distance: float
    margin: float
    familiar: bool

    @property
    def sure(self) -> bool:
        """Whether the margin is large enough to be sure of the cluster."""
        return self.margin >= UNSURE_MARGIN


class Router:
    """Static encoder and index of centroids of one bundle."""

    def __init__(self, bundle: Bundle) -> None:
        """Load the router of a bundle whose checksums were verified.

        Raises:
            BundleCorrupt: a file cannot be parsed, or the files do not fit each other.
        """
        self._distance_p99 = bundle.manifest.router.distance_p99
        self._table = _read_table(bundle)
        try:
            self._tokenizer = Tokenizer.from_str(bundle.read_bytes(LAYOUT.router_tokenizer).decode())
            self._index = read_index(bundle.read_bytes(LAYOUT.router_index))
        except Exception as error:
            # tokenizers and FAISS raise bare Exceptions and RuntimeErrors of their own.
            raise BundleCorrupt(
                f"bundle {bundle.path}: the router cannot be parsed ({error}); compile it again"
            ) from error
        expected = (len(bundle.manifest.clusters), self._table.shape[1])
        if (self._index.ntotal, self._index.d) != expected:
            raise BundleCorrupt(
                f"{bundle.path / LAYOUT.router_index}: expected {expected[0]} centroids of dimension {expected[1]}, "
                f"got {self._index.ntotal} of {self._index.d}; compile the bundle again"
            )

    def route(self, text: str) -> Route:
        """Find the cluster nearest to a text, see `routing_excerpt`; one without known tokens has distance 1 to all."""
        clusters, distances = self._nearest(text, min(2, self._index.ntotal))
        distance = float(distances[0])
        return Route(
            cluster=int(clusters[0]),
            distance=distance,
            margin=lead(distance, float(distances[1])) if len(distances) > 1 else 1.0,
            familiar=distance <= self._distance_p99,
        )

    def distances(self, text: str) -> npt.NDArray[np.float64]:
        """Return a text's distance to every cluster: (clusters,) 1 - cosine."""
        clusters, distances = self._nearest(text, self._index.ntotal)
        return np.asarray(distances[np.argsort(clusters)], dtype=np.float64)

    def _nearest(self, text: str, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Find clusters and their distances, (count,) each, nearest first."""
        token_ids = self._tokenizer.encode(routing_excerpt(text), add_special_tokens=False).ids
        similarities, clusters = self._index.search(embed_token_ids(self._table, [token_ids]), count)
        return clusters[0], np.clip(1.0 - similarities[0].astype(np.float64), 0.0, 2.0)


def lead(near: float, far: float) -> float:
    """Return by which share of `far` a distance is nearer: 0 for equal distances, at most 1.

    A share, because the distances of one encoder may be a hundredth of another's.
    """
    return 1.0 - near / far if far > 0 else 0.0


def _read_table(bundle: Bundle) -> npt.NDArray[Any]:
    path = bundle.path / LAYOUT.router_table
    tensors = TensorFile(path)
    shape = tensors["table"].array.shape if "table" in tensors else ()
    if len(shape) != 2 or tensors["table"].dtype not in ("F16", "F32"):
        raise BundleCorrupt(f"{path}: expected a float tensor 'table' of 2 dimensions; compile the bundle again")
    return tensors["table"].array
