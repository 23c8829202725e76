"""The static encoder: a text is embedded as the mean of its tokens' rows in a table; a long one by its two ends.

The idea is that of model2vec (https://github.com/MinishLab/model2vec); its table is distilled by the compiler.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["EXCERPT_CHARACTERS", "embed_token_ids", "routing_excerpt"]

EXCERPT_CHARACTERS = 4096
"""Of a long text's beginning, and again of its end: they say what it is about."""


def routing_excerpt(text: str) -> str:
    """Cut a text to the part that routes it, at run time and in the compiler.

    Without a limit, a text of 1,000,000 one-letter words takes seconds and gigabytes.
    """
    if len(text) <= 2 * EXCERPT_CHARACTERS:
        return text
    # Between the two, so that the words at the cuts do not become one.
    return f"{text[:EXCERPT_CHARACTERS]} {text[-EXCERPT_CHARACTERS:]}"


def embed_token_ids(table: npt.NDArray[Any], batch: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
    """Embed texts that are given as token ids.

    Args:
        table: (vocabulary, dimension) of any float dtype.
        batch: token ids of each text; ids beyond the table are left out, a text without ids embeds to zeros.
    Returns:
        (texts, dimension) float32, rows of L2 norm 1.
    """
    vectors = np.zeros((len(batch), table.shape[1]), dtype=np.float32)
    for row, token_ids in enumerate(batch):
        ids = np.asarray([token_id for token_id in token_ids if token_id < len(table)], dtype=np.int64)
        if ids.size:
            vectors[row] = table[ids].astype(np.float32).mean(axis=0)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-12), dtype=np.float32)
