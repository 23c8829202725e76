"""Whether a GGUF file holds one table twice: as embedding and as head, each rounded to bits of its own.

llama.cpp stores the tied table of a model a second time where the head is to have more bits than the embedding. The
format does not say so. It is told by the values: if both are roundings of one table, then they differ nowhere by more
than their steps. A head that was trained, however little, differs from the embedding by more somewhere.
"""

from functools import lru_cache

import numpy as np

from .header import Header, TensorEntry
from .values import check_readable, read_rows

__all__ = ["EMBEDDING", "HEAD", "table_of"]

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_GROUP = 32
_ROWS_AT_ONCE = 4096
# Types of ggml whose error within a group of 32 is bounded by the group's largest value, and their bits.
_BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q6_K": 6, "Q8_0": 8, "BF16": 8, "F16": 11, "F32": 24}
# A symmetric type clips the largest value by up to a step; float16 scales add a little.
_STEPS = 1.1


def table_of(header: Header) -> str | None:
    """Find the tensor that serves as embedding and as head; None if the head is another table.

    Returns:
        The embedding where there is no head; else, where both are roundings of one table, the one with more bits.
    Raises:
        UnsupportedModelError: the type of one of them cannot be unpacked.
    """
    embedding, head = header.tensors.get(EMBEDDING), header.tensors.get(HEAD)
    if head is None:
        return EMBEDDING
    if embedding is None or not _are_one_table(embedding, head, (_written(embedding), _written(head))):
        return None
    return HEAD if _BITS[head.type_name] > _BITS[embedding.type_name] else EMBEDDING


def _written(entry: TensorEntry) -> int:
    return entry.file.stat().st_mtime_ns


# A compile asks for the config and for the weights; the tables of a file that was not written since are compared once.
@lru_cache(maxsize=4)
def _are_one_table(a: TensorEntry, b: TensorEntry, _written_ns: tuple[int, int]) -> bool:
    if a.shape != b.shape or len(a.shape) != 2 or a.shape[1] % _GROUP or not {a.type_name, b.type_name} <= _BITS.keys():
        return False
    for name, entry in ((EMBEDDING, a), (HEAD, b)):
        check_readable(name, entry)
    share = _STEPS * sum(2.0 ** (1 - _BITS[entry.type_name]) for entry in (a, b))
    # A head of its own shows in the first rows, most often.
    return all(_agree(a, b, start, share) for start in range(0, a.shape[0], _ROWS_AT_ONCE))


def _agree(a: TensorEntry, b: TensorEntry, start: int, share: float) -> bool:
    """Whether some rows differ in each group by no more than a share of the group's largest value."""
    rows = slice(start, start + _ROWS_AT_ONCE)
    left, right = (read_rows(entry, rows).astype(np.float32).reshape(-1, _GROUP) for entry in (a, b))
    largest = np.maximum(np.abs(left).max(axis=1), np.abs(right).max(axis=1))
    return bool(np.all(np.abs(left - right).max(axis=1) <= share * largest))
