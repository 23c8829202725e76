"""Every kernel that this CPU runs, against numpy and against the portable one."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from coreinfer.bundles.formats import float_matrix, stored_parts, stored_shapes
from coreinfer.bundles.tensors import StoredTensor, bf16_to_float32
from coreinfer.runtime.engines.native import _native

from .bundle_factory import float32_to_bf16
from .packing import pack_int4, pack_int8, pack_planes

SHAPES = [(5, 1), (17, 31), (16, 32), (33, 33), (64, 96), (100, 70)]
FORMATS = ["bf16", "int8", "int8-planes", "int4"]
Floats = npt.NDArray[np.float32]


def stored_matrix(kind: str, shape: tuple[int, int], seed: int = 0) -> dict[str, StoredTensor]:
    generator = np.random.default_rng(seed)
    groups = -(-shape[1] // 32)
    if kind == "bf16":
        return {"w": StoredTensor("BF16", float32_to_bf16(generator.standard_normal(shape, dtype=np.float32)))}
    scales = (generator.random((shape[0], groups)) * 0.02).astype(np.float16)
    if kind == "int8":
        parts = pack_int8(generator.integers(-127, 128, shape).astype(np.int8), scales)
    elif kind == "int8-planes":
        parts = pack_planes(generator.integers(-127, 128, shape).astype(np.int8), scales)
    else:
        zeros = generator.integers(0, 256, (shape[0], groups)).astype(np.uint8)
        parts = pack_int4(generator.integers(0, 16, shape).astype(np.uint8), scales, zeros)
    return {f"w{suffix}": tensor for suffix, tensor in parts.items()}


def native_matrix(file: dict[str, StoredTensor], shape: tuple[int, int]) -> tuple[Any, ...]:
    kind, parts = stored_parts(file, "w")
    return (kind, *shape, *(part.array for part in parts))


def plain_int4(file: dict[str, StoredTensor], row: int, col: int) -> float:
    """The layout of docs/format.md, read literally."""
    block, lane, group, inner = row // 16, row % 16, col // 32, col % 32
    byte = int(file["w.q4"].array[block, group, inner // 8 * 64 + lane * 4 + inner % 4])
    code = byte >> 4 if inner % 8 >= 4 else byte & 15
    scale, zero = file["w.scale"].array[block, group, lane], file["w.zero"].array[block, group, lane]
    return float(scale) * (code - float(zero) / 16)


def plain_int8(file: dict[str, StoredTensor], row: int, col: int) -> float:
    block, lane, group, inner = row // 16, row % 16, col // 32, col % 32
    byte = int(file["w.q8"].array[block, group, inner // 4 * 64 + lane * 4 + inner % 4])
    return float(file["w.scale"].array[block, group, lane]) * (byte - 128)


def plain_planes(file: dict[str, StoredTensor], row: int, col: int) -> float:
    block, lane, group, inner = row // 16, row % 16, col // 32, col % 32
    at, shift = (block, group, inner // 8 * 64 + lane * 4 + inner % 4), 4 if inner % 8 >= 4 else 0
    high, low = (int(file[name].array[at]) >> shift & 15 for name in ("w.high", "w.low"))
    return float(file["w.scale"].array[block, group, lane]) * (16 * high + low - 128)


PLAIN = {"int4": plain_int4, "int8": plain_int8, "int8-planes": plain_planes}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", FORMATS)
def test_layout_and_unpacking(kind: str, shape: tuple[int, int]) -> None:
    file = stored_matrix(kind, shape)
    listed = {name: (tensor.dtype, tensor.array.shape) for name, tensor in file.items()}
    assert listed == stored_shapes("w", kind, shape)
    values = float_matrix(file, "w", shape)
    np.testing.assert_array_equal(_native.unpack(native_matrix(file, shape)), values)
    if kind == "bf16":
        np.testing.assert_array_equal(values, bf16_to_float32(file["w"].array))
        return
    expected = [[PLAIN[kind](file, row, col) for col in range(shape[1])] for row in range(shape[0])]
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def quantized(inputs: Floats) -> Floats:
    """What int8 with a scale a group of 32 makes of activations."""
    padded = np.pad(inputs, ((0, 0), (0, -inputs.shape[1] % 32))).reshape(inputs.shape[0], -1, 32)
    scales = np.abs(padded).max(axis=2, keepdims=True) / 127
    rounded = np.rint(padded / np.maximum(scales, 1e-30)) * scales
    return np.asarray(rounded.reshape(inputs.shape[0], -1)[:, : inputs.shape[1]], dtype=np.float32)


@pytest.mark.parametrize("num_tokens", [1, 3, 8, 19])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("isa", _native.available_isas())
def test_products(isa: str, kind: str, shape: tuple[int, int], num_tokens: int) -> None:
    file = stored_matrix(kind, shape)
    inputs = np.random.default_rng(1).standard_normal((num_tokens, shape[1]), dtype=np.float32)
    got = _native.multiply(native_matrix(file, shape), inputs, isa)
    rounded = inputs if kind == "bf16" else quantized(inputs)
    expected = rounded.astype(np.float64) @ float_matrix(file, "w", shape).astype(np.float64).T
    assert got.shape == (num_tokens, shape[0])
    # A code next to a half may be rounded either way.
    np.testing.assert_allclose(got, expected, atol=4e-3 * np.abs(expected).max())
    portable = _native.multiply(native_matrix(file, shape), inputs, "portable")
    np.testing.assert_allclose(got, portable, atol=1e-5 * np.abs(expected).max())


def test_inputs_of_zeros_and_infinities_do_no_harm() -> None:
    file = stored_matrix("int4", (16, 64))
    for isa in _native.available_isas():
        zeros = np.zeros((1, 64), dtype=np.float32)
        assert not _native.multiply(native_matrix(file, (16, 64)), zeros, isa).any()
        broken = np.full((1, 64), np.inf, dtype=np.float32)
        assert not np.isfinite(_native.multiply(native_matrix(file, (16, 64)), broken, isa)).any()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: (m[0], 17, *m[2:]), "bytes, got"),
        (lambda m: (m[0], 0, *m[2:]), "rows and columns"),
        (lambda m: (m[0], m[1], -4, *m[3:]), "rows and columns"),
        (lambda m: ("int3", *m[1:]), "int4, got int3"),
        (lambda m: (*m[:4], m[4][:, :, ::2], m[5]), "contiguous"),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, named: str) -> None:
    matrix = native_matrix(stored_matrix("int4", (16, 64)), (16, 64))
    with pytest.raises(ValueError, match=named):
        _native.multiply(change(matrix), np.zeros((1, 64), dtype=np.float32), "auto")


def test_an_unknown_isa_is_refused() -> None:
    matrix = native_matrix(stored_matrix("int4", (16, 64)), (16, 64))
    with pytest.raises(ValueError, match=r"isa: expected auto, .*portable.* got 'mmx'"):
        _native.multiply(matrix, np.zeros((1, 64), dtype=np.float32), "mmx")


def test_the_plain_read_is_measured() -> None:
    assert 0.05 < _native.read_bandwidth(1, 1 << 24) < 10_000
