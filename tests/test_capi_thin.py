"""Thin clusters in the C library, and under a limit of memory: they decode as the dense FFN does."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from coreinfer import runtime
from coreinfer.bundles import open_bundle
from coreinfer.runtime.engines.native.decoder import NativeDecoder

from .bundle_factory import edit_manifest
from .c_library import DENSE, CError, CModel, has_compilers
from .engine_inputs import PROMPT
from .model_factory import VOCABULARY

IDS = np.random.default_rng(5).integers(3, VOCABULARY, 20).tolist()


@pytest.fixture(scope="module")
def folder(tiny_bundle: Callable[..., Path]) -> Path:
    return tiny_bundle("llama", token_share=0.6, packs="thin", keep=None, budgets=None, quantize="int4")


@pytest.mark.skipif(not has_compilers(), reason="no C or C++ compiler here")
def test_in_c_a_thin_cluster_is_the_dense_ffn(folder: Path, open_in_c: Callable[..., CModel], tmp_path: Path) -> None:
    decoder = NativeDecoder(open_bundle(folder), threads=2)
    expected = decoder.forward(IDS)[0]
    for options in ({}, {"memory_bytes": 40_000_000}):
        model = open_in_c(folder, num_threads=2, **options)
        for cluster in (1, DENSE, 3):
            model.use(cluster)
            model.truncate(0)
            np.testing.assert_array_equal(model.feed(IDS), expected)
        with pytest.raises(CError, match="cluster: expected 0 to 3"):
            model.use(4)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    with edit_manifest(copy) as data:
        del data["files"]["dense.safetensors"]
    with pytest.raises(CError, match="clusters: expected a file of each, or a dense FFN, got neither"):
        open_in_c(copy)


@pytest.mark.skipif(not has_compilers(), reason="no C or C++ compiler here")
def test_in_c_a_mixtures_thin_cluster_uses_all_experts(
    tiny_bundle: Callable[..., Path], open_in_c: Callable[..., CModel]
) -> None:
    folder = tiny_bundle("qwen3_moe", token_share=0.6, packs="thin", keep=None, budgets=None, quantize="int4")
    expected = NativeDecoder(open_bundle(folder), threads=2).forward(IDS)[0]
    model = open_in_c(folder, num_threads=2)
    for cluster in (1, DENSE):
        model.use(cluster)
        model.truncate(0)
        np.testing.assert_array_equal(model.feed(IDS), expected)


def test_under_a_limit_of_memory_all_is_read(folder: Path) -> None:
    engine = runtime.load(folder, engine="native", threads=1, memory_mb=40)
    dense = engine.generate(PROMPT, raw=True, max_new_tokens=8, mode="dense")
    got = engine.generate(PROMPT, raw=True, max_new_tokens=8, mode="similarity")
    assert (got.token_ids, got.token_share, got.mode) == (dense.token_ids, 1, "similarity")
