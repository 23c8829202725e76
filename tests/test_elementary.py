"""Sines, powers and logarithms of the native engine: numpy's doubles, rounded once."""

import numpy as np
import numpy.typing as npt
import pytest
from coreinfer.runtime.engines.native import _native

Floats = npt.NDArray[np.float32]


def random_angles(most: float) -> Floats:
    """As positions times frequencies are: most of them small, some up to `most`."""
    generator = np.random.default_rng(3)
    spread = most * generator.random(50_000)
    logarithmic = np.exp(generator.uniform(np.log(1e-9), np.log(most), 50_000))
    return np.concatenate([spread, logarithmic]).astype(np.float32)


@pytest.mark.parametrize("most", [4096.0, 1.1e6, 6.7e7])
def test_directions_are_the_nearest_floats(most: float) -> None:
    """Of 200,000 numbers none is another; one in 2^26 may be."""
    angles = random_angles(most)
    expected = np.stack([np.cos(angles.astype(np.float64)), np.sin(angles.astype(np.float64))], axis=-1)
    found = _native.directions(angles)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.astype(np.float32))
    backwards = _native.directions(-angles)
    np.testing.assert_array_equal(backwards, found * np.array([1, -1], dtype=np.float32))


def test_directions_of_multiples_of_a_quarter_turn() -> None:
    """Where a sine or cosine is almost zero, all of its bits come from the parts of pi that are taken away last."""
    angles = (np.arange(200_000) * (np.pi / 2)).astype(np.float32)
    expected = np.stack([np.cos(angles.astype(np.float64)), np.sin(angles.astype(np.float64))], axis=-1)
    np.testing.assert_array_equal(_native.directions(angles), expected.astype(np.float32))


def test_directions_without_an_angle() -> None:
    assert np.isnan(_native.directions(np.array([np.nan, np.inf, -np.inf], dtype=np.float32))).all()
    np.testing.assert_array_equal(_native.directions(np.zeros(1, dtype=np.float32)), [[1, 0]])
    far = np.array([1e8, 3e38], dtype=np.float32)
    expected = np.stack([np.cos(far.astype(np.float64)), np.sin(far.astype(np.float64))], axis=-1)
    np.testing.assert_allclose(_native.directions(far), expected, rtol=1e-6)


@pytest.mark.parametrize("base", [1e4, 5e5, 1e6, 7.3, 0.02])
def test_powers_are_the_nearest_floats(base: float) -> None:
    exponents = (np.arange(0, 256, 2) / 256).astype(np.float32)
    expected = np.power(np.float64(np.float32(base)), exponents.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal([_native.power(base, float(exponent)) for exponent in exponents], expected)


def test_exponentials_and_logarithms() -> None:
    generator = np.random.default_rng(4)
    x = generator.uniform(-700, 700, 2000)
    np.testing.assert_allclose([_native.exponential(value) for value in x], np.exp(x), rtol=2.0**-51)
    assert [_native.exponential(value) for value in (0.0, -709.0, -np.inf)] == [1.0, 0.0, 0.0]
    assert np.isinf(_native.exponential(np.inf))
    assert np.isnan(_native.exponential(np.nan))
    y = np.concatenate([np.exp(x), 1 + generator.uniform(-0.3, 0.3, 2000)])
    np.testing.assert_allclose([_native.logarithm(value) for value in y], np.log(y), rtol=2.0**-51)
    assert _native.logarithm(1.0) == 0.0
    assert _native.logarithm(0.0) == -np.inf
    assert np.isnan(_native.logarithm(-1.0))
