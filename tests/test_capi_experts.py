"""Narrow experts in the C library, beside the Python engine."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coreinfer.bundles import BundleCorrupt, open_bundle
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE as DENSE_CHOICE
from coreinfer.runtime.engines.protocol import FfnChoice

from .bundle_factory import edit_manifest
from .c_library import DENSE, CError, CModel, has_compilers
from .model_factory import VOCABULARY
from .skewed_mixtures import save_skewed
from .test_narrow_experts import wide_settings

pytestmark = pytest.mark.skipif(not has_compilers(), reason="no C or C++ compiler here")

IDS = np.random.default_rng(5).integers(3, VOCABULARY, 90).tolist()
NUM_READ = 80


@pytest.mark.parametrize(("family", "width"), [("mixtral", 64), ("gpt_oss", 32)])
def test_logits_are_those_of_the_python_engine(
    family: str, width: int, tiny_bundle: Callable[..., Path], open_in_c: Callable[..., CModel]
) -> None:
    """With packs' own weights, beside the dense FFN and without it."""
    for dense in (True, False):
        path = tiny_bundle(family, quantize="int4", experts="narrow", dense=dense)
        bundle = open_bundle(path)
        assert bundle.manifest.clusters[0].layer_budgets == (6 * width,) * 3
        decoder, model = NativeDecoder(bundle, threads=2), open_in_c(path, num_threads=2)
        assert bool(model.has_dense) is dense
        for cluster in (*([DENSE] if dense else []), 1, 0):
            decoder.use(DENSE_CHOICE if cluster == DENSE else FfnChoice(cluster=cluster))
            model.use(cluster)
            decoder.truncate(0)
            model.truncate(0)
            for part in (IDS[:NUM_READ], *([token_id] for token_id in IDS[NUM_READ:])):
                np.testing.assert_array_equal(model.feed(part), decoder.forward(part)[0])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_packs_with_some_experts_are_those_of_the_python_engine(
    family: str, tiny_bundle: Callable[..., Path], open_in_c: Callable[..., CModel], tmp_path: Path
) -> None:
    """Each of them narrower, in unlike numbers by layer."""
    model = save_skewed(tmp_path / family, family, **wide_settings(family))
    options: dict[str, Any] = {"model": str(model), "experts": "both", "budgets": None, "keep": 0.5, "cache_dir": None}
    path = tiny_bundle(family, quantize="int4", clusters=2, **options)
    bundle = open_bundle(path)
    assert any((cluster.layer_experts or (6,)) < (6,) for cluster in bundle.manifest.clusters)
    decoder, library = NativeDecoder(bundle, threads=2), open_in_c(path, num_threads=2)
    for cluster in (1, DENSE, 0):
        decoder.use(DENSE_CHOICE if cluster == DENSE else FfnChoice(cluster=cluster))
        library.use(cluster)
        decoder.truncate(0)
        library.truncate(0)
        for part in (IDS[:NUM_READ], *([token_id] for token_id in IDS[NUM_READ:])):
            np.testing.assert_array_equal(library.feed(part), decoder.forward(part)[0])


def test_another_word_for_experts_is_refused(
    tiny_bundle: Callable[..., Path], open_in_c: Callable[..., CModel], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_bundle("mixtral", quantize="int4"), tmp_path / "copy"))
    with edit_manifest(folder) as data:
        assert "experts" not in data["plan"]
        data["plan"]["experts"] = "some"
    with pytest.raises(CError, match=r"plan\.experts: expected whole, narrow or both, got 'some'"):
        open_in_c(folder).use(0)
    with pytest.raises(BundleCorrupt, match=r"manifest\.plan\.experts: expected"):
        open_bundle(folder)
