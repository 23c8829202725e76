"""Rounding in C++ stores, bit for bit, what the reference does: every format, instruction set and number of threads."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from coreinfer.bundles.errors import ModelOutputError
from coreinfer.bundles.formats import PACKED_FORMATS, float_matrix, stored_shapes
from coreinfer.bundles.tensors import StoredTensor
from coreinfer.compiler.quantize import _kernels
from coreinfer.compiler.quantize.quantize import store_matrix
from hypothesis import given, settings
from hypothesis import strategies as st

from .bundle_factory import float32_to_bf16
from .reference_rounding import reference_parts

Floats = npt.NDArray[np.float32]
ISAS = _kernels.available_isas()
seeds = st.integers(0, 2**32 - 1)


def random_weights(seed: int, rows: int, cols: int) -> Floats:
    """Weights of very different sizes: from below the least fp16 to beyond the greatest, and many that are 0."""
    generator = np.random.default_rng(seed)
    size = 10.0 ** generator.choice([-42, -9, -6, -2, -2, -2, 0, 4, 6, 20, 37])
    weights = generator.standard_normal((rows, cols)) * size + generator.choice([0, 0, 1]) * size
    weights[generator.random((rows, cols)) < generator.choice([0, 0, 0.5, 1])] = 0
    # Some rows lie on a grid, where errors of different ranges tie.
    on_grid = generator.random(rows) < 0.3
    weights[on_grid] = np.round(weights[on_grid] / size * 3) * size / 3
    return np.asarray(weights, dtype=np.float32)


def random_moments(seed: int, cols: int) -> Floats | None:
    generator = np.random.default_rng(seed)
    kind = generator.integers(0, 4)
    if kind == 0:
        return None
    moments = 10.0 ** generator.uniform(-8, 4, cols) * (generator.random(cols) < 0.8)
    return (moments * (kind > 1)).astype(np.float32)


def check(weights: Floats, kind: str, moments: Floats | None, view: Any = None) -> None:
    """Compare every kernel, on one thread and on two, with the reference."""
    expected = reference_parts(weights, kind, moments)
    assert list(expected) == list(stored_shapes("", kind, (weights.shape[0], weights.shape[1])))
    for isa in ISAS:
        for num_threads in (1, 2):
            arrays = _kernels.round_matrix(
                weights if view is None else view, kind, moments, num_threads=num_threads, isa=isa
            )
            for (suffix, part), array in zip(expected.items(), arrays, strict=True):
                assert array.dtype == part.array.dtype
                np.testing.assert_array_equal(array, part.array, err_msg=f"{kind} {suffix} {isa} {num_threads}")


@pytest.mark.parametrize("kind", PACKED_FORMATS)
@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 40), cols=st.integers(1, 140), seed=seeds)
def test_every_kernel_stores_what_the_reference_does(kind: str, rows: int, cols: int, seed: int) -> None:
    check(random_weights(seed, rows, cols), kind, random_moments(seed + 1, cols))


@pytest.mark.parametrize("kind", PACKED_FORMATS)
@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 40), cols=st.integers(1, 100), seed=seeds)
def test_bfloat16_and_any_strides_are_read_in_place(kind: str, rows: int, cols: int, seed: int) -> None:
    weights = random_weights(seed, rows, cols)
    bits = float32_to_bf16(weights)
    weights = (bits.astype(np.uint32) << 16).view(np.float32)
    moments = random_moments(seed, cols)
    wide = np.zeros((rows, cols, 3), dtype=np.float32)
    wide[..., 1] = weights
    backwards = weights[::-1].copy()[::-1]
    for view in (bits, np.asfortranarray(bits), np.asfortranarray(weights), wide[..., 1], backwards):
        check(weights, kind, moments, view)


@pytest.mark.parametrize("kind", PACKED_FORMATS)
def test_a_halfway_value_goes_to_the_even_code(kind: str) -> None:
    steps = 127 if kind != "int4" else 15
    weights = np.full((1, 32), 0.0, dtype=np.float32)
    # The range is a whole number of steps of 2^-4, and only its ends matter.
    weights[0, :4] = np.array([steps, 2.5, 3.5, 4.5], dtype=np.float32) / 16
    moments = np.full(32, 1e-20, dtype=np.float32)
    moments[0] = 1e6
    check(weights, kind, moments)
    got = unpacked(_kernels.round_matrix(weights, kind, moments, num_threads=1), kind, (1, 32))
    np.testing.assert_array_equal(got[0, :4] * 16, [steps, 2, 4, 4])


def test_weights_of_q4_1_files_are_found_again() -> None:
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 16, (48, 4, 32))
    codes[..., 0], codes[..., 1] = 0, 15
    scales = (generator.random((48, 4, 1)) * 0.05 + 0.01).astype(np.float16).astype(np.float32)
    zeros = generator.integers(16, 224, (48, 4, 1)) / 16
    weights = (scales * (codes - zeros)).astype(np.float32).reshape(48, 128)
    check(weights, "int4", None)
    got = unpacked(_kernels.round_matrix(weights, "int4", None, num_threads=2), "int4", (48, 128))
    np.testing.assert_allclose(got, weights, rtol=0, atol=1e-6)


def unpacked(arrays: tuple[Any, ...], kind: str, shape: tuple[int, int]) -> Floats:
    shapes = stored_shapes("w", kind, shape)
    file: Mapping[str, StoredTensor] = {
        name: StoredTensor(dtype, array) for (name, (dtype, _)), array in zip(shapes.items(), arrays, strict=True)
    }
    return float_matrix(file, "w", shape)


@pytest.mark.parametrize("kind", PACKED_FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_tensors_of_every_dtype_are_stored(kind: str, dtype: torch.dtype) -> None:
    weight = torch.from_numpy(random_weights(4, 20, 50)).clamp(-8, 8).to(dtype)
    parts = store_matrix("w", weight.T.contiguous().T, kind, torch.ones(50, dtype=torch.float64))
    expected = reference_parts(weight.float().numpy(), kind, np.ones(50, dtype=np.float32))
    assert list(parts) == [f"w{suffix}" for suffix in expected]
    for suffix, part in expected.items():
        assert parts[f"w{suffix}"].dtype == part.dtype
        np.testing.assert_array_equal(parts[f"w{suffix}"].array, part.array)


@pytest.mark.parametrize("kind", PACKED_FORMATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (16, 33), (20, 69)])
def test_weights_that_are_not_finite_are_refused(kind: str, value: float, place: tuple[int, int]) -> None:
    """They had no code and became some finite number."""
    weights = np.ones((21, 70), dtype=np.float32)
    weights[place] = value
    for isa in ISAS:
        with pytest.raises(ValueError, match="weights: expected finite numbers"):
            _kernels.round_matrix(weights, kind, None, num_threads=2, isa=isa)
    with pytest.raises(ModelOutputError, match=r"^layers\.0\.up: weights: expected finite numbers, .*; compile with"):
        store_matrix("layers.0.up", torch.from_numpy(weights).bfloat16(), kind, None)
    moments = torch.full((70,), value)
    with pytest.raises(ModelOutputError, match=r"^layers\.0\.up: moments: expected finite numbers of at least 0"):
        store_matrix("layers.0.up", torch.ones(2, 70), kind, moments)


def round_some(**changes: Any) -> None:
    weights, kind, moments = (
        changes.pop(name, value)
        for name, value in (("weights", np.ones((2, 3), np.float32)), ("kind", "int4"), ("moments", None))
    )
    _kernels.round_matrix(weights, kind, moments, **{"num_threads": 1, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "int3"}, r"format: expected int4, int8 or int8-planes, got 'int3'"),
        ({"isa": "abacus"}, r"isa: expected auto, .*portable on this CPU, got 'abacus'"),
        ({"num_threads": 0}, r"threads: expected 1 to 256, got 0"),
        ({"weights": np.ones((2, 3))}, r"weights: expected uint16 bits of bfloat16, or float32, got float64"),
        ({"weights": np.ones((2, 3), ">f4")}, r"weights: expected uint16 bits of bfloat16, or float32, got >f4"),
        ({"weights": np.ones(3, np.float32)}, r"weights: expected rows and columns, got 3 values"),
        ({"weights": np.ones((0, 3), np.float32)}, r"weights: expected rows and columns, got 0 values"),
        ({"moments": np.ones(4, np.float32)}, r"moments: expected 3, one for each column, got 4"),
        ({"moments": np.array([1, 0, np.nan], np.float32)}, r"moments: expected finite numbers of at least 0, got nan"),
        ({"moments": np.array([1, 0, -1], np.float32)}, r"moments: expected finite numbers of at least 0, got -1"),
    ],
)
def test_what_cannot_be_rounded_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        round_some(**changes)
