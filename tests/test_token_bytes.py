from collections.abc import Callable
from pathlib import Path

import pytest
from coreinfer.bundles import open_bundle
from coreinfer.bundles.token_bytes import token_bytes
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice

from .model_factory import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantize", ["bf16", "int4"])
def test_the_manifest_counts_what_the_native_engine_reads(
    family: str, quantize: str, tiny_bundle: Callable[..., Path]
) -> None:
    bundle = open_bundle(tiny_bundle(family, quantize=quantize, evaluate=False))
    counted = token_bytes(bundle.manifest)
    decoder = NativeDecoder(bundle, threads=1, isa="auto")
    for choice, expected in ((FfnChoice(cluster=0), counted.pack), (DENSE, counted.dense)):
        decoder.use(choice)
        assert decoder.bytes_per_token(0, greedy=True) == expected
    # The native engine pads each value to 16 numbers, which real heads need not.
    assert bundle.manifest.model.head_dim == 8
    num_layers = bundle.manifest.model.num_layers
    # No norm bounds what the first layer of a post-norm model reads: its keys and values are kept in float32.
    num_halves = num_layers + (family == "opt-post-norm")
    expected = counted.cached_token * (8 + 16) // (8 + 8) * num_halves // num_layers
    assert decoder.bytes_per_token(1) - decoder.bytes_per_token(0) == expected
