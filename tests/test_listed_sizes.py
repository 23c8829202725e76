"""What a compile with `--experts both` aims at: bytes a token; and what is known of it beforehand."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from coreinfer.bundles import ConfigError, manifest, open_bundle
from coreinfer.compiler import CompileConfig, compile_model
from coreinfer.compiler.checks import find_inputs
from coreinfer.compiler.estimate.plan import make_plan
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import FfnChoice

from .skewed_mixtures import skewed_inputs
from .test_narrow_experts import wide_settings


@pytest.fixture(scope="module")
def listed_inputs(
    tiny_inputs: Callable[[str], CompileConfig], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], CompileConfig]:
    """A function (family) that gives the options of a tiny compile whose routers neglect two experts of each layer."""
    root = tmp_path_factory.mktemp("skewed")
    return lambda family: skewed_inputs(tiny_inputs(family), root, family, **wide_settings(family))


@pytest.mark.parametrize("budgets", [None, "uniform"])
def test_a_token_reads_no_more_than_a_budget(
    budgets: Any, listed_inputs: Callable[[str], CompileConfig], tmp_path: Path
) -> None:
    """As much as by narrow packs, which lose no less and are larger; the least that can be is said."""
    config = replace(listed_inputs("mixtral"), keep=None, budgets=budgets, controls=False)

    def made(experts: Any, budget_mb: float) -> manifest.Manifest:
        output = tmp_path / experts
        return compile_model(replace(config, experts=experts, output=output, budget_mb=budget_mb))

    with pytest.raises(ConfigError, match=r"--budget-mb: expected at least \d") as caught:
        made("both", 0.01)
    least = float(re.findall(r"at least ([\d.]+)", str(caught.value))[0])
    budget = least + 0.028
    both, narrow = made("both", budget), made("narrow", budget)
    decoder = NativeDecoder(open_bundle(tmp_path / "both"), threads=1)
    for cluster, other in zip(range(2), narrow.clusters, strict=True):
        decoder.use(FfnChoice(cluster=cluster))
        assert 0.8e6 * budget < decoder.bytes_per_token(0, greedy=False) <= 1e6 * budget
        own = both.clusters[cluster]
        assert own.ffn_bytes == other.ffn_bytes
        assert own.layer_experts == (4, 4, 4)
        assert own.keep_ratio == pytest.approx(other.keep_ratio * 4 / 6, abs=1e-5)
    assert both.quality is not None
    assert narrow.quality is not None
    assert both.quality.clusters.kl < 1.05 * narrow.quality.clusters.kl


def test_a_plan_is_refused(listed_inputs: Callable[[str], CompileConfig]) -> None:
    config = listed_inputs("olmoe")

    def measure() -> Any:
        raise AssertionError

    with pytest.raises(ConfigError, match="--dry-run: what --experts both takes is not known beforehand"):
        make_plan(config, find_inputs(config), measure)
