"""Symmetric matrices as what is on and above their diagonal: half of what is added, kept in files and sent.

Rows go in blocks, each from its first column on the diagonal to the last one of the matrix: blocks are copied whole,
and a matrix of 1,536 columns takes 52% of its room.
"""

from collections.abc import Iterator

import torch
from coreinfer.compiler.samples import PACKED_ROWS

__all__ = ["num_packed", "pack_upper", "unpack_upper"]


def _blocks(side: int) -> Iterator[tuple[int, int, int]]:
    """First row, first row of the next block, and where the block begins among the packed values."""
    position = 0
    for start in range(0, side, PACKED_ROWS):
        end = min(start + PACKED_ROWS, side)
        yield start, end, position
        position += (end - start) * (side - start)


def num_packed(side: int) -> int:
    """Values of a packed matrix."""
    return sum((end - start) * (side - start) for start, end, _ in _blocks(side))


def pack_upper(matrix: torch.Tensor) -> torch.Tensor:
    """Pack a matrix.

    Args:
        matrix: (side, side); what is below the diagonal is not looked at.
    Returns:
        (`num_packed`,) values of the same dtype.
    """
    side = len(matrix)
    packed = matrix.new_empty(num_packed(side))
    for start, end, position in _blocks(side):
        block = packed[position : position + (end - start) * (side - start)]
        block.view(end - start, side - start).copy_(matrix[start:end, start:])
    return packed


def unpack_upper(packed: torch.Tensor, side: int) -> torch.Tensor:
    """Put packed values on and above the diagonal, and below it as well: (side, side)."""
    matrix = packed.new_empty((side, side))
    for start, end, position in _blocks(side):
        block = packed[position : position + (end - start) * (side - start)].view(end - start, side - start)
        corner = block[:, : end - start].triu()
        matrix[start:end, start:end] = corner + corner.triu(1).T
        matrix[start:end, end:] = block[:, end - start :]
        matrix[end:, start:end] = block[:, end - start :].T
    return matrix
