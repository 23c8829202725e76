"""Kernels of x86-64 give the same floats, whatever the width of their vectors."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from coreinfer.bundles import open_bundle
from coreinfer.runtime.engines.native import _native
from coreinfer.runtime.engines.native.decoder import NativeDecoder

# The portable ones have no fused multiply-add.
TABLES = [name for name in _native.available_isas() if name not in ("portable", "neon")]


@pytest.mark.skipif(len(TABLES) < 2, reason="one table alone")
@pytest.mark.parametrize(
    ("family", "quantize"), [("llama", "int4"), ("opt", "int4"), ("gemma2", "int4"), ("olmo2", "int8")]
)
def test_all_widths_give_the_same_bits(family: str, quantize: str, tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle(family, quantize=quantize))
    found = []
    for name in TABLES:
        decoder = NativeDecoder(bundle, threads=2, isa=name)
        block = decoder.forward(list(range(3, 60)), all_logits=True)
        single = [decoder.forward([token_id]) for token_id in (7, 8, 9)]
        found.append(np.concatenate([block, *single]))
    for name, logits in zip(TABLES[1:], found[1:], strict=True):
        assert np.array_equal(logits, found[0]), f"{name} against {TABLES[0]}"
