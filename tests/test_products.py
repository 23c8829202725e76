"""Sums of products in C++ equal the plain product: every instruction set, the same bits for any number of threads."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from coreinfer.compiler.prune import _products
from hypothesis import given, settings
from hypothesis import strategies as st

from .bundle_factory import float32_to_bf16

ISAS = _products.available_isas()
FLOAT_ISAS = [isa for isa in ISAS if not isa.endswith("bf16")]
"""One has an instruction for pairs of bfloat16 alone."""
CHUNK = 1024


def bits_and_values(seed: int, rows: int, cols: int) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.float64]]:
    bits = float32_to_bf16(np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32))
    return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def floats_and_values(seed: int, rows: int, cols: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    floats = np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)
    return floats, floats.astype(np.float64)


def check(num_tokens: int, num_inputs: int, num_outputs: int, num_rows: int, seed: int, *, floats: bool) -> None:
    make = floats_and_values if floats else bits_and_values
    activations, h = make(seed, num_tokens, num_inputs)
    targets, y = make(seed + 1, num_tokens, num_outputs)
    rows = np.random.default_rng(seed).integers(0, num_tokens, num_rows)
    upper = np.triu_indices(num_inputs)
    for isa in FLOAT_ISAS if floats else ISAS:
        found = []
        for num_threads in (1, 2, 5):
            gram = np.ones((num_inputs, num_inputs), dtype=np.float32)
            cross = np.full((num_inputs, num_outputs), 2, dtype=np.float32)
            _products.add_products(gram, cross, activations, targets, rows, num_threads=num_threads, isa=isa)
            found.append((gram, cross))
        for gram, cross in found:
            np.testing.assert_array_equal(gram, found[0][0], err_msg=isa)
            np.testing.assert_array_equal(cross, found[0][1], err_msg=isa)
        # Products of bfloat16 are exact in float32, those of float32 are not, and nor are their sums.
        tolerance = (5e-5 if floats else 1e-5) * max(1, num_rows)
        np.testing.assert_allclose(found[0][0][upper], (1 + h[rows].T @ h[rows])[upper], atol=tolerance, err_msg=isa)
        np.testing.assert_allclose(found[0][1], 2 + h[rows].T @ y[rows], atol=tolerance, err_msg=isa)


@settings(deadline=None, max_examples=40)
@given(
    num_tokens=st.integers(1, 60),
    num_inputs=st.integers(1, 150),
    num_outputs=st.integers(0, 110),
    num_rows=st.integers(0, 300),
    seed=st.integers(0, 2**32 - 2),
    floats=st.booleans(),
)
def test_every_kernel_sums_the_products(
    num_tokens: int, num_inputs: int, num_outputs: int, num_rows: int, seed: int, floats: bool
) -> None:
    check(num_tokens, num_inputs, num_outputs, num_rows, seed, floats=floats)


@pytest.mark.parametrize("num_rows", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
def test_more_tokens_than_are_packed_at_a_time(num_rows: int) -> None:
    check(500, 97, 49, num_rows, seed=7, floats=False)
    check(500, 97, 49, num_rows, seed=8, floats=True)


def test_what_does_not_fit_is_refused() -> None:
    activations, targets = np.zeros((4, 3), np.uint16), np.zeros((4, 2), np.uint16)
    gram, cross, rows = np.zeros((3, 3), np.float32), np.zeros((3, 2), np.float32), np.arange(4)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((gram, cross, activations, targets, np.array([4])), "rows: expected 0 to 3, got 4"),
        ((gram, cross, activations, targets, np.array([-1])), "rows: expected 0 to 3, got -1"),
        ((gram, cross, activations, targets[:3], rows), "targets: expected 4 rows"),
        ((gram[:2], cross, activations, targets, rows), "gram: expected 3 rows"),
        ((gram, cross.T, activations, targets, rows), "cross: expected"),
        ((gram.astype(np.float64), cross, activations, targets, rows), "gram: expected a C-contiguous array"),
        ((gram, cross, activations, targets.astype(np.float32), rows), "targets: expected a C-contiguous array"),
        ((gram, cross, activations.astype(np.float32), targets, rows), "targets: expected a C-contiguous array"),
        ((gram, cross, activations.astype(np.int16), targets, rows), "activations: expected a C-contiguous array"),
        ((gram, cross, activations.astype(np.float32).T, targets, rows), "activations: expected a C-contiguous array"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            _products.add_products(*arguments, num_threads=1)
    with pytest.raises(ValueError, match="isa: expected auto"):
        _products.add_products(gram, cross, activations, targets, rows, num_threads=1, isa="none")
    floats = activations.astype(np.float32), targets.astype(np.float32)
    with pytest.raises(ValueError, match="isa: expected auto"):
        _products.add_products(gram, cross, *floats, rows, num_threads=1, isa="avx512-bf16")
    with pytest.raises(ValueError, match="threads: expected 1 to 256, got 0"):
        _products.add_products(gram, cross, activations, targets, rows, num_threads=0)
