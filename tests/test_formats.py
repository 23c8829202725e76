"""Packing and unpacking of matrices; tests/test_native_kernels.py reads the layout with the kernels."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from coreinfer.bundles.formats import (
    FORMATS,
    cut_rows,
    float_matrix,
    matrix_bytes,
    stored_parts,
    stored_shapes,
    unpack_codes,
)
from coreinfer.bundles.tensors import StoredTensor
from hypothesis import given, settings
from hypothesis import strategies as st

from .packing import pack_int4, pack_int8, pack_planes

SHAPES = [(rows, cols) for rows in (5, 16, 17, 33) for cols in (1, 31, 32, 33, 70)]
shapes = st.tuples(st.integers(1, 40), st.integers(1, 100))


def random_parts(shape: tuple[int, int], seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """Codes of 4 bits, codes of 8 bits, scales, zero points."""
    generator = np.random.default_rng(seed)
    groups = (shape[0], -(-shape[1] // 32))
    return (
        generator.integers(0, 16, shape, dtype=np.uint8),
        generator.integers(-127, 128, shape).astype(np.int8),
        generator.random(groups).astype(np.float16),
        generator.integers(0, 256, groups, dtype=np.uint8),
    )


def named(parts: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    return {f"w{suffix}": tensor for suffix, tensor in parts.items()}


def widened(values: Any, cols: int) -> Any:
    """(rows, groups) -> (rows, cols) float32."""
    return np.repeat(values.astype(np.float32), 32, axis=1)[:, :cols]


@settings(deadline=None)
@given(shape=shapes, seed=st.integers(0, 1000))
def test_what_is_packed_is_unpacked_exactly(shape: tuple[int, int], seed: int) -> None:
    nibbles, codes, scales, zeros = random_parts(shape, seed)
    scale = widened(scales, shape[1])
    four = named(pack_int4(nibbles, scales, zeros))
    expected = scale * (nibbles - widened(zeros, shape[1]) / np.float32(16))
    np.testing.assert_array_equal(float_matrix(four, "w", shape), expected)
    for pack in (pack_int8, pack_planes):
        np.testing.assert_array_equal(float_matrix(named(pack(codes, scales)), "w", shape), scale * codes)


def plain_tile(codes: Any, block: int, group: int, inputs_a_quad: int) -> list[list[int]]:
    """Codes of a tile in the order of docs/format.md, as byte position -> codes in it, padding as None."""
    rows, cols = codes.shape
    tile: list[list[Any]] = [[] for _ in range(512 if inputs_a_quad == 4 else 256)]
    for row in range(16):
        for inner in range(32):
            inside = 16 * block + row < rows and 32 * group + inner < cols
            code = int(codes[16 * block + row, 32 * group + inner]) if inside else None
            tile[inner // inputs_a_quad * 64 + row * 4 + inner % 4].append(code)
    return tile


@pytest.mark.parametrize("shape", SHAPES)
def test_int4_bytes_lie_where_the_format_says(shape: tuple[int, int]) -> None:
    nibbles, _, scales, zeros = random_parts(shape)
    parts = pack_int4(nibbles, scales, zeros)
    blocks, groups, _ = parts[".q4"].array.shape
    for block in range(blocks):
        for group in range(groups):
            for byte, (low, high) in zip(
                parts[".q4"].array[block, group], plain_tile(nibbles, block, group, 8), strict=True
            ):
                assert low is None or byte & 15 == low
                assert high is None or byte >> 4 == high


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_bytes_lie_where_the_format_says(shape: tuple[int, int]) -> None:
    _, codes, scales, _ = random_parts(shape)
    parts, planes = pack_int8(codes, scales), pack_planes(codes, scales)
    blocks, groups, _ = parts[".q8"].array.shape
    for block in range(blocks):
        for group in range(groups):
            tile = plain_tile(codes, block, group, 4)
            for byte, (code,) in zip(parts[".q8"].array[block, group], tile, strict=True):
                assert byte == (128 if code is None else 128 + code)
            halves = zip(planes[".high"].array[block, group], planes[".low"].array[block, group], strict=True)
            for (high, low), (first, second) in zip(halves, plain_tile(codes, block, group, 8), strict=True):
                assert 16 * (high & 15) + (low & 15) == (128 if first is None else 128 + first)
                assert 16 * (high >> 4) + (low >> 4) == (128 if second is None else 128 + second)


def test_padding_rows_weigh_nothing() -> None:
    nibbles, codes, scales, zeros = random_parts((17, 33))
    for parts in (pack_int4(nibbles, scales, zeros), pack_int8(codes, scales), pack_planes(codes, scales)):
        assert parts[".scale"].array.shape == (2, 2, 16)
        assert not parts[".scale"].array[1, :, 1:].any()
        assert (parts[".scale"].array[1, :, 0] == scales[16]).all()
    assert not pack_int4(nibbles, scales, zeros)[".zero"].array[1, :, 1:].any()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_those_of_the_listed_tensors(kind: str, shape: tuple[int, int]) -> None:
    nibbles, codes, scales, zeros = random_parts(shape)
    pack: dict[str, Callable[[], dict[str, StoredTensor]]] = {
        "bf16": lambda: {"": StoredTensor("BF16", np.zeros(shape, dtype=np.uint16))},
        "f32": lambda: {"": StoredTensor("F32", np.zeros(shape, dtype=np.float32))},
        "int4": lambda: pack_int4(nibbles, scales, zeros),
        "int8": lambda: pack_int8(codes, scales),
        "int8-planes": lambda: pack_planes(codes, scales),
    }
    file = named(pack[kind]())
    assert {name: (part.dtype, part.array.shape) for name, part in file.items()} == stored_shapes("w", kind, shape)
    assert matrix_bytes(kind, shape) == sum(part.num_bytes for part in file.values())
    assert stored_parts(file, "w")[0] == kind


def test_codes_come_back_with_their_padding() -> None:
    nibbles, codes, scales, zeros = random_parts((17, 33))
    np.testing.assert_array_equal(
        unpack_codes("int4", pack_int4(nibbles, scales, zeros)[".q4"].array)[:17, :33], nibbles
    )
    every = unpack_codes("int8", pack_int8(codes, scales)[".q8"].array)
    assert every.shape == (32, 64)
    assert (every[17:] == 128).all()
    assert (every[:, 33:] == 128).all()


@pytest.mark.parametrize("kind", FORMATS)
@settings(deadline=None, max_examples=30)
@given(shape=shapes, seed=st.integers(0, 1000), num_rows=st.integers(1, 50))
def test_cut_rows_are_stored_as_if_packed_alone(kind: str, shape: tuple[int, int], seed: int, num_rows: int) -> None:
    row_ids = np.random.default_rng(seed).integers(0, shape[0], num_rows).astype(np.int32)
    parts = random_parts(shape, seed)
    whole, alone = (packed(kind, *some) for some in (parts, [part[row_ids] for part in parts]))
    got = cut_rows(whole, "w", row_ids)
    assert list(got) == list(alone)
    for name, part in alone.items():
        assert got[name].dtype == part.dtype
        np.testing.assert_array_equal(got[name].array, part.array)


def packed(kind: str, nibbles: Any, codes: Any, scales: Any, zeros: Any) -> dict[str, StoredTensor]:
    if kind == "int4":
        return named(pack_int4(nibbles, scales, zeros))
    if kind == "f32":
        return {"w": StoredTensor("F32", codes.astype(np.float32))}
    if kind == "bf16":
        return {"w": StoredTensor("BF16", nibbles.astype(np.uint16))}
    return named((pack_planes if kind == "int8-planes" else pack_int8)(codes, scales))


@pytest.mark.parametrize("shape", [(17, 65), (33, 33), (16, 32)])
def test_parts_of_another_shape_are_refused(shape: tuple[int, int]) -> None:
    nibbles, _, scales, zeros = random_parts((17, 33))
    file = named(pack_int4(nibbles, scales, zeros))
    with pytest.raises(ValueError, match=r"tensor 'w.q4': expected U8"):
        float_matrix(file, "w", shape)
    del file["w.zero"]
    with pytest.raises(KeyError, match=r"w.zero"):
        float_matrix(file, "w", (17, 33))
