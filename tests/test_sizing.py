from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from coreinfer.bundles import open_bundle
from coreinfer.bundles.errors import ConfigError
from coreinfer.compiler.prune.profile import Profile
from coreinfer.compiler.prune.select import layer_budgets
from coreinfer.compiler.quality.sizes import base_bytes, block_bytes, fit_budget
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import FfnChoice

from .model_factory import SHAPES
from .test_carrying import load
from .test_config import make_config


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("quantize", ["bf16", "int8", "int4"])
def test_the_largest_keep_ratio_that_fits_is_taken(name: str, quantize: str) -> None:
    loaded, options = load(name), {"quantize": quantize, "min_layer_keep": 0.0}
    fixed, one = (part(make_config(**options), loaded) for part in (base_bytes, block_bytes))
    for blocks in (3, 4, 7, 9, 20):
        keep = fit_budget(make_config(**options, budget_mb=(fixed + blocks * one + one // 2) / 1e6), loaded)
        assert keep == pytest.approx(min(blocks, 9) / 9)


def test_without_a_budget_nothing_changes() -> None:
    assert fit_budget(make_config(keep=0.4), load("llama")) == 0.4


def test_a_budget_that_nothing_fits_is_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        fit_budget(make_config(budget_mb=0.001), load("llama"))
    assert str(caught.value).startswith("--budget-mb: expected at least ")
    assert "got 0.001" in str(caught.value)


@pytest.mark.parametrize("quantize", ["bf16", "int4"])
@pytest.mark.parametrize("name", ["llama", "opt", "gemma3"])
def test_what_a_compiled_pack_reads_is_within_the_budget(
    name: str, quantize: Any, tiny_bundle: Callable[..., Path]
) -> None:
    loaded, options = load(name), {"quantize": quantize, "min_layer_keep": 0.0}
    fixed, one = (part(make_config(**options), loaded) for part in (base_bytes, block_bytes))
    budget = (fixed + 6 * one) / 1e6
    folder = tiny_bundle(name, keep=None, budget_mb=budget, quantize=quantize, min_layer_keep=0.0, evaluate=False)
    assert sum(open_bundle(folder).manifest.plan.layer_budgets) == 6 * 32
    decoder = NativeDecoder(open_bundle(folder), threads=1)
    decoder.use(FfnChoice(cluster=0))
    assert decoder.bytes_per_token(0) == pytest.approx(budget * 1e6, rel=0.02)


@pytest.mark.parametrize(("num_blocks", "per_layer"), [(3, 1), (5, 1), (6, 2), (8, 2), (9, 3)])
def test_equal_layers_are_within_the_budget(num_blocks: int, per_layer: int) -> None:
    """Of three layers of three blocks: one block too few for all to have one more leaves them as they are."""
    loaded, options = load("llama"), {"budgets": "uniform", "removal": "top-k", "min_layer_keep": 0.0}
    fixed, one = (part(make_config(**options), loaded) for part in (base_bytes, block_bytes))
    config = make_config(**options, budget_mb=(fixed + num_blocks * one) / 1e6)
    ones: npt.NDArray[np.float32] = np.ones((3, 96), dtype=np.float32)
    profile = Profile(statistics={}, num_tokens={}, relative_energies=ones)
    assert layer_budgets(config, fit_budget(config, loaded), profile, ones) == [32 * per_layer] * 3
