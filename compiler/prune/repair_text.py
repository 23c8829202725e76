"""How much of the text repairs are made of, and choices between ridges are made on."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from coreinfer.compiler.samples import VALIDATION_TOKENS
from coreinfer.compiler.text.corpus import Document

from .narrow import Assignment

__all__ = ["few_calibrated", "few_validated"]

Ids = npt.NDArray[np.int64]


def few_validated(
    documents: Sequence[Document], assignments: Sequence[Assignment]
) -> tuple[Sequence[Document], list[Assignment]]:
    """Leave evenly spread documents of the validation text, of about as many tokens as a choice of ridges needs.

    Returns:
        The documents, and the assignments of these.
    """
    num_tokens = sum(len(document.token_ids) for document in documents)
    step = max(1, num_tokens // VALIDATION_TOKENS)
    return documents[::step], [replace(item, validation=item.validation[::step]) for item in assignments]


def few_calibrated(
    documents: Sequence[Document], assignments: Sequence[Assignment], most_tokens: int | None
) -> tuple[Sequence[Document], list[Assignment]]:
    """Leave evenly spread documents of clusters whose text is longer than some tokens; nothing is left out with None.

    Args:
        assignments: the clusters first; each cluster of each assignment keeps a document.
    Returns:
        The documents, and the assignments of these.
    """
    if most_tokens is None:
        return documents, list(assignments)
    lengths, clusters = np.array([len(document.token_ids) for document in documents]), assignments[0].calibration
    picked = np.zeros(len(documents), dtype=bool)
    for cluster in range(assignments[0].num_clusters):
        picked[_spread(np.flatnonzero(clusters == cluster), lengths, most_tokens)] = True
    for item in assignments:
        for cluster in range(item.num_clusters):
            members = item.calibration == cluster
            if members.any() and not (members & picked).any():
                picked[members.argmax()] = True
    ids = np.flatnonzero(picked)
    return [documents[index] for index in ids.tolist()], [
        replace(item, calibration=item.calibration[ids]) for item in assignments
    ]


def _spread(members: Ids, lengths: Ids, most_tokens: int) -> Ids:
    total = int(lengths[members].sum())
    if total <= most_tokens:
        return members
    count = max(1, round(len(members) * most_tokens / total))
    return members[np.arange(count) * len(members) // count]
