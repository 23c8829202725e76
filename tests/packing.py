"""Packing of codes into the layout of docs/format.md, in plain numpy: what the kernels of the compiler must store."""

import numpy as np
import numpy.typing as npt
from coreinfer.bundles.formats import BLOCK_ROWS, GROUP_SIZE
from coreinfer.bundles.tensors import StoredTensor

# Typed, so that shifted bytes stay bytes.
NIBBLE, LOW = np.uint8(4), np.uint8(15)
Bytes = npt.NDArray[np.uint8]


def pack_int4(codes: Bytes, scales: npt.NDArray[np.float16], zeros: Bytes) -> dict[str, StoredTensor]:
    """Pack w = scale * (code - zero / 16).

    Args:
        codes: (rows, cols) uint8, 0 to 15.
        scales: (rows, groups) float16.
        zeros: (rows, groups) uint8, zero points in sixteenths.
    Returns:
        Suffix of the tensor's name -> tensor.
    """
    blocks, groups = num_tiles((codes.shape[0], codes.shape[1]))
    return {
        ".q4": StoredTensor("U8", interleave_nibbles(padded_codes(codes, 0), (blocks, groups))),
        ".scale": StoredTensor("F16", interleave_groups(scales)),
        ".zero": StoredTensor("U8", interleave_groups(zeros)),
    }


def pack_int8(codes: npt.NDArray[np.int8], scales: npt.NDArray[np.float16]) -> dict[str, StoredTensor]:
    """Pack w = scale * code.

    Args:
        codes: (rows, cols) int8, -127 to 127.
        scales: (rows, groups) float16.
    Returns:
        Suffix of the tensor's name -> tensor.
    """
    blocks, groups = num_tiles((codes.shape[0], codes.shape[1]))
    padded = padded_codes((codes.astype(np.int16) + 128).astype(np.uint8), 128)
    tiles = padded.reshape(blocks, BLOCK_ROWS, groups, 8, 4)
    interleaved = tiles.transpose(0, 2, 3, 1, 4).reshape(blocks, groups, 512)
    return {
        ".q8": StoredTensor("U8", np.ascontiguousarray(interleaved)),
        ".scale": StoredTensor("F16", interleave_groups(scales)),
    }


def pack_planes(codes: npt.NDArray[np.int8], scales: npt.NDArray[np.float16]) -> dict[str, StoredTensor]:
    """Pack w = scale * code with the high and the low halves of the bytes apart; arguments as of `pack_int8`."""
    padded = padded_codes((codes.astype(np.int16) + 128).astype(np.uint8), 128)
    tiles = num_tiles((codes.shape[0], codes.shape[1]))
    return {
        ".high": StoredTensor("U8", interleave_nibbles(padded >> NIBBLE, tiles)),
        ".scale": StoredTensor("F16", interleave_groups(scales)),
        ".low": StoredTensor("U8", interleave_nibbles(padded & LOW, tiles)),
    }


def interleave_nibbles(padded: Bytes, tiles_shape: tuple[int, int]) -> Bytes:
    blocks, groups = tiles_shape
    # A byte holds inputs i and i + 4 of eight: (blocks, 16, groups, 4, 2, 4).
    tiles = padded.reshape(blocks, BLOCK_ROWS, groups, 4, 2, 4)
    joined = tiles[..., 0, :] | (tiles[..., 1, :] << 4)
    return np.ascontiguousarray(joined.transpose(0, 2, 3, 1, 4).reshape(blocks, groups, 256))


def padded_codes(codes: Bytes, filler: int) -> Bytes:
    blocks, groups = num_tiles((codes.shape[0], codes.shape[1]))
    padded = np.full((blocks * BLOCK_ROWS, groups * GROUP_SIZE), filler, dtype=np.uint8)
    padded[: codes.shape[0], : codes.shape[1]] = codes
    return padded


def interleave_groups(values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """(rows, groups) -> (blocks, groups, 16), padded with zeros."""
    blocks = -(-values.shape[0] // BLOCK_ROWS)
    padded = np.zeros((blocks * BLOCK_ROWS, values.shape[1]), dtype=values.dtype)
    padded[: values.shape[0]] = values
    return np.ascontiguousarray(padded.reshape(blocks, BLOCK_ROWS, -1).transpose(0, 2, 1))


def num_tiles(shape: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // BLOCK_ROWS), -(-shape[1] // GROUP_SIZE)
