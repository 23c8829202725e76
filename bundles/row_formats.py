"""int4 matrices whose rows, or columns, lie in one piece each, so that some can be read alone (docs/format.md).

A row is cut into parts of 16 groups of 32 inputs. A part is laid out as a tile of 16 rows is, with a group in the place
of a row: 256 bytes of codes, then 16 scales and 16 zero points.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["GROUP_SIZE", "ROW_SUFFIXES", "pack_rows", "row_shape", "unpack_rows"]

ROW_SUFFIXES = {"int4-rows": ".rows4", "int4-columns": ".columns4"}
"""Format -> what its tensor's name ends in. Of int4-columns the rows are the matrix's columns."""

GROUP_SIZE = 32
"""Inputs that share a scale."""
_PART_GROUPS = 16
_CODE_BYTES, _SCALE_BYTES = _PART_GROUPS * GROUP_SIZE // 2, 2 * _PART_GROUPS
_PART_BYTES = _CODE_BYTES + _SCALE_BYTES + _PART_GROUPS
_WORDS = GROUP_SIZE // 8
"""Words of a group's codes."""

Bytes = npt.NDArray[np.uint8]


def row_shape(kind: str, shape: tuple[int, int]) -> tuple[int, int, int]:
    """Shape of the tensor that holds a matrix (rows, columns)."""
    rows, columns = shape if kind == "int4-rows" else shape[::-1]
    return rows, -(-columns // (_PART_GROUPS * GROUP_SIZE)), _PART_BYTES


def pack_rows(codes: Bytes, scales: npt.NDArray[np.float16], zeros: Bytes, num_rows: int) -> Bytes:
    """Turn an interleaved int4 matrix into rows.

    Args:
        codes: (blocks, groups, 256), with scales and zeros (blocks, groups, 16).
    Returns:
        (num_rows, parts, 304).
    """
    num_groups = codes.shape[1]
    words = codes.view(np.uint32).reshape(*codes.shape[:2], _WORDS, -1).transpose(0, 3, 1, 2)
    parts = -(-num_groups // _PART_GROUPS)
    out = np.zeros((num_rows, parts, _PART_BYTES), dtype=np.uint8)
    padded = _by_parts(words.reshape(-1, num_groups, _WORDS)[:num_rows], parts)
    out[..., :_CODE_BYTES] = (
        np.ascontiguousarray(padded.transpose(0, 1, 3, 2)).view(np.uint8).reshape(*out.shape[:2], -1)
    )
    for start, values in ((_CODE_BYTES, scales), (_CODE_BYTES + _SCALE_BYTES, zeros)):
        rows = np.ascontiguousarray(values.transpose(0, 2, 1)).reshape(-1, num_groups)[:num_rows]
        stored = np.ascontiguousarray(_by_parts(rows, parts)).view(np.uint8)
        out[..., start : start + stored.shape[2]] = stored
    return out


def _by_parts(values: npt.NDArray[Any], parts: int) -> npt.NDArray[Any]:
    """(rows, groups, ...) -> (rows, parts, 16, ...), padded with zeros."""
    missing = parts * _PART_GROUPS - values.shape[1]
    padded = np.pad(values, [(0, 0), (0, missing), *[(0, 0)] * (values.ndim - 2)])
    return padded.reshape(len(values), parts, _PART_GROUPS, *values.shape[2:])


def unpack_rows(stored: Bytes, num_columns: int) -> npt.NDArray[np.float32]:
    """Read rows (rows, parts, 304) as float32 (rows, num_columns)."""
    num_rows, parts = stored.shape[:2]
    codes = np.ascontiguousarray(stored[..., :_CODE_BYTES]).reshape(num_rows, parts, _WORDS, _PART_GROUPS, 4)
    halves = np.stack([codes & 15, codes >> 4], axis=-2)
    # (rows, parts, words, groups, halves, 4) -> a group's codes beside each other.
    values = halves.transpose(0, 1, 3, 2, 4, 5).reshape(num_rows, -1, GROUP_SIZE).astype(np.float32)
    scales = np.ascontiguousarray(stored[..., _CODE_BYTES : _CODE_BYTES + _SCALE_BYTES]).view(np.float16)
    values -= stored[..., -_PART_GROUPS:].reshape(num_rows, -1, 1).astype(np.float32) / np.float32(16)
    values *= scales.reshape(num_rows, -1, 1).astype(np.float32)
    return values.reshape(num_rows, -1)[:, :num_columns]
