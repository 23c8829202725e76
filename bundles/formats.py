"""Storage formats of matrices, and the layout in which the kernels read them (docs/format.md)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .row_formats import GROUP_SIZE, ROW_SUFFIXES, row_shape, unpack_rows
from .tensors import StoredTensor, bf16_to_float32

__all__ = [
    "BLOCK_ROWS",
    "FORMATS",
    "GROUP_SIZE",
    "LOW_BITS",
    "LOW_MEAN",
    "NEURON_FORMAT",
    "PACKED_FORMATS",
    "cut_columns",
    "cut_rows",
    "ffn_formats",
    "ffn_layer_bytes",
    "float_matrix",
    "int4_grid",
    "int8_grid",
    "low_halves",
    "matrix_bytes",
    "stored_parts",
    "stored_shapes",
    "unpack_codes",
]

FORMATS = ("bf16", "f32", "int4", "int8", "int8-planes")
"""Storage formats that this version reads, of all groups of tensors."""
NEURON_FORMAT = "int4-neurons"
"""Of an FFN whose neurons are zero for most of a token's (`zero_neurons`), whose weights can be left out then; see
`ffn_formats`."""
PACKED_FORMATS = ("int4", "int8", "int8-planes")
BLOCK_ROWS = 16
"""Output rows that are interleaved."""
LOW_BITS, LOW_MEAN = np.uint8(3), np.float32(1.5)
"""Of an int4 code: which are not read where a weight is read in half, and what they are taken for then."""

# Four bytes are unpacked at a time.
_NIBBLE, _LOW_HALVES = np.uint32(4), np.uint32(0x0F0F0F0F)
_CACHED_WEIGHTS = 1 << 17
_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1}
_PLAIN = {"bf16": "BF16", "f32": "F32"}
_CODES = {"int4": (".q4", 256), "int8": (".q8", 512), "int8-planes": (".high", 256)}
_PADDING = {"int4": (0, 0, 0), "int8": (0x80808080, 0), "int8-planes": (0x88888888, 0, 0)}
"""What the parts of a matrix hold where it has no rows; of codes, four bytes."""

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def ffn_formats(kind: str, *, gated: bool) -> dict[str, str]:
    """Say how each matrix of an FFN is stored: role -> format of a matrix."""
    roles = ("gate", "up", "down") if gated else ("up", "down")
    if kind != NEURON_FORMAT:
        return dict.fromkeys(roles, kind)
    # Which neurons are zero is known from the first matrix, which is read whole.
    return {roles[0]: "int4", **dict.fromkeys(roles[1:-1], "int4-rows"), "down": "int4-columns"}


def ffn_layer_bytes(kind: str, hidden_size: int, num_neurons: int, *, gated: bool) -> int:
    """Bytes of a layer's FFN matrices."""
    shapes = {"down": (hidden_size, num_neurons)}
    formats = ffn_formats(kind, gated=gated)
    return sum(matrix_bytes(own, shapes.get(role, (num_neurons, hidden_size))) for role, own in formats.items())


def stored_shapes(name: str, kind: str, shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """List the tensors that hold a matrix: name -> dtype tag and shape."""
    if kind in _PLAIN:
        return {name: (_PLAIN[kind], shape)}
    if kind in ROW_SUFFIXES:
        return {name + ROW_SUFFIXES[kind]: ("U8", row_shape(kind, shape))}
    suffix, tile_bytes = _CODES[kind]
    tiles = _num_tiles(shape)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        name + suffix: ("U8", (*tiles, tile_bytes)),
        f"{name}.scale": ("F16", (*tiles, BLOCK_ROWS)),
    }
    if kind == "int4":
        shapes[f"{name}.zero"] = ("U8", (*tiles, BLOCK_ROWS))
    if kind == "int8-planes":
        shapes[f"{name}.low"] = ("U8", (*tiles, tile_bytes))
    return shapes


def matrix_bytes(kind: str, shape: tuple[int, int]) -> int:
    """Bytes that a product with the matrix reads: codes, scales, zero points and padding."""
    return sum(
        int(np.prod(part, dtype=np.int64)) * _ITEM_BYTES[dtype]
        for dtype, part in stored_shapes("", kind, shape).values()
    )


def _num_tiles(shape: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // BLOCK_ROWS), -(-shape[1] // GROUP_SIZE)


def stored_parts(file: Mapping[str, StoredTensor], name: str) -> tuple[str, tuple[StoredTensor, ...]]:
    """Find a matrix in a file.

    Returns:
        Its format, and its tensors: values, or codes, scales and, of int4, zero points, of int8-planes, low halves;
        of int4-rows and int4-columns one that holds all.
    Raises:
        KeyError: the file does not hold it.
    """
    if f"{name}.q4" in file:
        return "int4", (file[f"{name}.q4"], file[f"{name}.scale"], file[f"{name}.zero"])
    if f"{name}.high" in file:
        return "int8-planes", (file[f"{name}.high"], file[f"{name}.scale"], file[f"{name}.low"])
    if f"{name}.q8" in file:
        return "int8", (file[f"{name}.q8"], file[f"{name}.scale"])
    for kind, suffix in ROW_SUFFIXES.items():
        if name + suffix in file:
            return kind, (file[name + suffix],)
    stored = file[name]
    return ("bf16" if stored.dtype == "BF16" else "f32"), (stored,)


def float_matrix(file: Mapping[str, StoredTensor], name: str, shape: tuple[int, int]) -> Floats:
    """Read a matrix of any format as float32 (rows, cols).

    Raises:
        KeyError: the file does not hold it.
        ValueError: its packed parts are not those of that shape.
    """
    kind, parts = stored_parts(file, name)
    if kind == "bf16":
        return bf16_to_float32(parts[0].array)
    if kind == "f32":
        return np.asarray(parts[0].array, dtype=np.float32)
    _check_parts(file, name, kind, shape)
    arrays = [part.array for part in parts]
    if kind == "int4-rows":
        return unpack_rows(arrays[0], shape[1])
    if kind == "int4-columns":
        return np.ascontiguousarray(unpack_rows(arrays[0], shape[0]).T)
    blocks, groups = arrays[0].shape[:2]
    scales = _deinterleave(arrays[1].astype(np.float32))[..., None]
    zeros: Floats = np.full((BLOCK_ROWS * blocks, 1, 1), 128, dtype=np.float32)
    if kind == "int4":
        zeros = _deinterleave(arrays[2].astype(np.float32) / np.float32(16))[..., None]
    values = np.empty((BLOCK_ROWS * blocks, groups, GROUP_SIZE), dtype=np.float32)
    # Some rows at a time, whose floats stay in the core's cache from one operation to the next.
    step = max(1, _CACHED_WEIGHTS // (BLOCK_ROWS * GROUP_SIZE * groups))
    for start in range(0, blocks, step):
        rows = slice(BLOCK_ROWS * start, BLOCK_ROWS * (start + step))
        some = values[rows]
        some[...] = _codes_of(kind, arrays, slice(start, start + step)).reshape(some.shape)
        some -= zeros[rows]
        some *= scales[rows]
    return np.ascontiguousarray(values.reshape(-1, GROUP_SIZE * groups)[: shape[0], : shape[1]])


def _codes_of(kind: str, arrays: Sequence[npt.NDArray[Any]], blocks: slice) -> Bytes:
    """Codes of some row blocks; int8 ones plus 128."""
    codes = arrays[0][blocks]
    return _join_planes(codes, arrays[2][blocks]) if kind == "int8-planes" else unpack_codes(kind, codes)


def cut_rows(file: Mapping[str, StoredTensor], name: str, row_ids: npt.NDArray[np.integer]) -> dict[str, StoredTensor]:
    """Take some rows of a matrix as they are stored: every row has codes, scales and zero points of its own.

    Args:
        row_ids: (kept,) in any order.
    Returns:
        Name -> tensor, as of the matrix of these rows alone.
    Raises:
        KeyError: the file does not hold it.
    """
    kind, parts = stored_parts(file, name)
    if kind in _PLAIN:
        return {name: StoredTensor(parts[0].dtype, parts[0].array[row_ids])}
    if kind == "int4-rows":
        return {name + ROW_SUFFIXES[kind]: StoredTensor(parts[0].dtype, parts[0].array[row_ids])}
    names = stored_shapes(name, kind, (len(row_ids), GROUP_SIZE * parts[0].array.shape[1]))
    return {
        part: StoredTensor(stored.dtype, _cut_tiles(stored.array, row_ids, filler))
        for part, stored, filler in zip(names, parts, _PADDING[kind], strict=True)
    }


def cut_columns(
    file: Mapping[str, StoredTensor], name: str, column_ids: npt.NDArray[np.integer]
) -> dict[str, StoredTensor]:
    """Take some columns of an int4-columns matrix as they are stored.

    Raises:
        KeyError: the file does not hold it in that format.
    """
    stored = file[name + (suffix := ROW_SUFFIXES["int4-columns"])]
    return {name + suffix: StoredTensor(stored.dtype, stored.array[column_ids])}


def _cut_tiles(tiles: npt.NDArray[Any], row_ids: npt.NDArray[np.integer], filler: int) -> npt.NDArray[Any]:
    """Take rows of one part, (blocks, groups, 16 or codes): each has an item of a tile, or words of codes."""
    items = tiles if tiles.shape[2] == BLOCK_ROWS else np.ascontiguousarray(tiles).view(np.uint32)
    lanes = items.reshape(*items.shape[:2], -1, BLOCK_ROWS).transpose(0, 3, 1, 2)
    blocks = -(-len(row_ids) // BLOCK_ROWS)
    rows = np.full((BLOCK_ROWS * blocks, *lanes.shape[2:]), filler, dtype=items.dtype)
    rows[: len(row_ids)] = lanes[row_ids // BLOCK_ROWS, row_ids % BLOCK_ROWS]
    cut = rows.reshape(blocks, BLOCK_ROWS, *rows.shape[1:]).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(cut).view(tiles.dtype).reshape(blocks, *tiles.shape[1:])


def int4_grid(file: Mapping[str, StoredTensor], name: str, shape: tuple[int, int]) -> tuple[Bytes, Floats, Floats]:
    """Read an int4 matrix without multiplying it out: w = scale * (code - zero).

    Returns:
        Codes (16 blocks, 32 groups) uint8, scales and zeros (16 blocks, groups) float32; padding rows have scale 0.
    Raises:
        KeyError: the file does not hold it as int4.
        ValueError: its parts are not those of that shape.
    """
    _check_parts(file, name, "int4", shape)
    codes, scales, sixteenths = (file[name + suffix].array for suffix in (".q4", ".scale", ".zero"))
    zeros = _deinterleave(sixteenths.astype(np.float32) / np.float32(16))
    return unpack_codes("int4", codes), _deinterleave(scales.astype(np.float32)), zeros


def low_halves(file: Mapping[str, StoredTensor], name: str, shape: tuple[int, int]) -> Floats:
    """Read what the two low bits of an int4 matrix's codes add to its weights, less their mean: float32 (rows, cols).

    Without it a weight is ((code & 12) + 1.5 - zero) * scale: what is known of it where it is read in half.

    Raises:
        KeyError: the file does not hold it as int4.
        ValueError: its parts are not those of that shape.
    """
    codes, scales, _ = int4_grid(file, name, shape)
    values = (codes & LOW_BITS).astype(np.float32)
    values -= LOW_MEAN
    by_group = values.reshape(len(values), -1, GROUP_SIZE)
    by_group *= scales[..., None]
    return np.ascontiguousarray(values[: shape[0], : shape[1]])


def int8_grid(file: Mapping[str, StoredTensor], name: str, shape: tuple[int, int]) -> tuple[Bytes, Floats]:
    """Read an int8 or int8-planes matrix without multiplying it out: w = scale * (code - 128).

    Returns:
        Codes (16 blocks, 32 groups) uint8, scales (16 blocks, groups) float32; padding rows have scale 0.
    Raises:
        KeyError: the file does not hold it in either format.
        ValueError: its parts are not those of that shape.
    """
    kind, parts = stored_parts(file, name)
    _check_parts(file, name, kind, shape)
    arrays = [part.array for part in parts]
    return _codes_of(kind, arrays, slice(None)), _deinterleave(arrays[1].astype(np.float32))


def _check_parts(file: Mapping[str, StoredTensor], name: str, kind: str, shape: tuple[int, int]) -> None:
    for part, expected in stored_shapes(name, kind, shape).items():
        got = (file[part].dtype, file[part].array.shape)
        if got != expected:
            raise ValueError(f"tensor {part!r}: expected {expected[0]} {[*expected[1]]}, got {got[0]} {[*got[1]]}")


def unpack_codes(kind: str, packed: Bytes) -> Bytes:
    """Undo the interleaving of int4 or int8: (blocks, groups, 256 or 512) -> (16 blocks, 32 groups), int8 plus 128."""
    words = _row_words(packed)
    if kind == "int8":
        return _bytes_of(np.ascontiguousarray(words))
    halves = np.empty((*words.shape, 2), dtype=np.uint32)
    np.bitwise_and(words, _LOW_HALVES, out=halves[..., 0])
    np.bitwise_and(words >> _NIBBLE, _LOW_HALVES, out=halves[..., 1])
    return _bytes_of(halves)


def _join_planes(high: Bytes, low: Bytes) -> Bytes:
    """Put the halves of int8-planes together: (blocks, groups, 256) each -> (16 blocks, 32 groups) codes plus 128."""
    highs, lows = _row_words(high), _row_words(low)
    codes = np.empty((*highs.shape, 2), dtype=np.uint32)
    np.bitwise_or((highs & _LOW_HALVES) << _NIBBLE, lows & _LOW_HALVES, out=codes[..., 0])
    np.bitwise_or(highs & ~_LOW_HALVES, lows >> _NIBBLE & _LOW_HALVES, out=codes[..., 1])
    return _bytes_of(codes)


def _row_words(packed: Bytes) -> npt.NDArray[np.uint32]:
    """View interleaved bytes row by row, four at a time: (blocks, 16, groups, 4 or 8)."""
    blocks, groups, num_bytes = packed.shape
    words = np.ascontiguousarray(packed).view(np.uint32)
    return words.reshape(blocks, groups, num_bytes // (4 * BLOCK_ROWS), BLOCK_ROWS).transpose(0, 3, 1, 2)


def _bytes_of(words: npt.NDArray[np.uint32]) -> Bytes:
    """View (blocks, 16, groups, ...) words as (16 blocks, 32 groups) bytes."""
    return words.view(np.uint8).reshape(words.shape[0] * BLOCK_ROWS, words.shape[2] * GROUP_SIZE)


def _deinterleave(values: Floats) -> Floats:
    """(blocks, groups, 16) -> (16 blocks, groups)."""
    return np.ascontiguousarray(values.transpose(0, 2, 1)).reshape(-1, values.shape[1])
