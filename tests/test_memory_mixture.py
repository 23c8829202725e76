"""Passes of all kinds in any order in limited memory, and packs announced in the middle of them."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from coreinfer.bundles import open_bundle
from coreinfer.runtime.engines.native.decoder import NativeDecoder

from .model_factory import VOCABULARY
from .test_memory_limit import CHOICES, least_mb, limited

STEPS = 150


@pytest.mark.parametrize("share", [1.01, 1.1, 1.2, 1.35, 1.6])
def test_any_order_of_passes_is_the_same(share: float, tiny_bundle: Callable[..., Path]) -> None:
    # Layers of bf16 are large enough for limits to fall between one and all of them.
    bundle_dir = tiny_bundle("llama", quantize="bf16")
    free = NativeDecoder(open_bundle(bundle_dir), threads=2)
    bound = limited(open_bundle(bundle_dir), share * least_mb(bundle_dir))
    assert bound._residency is not None
    chance = random.Random(round(100 * share))
    for _ in range(STEPS):
        if chance.random() < 0.4:
            bound.prepare(chance.choice(CHOICES))
        if bound.num_cached > 60:
            free.truncate(0)
            bound.truncate(0)
        ids = [chance.randrange(3, VOCABULARY) for _ in range(chance.choice((1, 1, 1, 2, 9)))]
        choice, as_rows, greedy = chance.choice(CHOICES), chance.random() < 0.3, chance.random() < 0.5
        results = []
        for decoder in (free, bound):
            decoder.use(choice)
            results.append(
                decoder.forward_rows([0] * len(ids), ids) if as_rows else decoder.forward(ids, greedy=greedy)
            )
        assert np.array_equal(results[0], results[1])
        assert bound._model.layer_bytes_used <= bound._residency.plan.layers
