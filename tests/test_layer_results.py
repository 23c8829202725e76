"""Layer results come back from the cache as they were."""

from pathlib import Path

import numpy as np
import pytest
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.prune.layer_results import LayerResult, arrays_of, results_of


def result(num_clusters: int, *, ridge: float | None, bias: bool) -> LayerResult:
    generator = np.random.default_rng(num_clusters)
    ids = tuple(np.sort(generator.permutation(96)[: 8 + c]).astype(np.int32) for c in range(num_clusters))
    repaired = range(num_clusters if ridge is not None else 0)
    return LayerResult(
        neuron_ids=ids,
        ridge=ridge,
        cluster_weight=0.6,
        downs=tuple(generator.integers(0, 2**16, (8 + c, 4)).astype(np.uint16) for c in repaired),
        biases=tuple(generator.random(4).astype(np.float32) for _ in repaired) if bias else (),
    )


def assert_same(found: LayerResult, wanted: LayerResult) -> None:
    assert (found.ridge, found.cluster_weight) == (wanted.ridge, wanted.cluster_weight)
    for name in ("neuron_ids", "downs", "biases"):
        first, second = getattr(found, name), getattr(wanted, name)
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


# More than ten clusters: their order is not that of their names.
@pytest.mark.parametrize("num_clusters", [1, 12])
@pytest.mark.parametrize(("ridge", "bias"), [(None, False), (0.01, False), (0.01, True)])
def test_results_come_back_as_they_were(num_clusters: int, ridge: float | None, bias: bool, tmp_path: Path) -> None:
    results = {
        "clusters": result(num_clusters, ridge=ridge, bias=bias),
        "one static mask": result(1, ridge=None, bias=False),
    }
    cache = Cache(tmp_path)
    cache.store("key", arrays_of(results))
    stored = cache.find_arrays("key")
    assert stored is not None
    found = results_of(stored, list(results))
    assert found.keys() == results.keys()
    for name, wanted in results.items():
        assert_same(found[name], wanted)


def test_the_models_own_weights_are_none() -> None:
    own = result(2, ridge=None, bias=False)
    assert own.down(1) is None
    assert own.bias(1) is None
    repaired = result(2, ridge=0.1, bias=True)
    np.testing.assert_array_equal(repaired.down(1) if repaired.downs else [], repaired.downs[1])
    np.testing.assert_array_equal(repaired.bias(1) if repaired.biases else [], repaired.biases[1])
