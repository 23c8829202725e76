"""Rounding to 4 and 8 bits."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from coreinfer.bundles.formats import float_matrix, matrix_bytes
from coreinfer.bundles.tensors import StoredTensor
from coreinfer.compiler.quantize.quantize import store_matrix


def weights(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((rows, cols), generator=torch.Generator().manual_seed(seed)) * 0.05


def unpacked(parts: Mapping[str, StoredTensor], shape: tuple[int, int]) -> torch.Tensor:
    return torch.from_numpy(float_matrix(parts, "w", shape))


def nearest_int4(weight: torch.Tensor) -> torch.Tensor:
    """Plain rounding between the least and the greatest weight of each group."""
    groups = weight.reshape(weight.shape[0], -1, 32)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / 15).clamp_min(1e-12)
    return (((groups - low) / step).round() * step + low).reshape(weight.shape)


@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (16, 32), (17, 33), (40, 200)])
@pytest.mark.parametrize(("kind", "error"), [("int4", 0.12), ("int8", 0.008), ("int8-planes", 0.008), ("bf16", 0.004)])
def test_rounding_is_close_at_odd_sizes(kind: str, error: float, shape: tuple[int, int]) -> None:
    weight = weights(*shape)
    parts = store_matrix("w", weight, kind, None)
    assert sum(part.num_bytes for part in parts.values()) == matrix_bytes(kind, shape)
    assert (unpacked(parts, shape) - weight).norm() <= error * weight.norm() + 1e-9


def test_outputs_err_less_than_with_nearest_rounding() -> None:
    weight, moments = weights(64, 256), torch.logspace(-3, 2, 256)[torch.randperm(256)]
    inputs = torch.randn(512, 256) * moments.sqrt()
    plain = (inputs @ (nearest_int4(weight) - weight).T).norm()
    chosen = unpacked(store_matrix("w", weight, "int4", moments), (64, 256))
    unweighted = unpacked(store_matrix("w", weight, "int4", None), (64, 256))
    assert (inputs @ (chosen - weight).T).norm() < 0.85 * plain
    assert (unweighted - weight).norm() < 0.97 * (nearest_int4(weight) - weight).norm()


def test_weights_of_four_bits_are_found_again() -> None:
    codes = torch.randint(0, 16, (32, 4, 32), generator=torch.Generator().manual_seed(3)).float()
    codes[..., 0], codes[..., 1] = 0, 15
    scales = torch.full((32, 4, 1), 0.01).half().float()
    weight = (scales * codes - 0.07).reshape(32, 128)
    got = unpacked(store_matrix("w", weight, "int4", None), (32, 128))
    assert (got - weight).abs().max() <= 0.01 / 32 + 1e-6


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("value", [0.0, 1e-7, 0.25, -0.25, 100.0])
def test_constant_and_tiny_weights(kind: str, value: float) -> None:
    got = unpacked(store_matrix("w", torch.full((3, 40), value), kind, None), (3, 40))
    np.testing.assert_allclose(got, value, rtol=0.01, atol=5e-7)
