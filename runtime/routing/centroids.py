"""The index of centroids: FAISS, or a product of numpy where it is not installed. Both find the same clusters.

A device may leave FAISS out: a product with some hundred centroids takes microseconds either way.
"""

import struct
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["CentroidIndex", "PlainIndex", "import_faiss", "read_index", "read_plain"]

Floats = npt.NDArray[np.float32]
# FAISS's file of an IndexFlatIP: its name, dimension, number of vectors, two unused numbers, whether it is trained,
# and the metric, which is 0 for the inner product; then the number of floats, and the floats.
_HEADER = struct.Struct("<4siqqqBi")
_COUNT = struct.Struct("<Q")
_FLAT_INNER_PRODUCT = b"IxFI"


class CentroidIndex(Protocol):
    """What the router needs of FAISS's index.

    Attributes:
        ntotal: number of centroids.
        d: their dimension.
    """

    ntotal: int
    d: int

    def search(self, x: Floats, k: int, /) -> tuple[Floats, npt.NDArray[np.int64]]:
        """Find the k centroids of the largest inner product with each vector, largest first.

        Args:
            x: (vectors, d).
        Returns:
            Products and ids, (vectors, k) each.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class PlainIndex:
    """The same with numpy.

    Attributes:
        centroids: (ntotal, d).
    """

    centroids: Floats

    @property
    def ntotal(self) -> int:
        """Number of centroids."""
        return int(self.centroids.shape[0])

    @property
    def d(self) -> int:
        """Their dimension."""
        return int(self.centroids.shape[1])

    def search(self, x: Floats, k: int, /) -> tuple[Floats, npt.NDArray[np.int64]]:
        """Find the k centroids of the largest inner product; of equals the first, where FAISS names any."""
        products = np.asarray(x, dtype=np.float32) @ self.centroids.T
        ids = np.argsort(-products, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(products, ids, axis=1), ids.astype(np.int64)


def import_faiss() -> Any:
    """Import FAISS; None where it is not installed."""
    if find_spec("faiss") is None:
        return None
    import faiss

    return faiss


def read_index(data: bytes) -> Any:
    """Parse a FAISS index whose checksum was verified, as a `CentroidIndex`.

    Raises:
        Exception: it is none; FAISS raises RuntimeErrors of its own.
    """
    faiss = import_faiss()
    return read_plain(data) if faiss is None else faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))


def read_plain(data: bytes) -> PlainIndex:
    """Parse the file of an IndexFlatIP without FAISS.

    Raises:
        ValueError: it is another kind of index, or damaged.
    """
    start = _HEADER.size + _COUNT.size
    if len(data) < start:
        raise ValueError(f"{len(data)} bytes are too few for an index")
    name, dimension, num_vectors, _, _, is_trained, metric = _HEADER.unpack_from(data)
    (num_floats,) = _COUNT.unpack_from(data, _HEADER.size)
    if (name, is_trained, metric) != (_FLAT_INNER_PRODUCT, 1, 0):
        raise ValueError(f"expected a flat index of inner products, got {name!r}; install coreinfer[faiss] for others")
    if dimension < 1 or num_vectors < 0 or num_floats != dimension * num_vectors or len(data) < start + 4 * num_floats:
        raise ValueError(f"{len(data)} bytes do not hold {num_vectors} vectors of dimension {dimension}")
    vectors = np.frombuffer(data, dtype="<f4", count=num_floats, offset=start)
    return PlainIndex(centroids=vectors.reshape(num_vectors, dimension))
