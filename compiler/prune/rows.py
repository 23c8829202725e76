"""Which tokens of a text belong to which cluster, and which of them are read narrow."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.compiler.text.corpus import split_point

__all__ = ["Labels", "Rows", "narrow_tokens", "rows_of"]

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Clusters of some documents, by one assignment.

    Attributes:
        calibration, validation: (documents,) cluster ids.
        num_clusters: of the assignment, of which these documents may lack some.
    """

    calibration: npt.NDArray[np.int64]
    validation: npt.NDArray[np.int64]
    num_clusters: int


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of each cluster's tokens, among those of a layer.

    Attributes:
        calibration: of all of its calibration text; without any where what is summed over it is known.
        validation: of what is read narrow of its validation text.
        narrow: of all that is read narrow.
    """

    calibration: Sequence[torch.Tensor] = ()
    validation: Sequence[torch.Tensor]
    narrow: Sequence[torch.Tensor] = ()


def narrow_tokens(starts: npt.NDArray[np.int64]) -> Bools:
    """Which tokens are read narrow, the second half of each document: (tokens,).

    Args:
        starts: where the tokens of each document begin.
    """
    return np.concatenate([np.arange(length) >= split_point(int(length)) for length in np.diff(starts)])


def rows_of(labels: Labels, starts: npt.NDArray[np.int64], device: torch.device) -> Rows:
    """Find the rows of an assignment's clusters.

    Args:
        starts: where the tokens of each document begin, those of the validation text last.
    """
    of_tokens = np.repeat(np.concatenate([labels.calibration, labels.validation]), np.diff(starts))
    is_calibration = np.arange(starts[-1]) < starts[len(labels.calibration)]
    is_narrow = narrow_tokens(starts)
    clusters = [of_tokens == cluster for cluster in range(labels.num_clusters)]

    def rows(chosen: Bools) -> list[torch.Tensor]:
        return [torch.from_numpy((own & chosen).nonzero()[0]).to(device) for own in clusters]

    return Rows(calibration=rows(is_calibration), validation=rows(is_narrow & ~is_calibration), narrow=rows(is_narrow))
