"""Norms of the columns of stored matrices, by which a token chooses its inputs; see `bundles/token_shares.py`."""

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
from coreinfer.bundles.contract import norms_role, tensor_name
from coreinfer.bundles.formats import float_matrix
from coreinfer.bundles.tensors import StoredTensor

__all__ = ["ColumnNorms"]


class ColumnNorms:
    """Sums the squares of columns over all matrices that have the same inputs."""

    def __init__(self) -> None:
        """Begin without matrices."""
        self._squares: dict[tuple[int, str], npt.NDArray[np.float64]] = {}

    def add(
        self, layer: int, group: str, stored: Mapping[str, StoredTensor], name: str, shape: tuple[int, int]
    ) -> None:
        """Add a matrix as it is stored, rounded where its format rounds.

        Args:
            group: of `INPUT_GROUPS`; of an expert after `experts.E.`.
            stored: holds its tensors under `name`.
            shape: (outputs, inputs).
        """
        values = float_matrix(stored, name, shape)
        squares = np.einsum("oi,oi->i", values, values, dtype=np.float64)
        self._squares[layer, group] = self._squares.get((layer, group), 0) + squares

    def take(self) -> Iterator[tuple[str, StoredTensor]]:
        """Yield the norms of the matrices that were added, and forget them."""
        for (layer, group), squares in self._squares.items():
            yield tensor_name(layer, norms_role(group)), StoredTensor("F32", np.sqrt(squares).astype(np.float32))
        self._squares = {}
