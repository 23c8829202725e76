"""A bundle's weights as blocks of ggml: the same grids, so that nothing is rounded a second time but offsets of int4.

A block is 32 weights of a row. Q4_1 (d, m: float16; 4-bit q): w = d q + m. Q8_0 (d: float16; 8-bit q): w = d q.
The bundle's int4, w = scale (code - zero / 16), is Q4_1 with d = scale and m = -scale zero / 16 rounded to float16: an
error of at most 2^-11 of m, 1/128 of a step. Its int8 formats are Q8_0 to the bit.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from coreinfer.bundles.formats import GROUP_SIZE, int4_grid, int8_grid, stored_parts
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from .parameters import Parameter, read_floats

__all__ = ["block_bytes", "block_type", "encode"]

_TYPES = {
    "int4": GGMLQuantizationType.Q4_1,
    "int8": GGMLQuantizationType.Q8_0,
    "int8-planes": GGMLQuantizationType.Q8_0,
    "bf16": GGMLQuantizationType.BF16,
    "f32": GGMLQuantizationType.F32,
}
_CENTRE = 128
Rows = npt.NDArray[np.integer[Any]]


def block_type(parameter: Parameter) -> GGMLQuantizationType:
    """Return the type that holds what the bundle holds; float32 for rows that are not whole blocks, and for routers."""
    if len(parameter.shape) == 1 or parameter.rows is not None:
        return GGMLQuantizationType.F32
    kind = _TYPES[stored_parts(parameter.file, parameter.stored)[0]]
    return GGMLQuantizationType.F32 if parameter.padded[-1] % GGML_QUANT_SIZES[kind][0] else kind


def block_bytes(parameter: Parameter) -> int:
    """Bytes of a parameter in the file."""
    per_block, num_bytes = GGML_QUANT_SIZES[block_type(parameter)]
    return int(np.prod(parameter.padded, dtype=np.int64)) // int(per_block) * int(num_bytes)


def encode(parameter: Parameter, rows: Rows | None = None, offset: float = 0.0) -> npt.NDArray[Any]:
    """Write a parameter as ggml has it.

    Args:
        rows: order in which its rows are written; None for their own.
        offset: added to every value of a vector.
    Returns:
        Its bytes, or float32 values.
    """
    kind = block_type(parameter)
    if kind in (GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0):
        blocks = _grid_blocks(parameter, kind)
        return blocks if rows is None else np.ascontiguousarray(blocks[rows])
    values = read_floats(parameter)
    if offset:
        values = values + np.float32(offset)
    if rows is not None:
        values = values[rows]
    if kind == GGMLQuantizationType.BF16:
        # Exact: it was bfloat16.
        return (np.ascontiguousarray(values).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return np.ascontiguousarray(values, dtype=np.float32)


def _grid_blocks(parameter: Parameter, kind: GGMLQuantizationType) -> npt.NDArray[np.uint8]:
    """Return (rows, groups, bytes of a block)."""
    shape = (parameter.shape[0], parameter.shape[1])
    if kind == GGMLQuantizationType.Q4_1:
        codes, scales, zeros = int4_grid(parameter.file, parameter.stored, shape)
        blocks = _q4_1(_by_groups(codes), scales, -scales * zeros)
    else:
        codes, scales = int8_grid(parameter.file, parameter.stored, shape)
        blocks = _q8_0(_by_groups(codes), scales)
    blocks = blocks[: shape[0]]
    groups = parameter.padded[1] // GROUP_SIZE
    more = [(0, parameter.padded[0] - blocks.shape[0]), (0, groups - blocks.shape[1]), (0, 0)]
    # A block of zero bytes is a block of zeros.
    return np.pad(blocks, more)


def _by_groups(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return codes.reshape(codes.shape[0], -1, GROUP_SIZE)


def _q4_1(
    codes: npt.NDArray[np.uint8], scales: npt.NDArray[np.float32], offsets: npt.NDArray[np.float32]
) -> npt.NDArray[np.uint8]:
    half = GROUP_SIZE // 2
    nibbles = codes[..., :half] | codes[..., half:] << np.uint8(4)
    return np.concatenate([_half_bytes(scales), _half_bytes(offsets), nibbles], axis=-1)


def _q8_0(codes: npt.NDArray[np.uint8], scales: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    signed = (codes.astype(np.int16) - _CENTRE).astype(np.int8).view(np.uint8)
    return np.concatenate([_half_bytes(scales), signed], axis=-1)


def _half_bytes(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """(rows, groups) -> (rows, groups, 2) bytes of float16."""
    return values.astype("<f2")[..., None].view(np.uint8)
