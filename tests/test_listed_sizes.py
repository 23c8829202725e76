"""What a compile with `--experts both` aims at: bytes a token; and what is known of it beforehand."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from coreinfer.bundles import ConfigError, manifest, open_bundle
from coreinfer.bundles.token_bytes import token_bytes
from coreinfer.compiler import CompileConfig, compile_model
from coreinfer.compiler.checks import find_inputs
from coreinfer.compiler.estimate.machine import Machine
from coreinfer.compiler.estimate.plan import Plan, make_plan
from coreinfer.compiler.estimate.shapes import stated_shapes
from coreinfer.compiler.estimate.sizes import base_token_bytes
from coreinfer.compiler.estimate.view import plan_fields, plan_lines
from coreinfer.compiler.progress import Progress
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


def plan_of(config: CompileConfig) -> Plan:
    return make_plan(
        config,
        find_inputs(config),
        lambda: Machine(num_threads=1, float32_gflops=1.0, bfloat16_gflops=1.0, read_gbps=1.0),
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep": None, "budget_mb": 0.145},
        {"keep": None, "max_kl": 0.2},
        {"effort": "quick", "token_share": 0.6},
        {"reconstruct": False, "budgets": "uniform"},
    ],
    ids=str,
)
def test_what_a_compile_takes_is_planned_between_two_ends(
    options: dict[str, Any], listed_inputs: Callable[[str], CompileConfig], tmp_path: Path
) -> None:
    """All stages; bytes a token and of the packs lie between those of all experts and of as few as can be."""
    config = replace(listed_inputs("olmoe"), output=tmp_path / "bundle", cache_dir=None, controls=False, **options)
    plan, progress = plan_of(config), Progress()
    found = compile_model(config, progress=progress)
    assert {stage.name for stage in plan.stages} == {*progress.stage_seconds}
    counted, fewest = token_bytes(found), plan.fewest
    assert plan.token_bytes_dense == counted.dense
    assert fewest is not None
    assert fewest.num_foreseen == 6
    if "max_kl" in options:
        return
    # A block of each layer more or less, as means are no blocks.
    slack = counted.dense_ffn / 4
    assert plan.token_bytes_pack - slack <= counted.pack <= fewest.token_bytes_pack + slack
    if "budget_mb" in options:
        assert plan.token_bytes_pack == fewest.token_bytes_pack <= 145_000
        assert fewest.bundle_bytes < plan.bundle_bytes
    else:
        assert fewest.bundle_bytes == pytest.approx(plan.bundle_bytes, rel=0.05)


def test_nothing_is_open_where_all_is_kept(listed_inputs: Callable[[str], CompileConfig]) -> None:
    plan = plan_of(replace(listed_inputs("olmoe"), keep=1.0))
    assert plan.fewest is None
    assert plan.token_bytes_pack == plan.token_bytes_dense
    assert not [line for line in plan_lines(plan) if line.startswith("experts")]


def test_a_plan_says_both_ends(listed_inputs: Callable[[str], CompileConfig]) -> None:
    config = replace(listed_inputs("mixtral"), keep=0.5)
    plan = plan_of(config)
    fewest = plan.fewest
    assert fewest is not None
    ffn = plan.token_bytes_dense - base_token_bytes(config, stated_shapes(find_inputs(config).model))
    # Of six experts three, as they are, have half of the neurons; a token uses two.
    assert fewest.num_experts == 3
    assert plan.token_bytes_pack == plan.token_bytes_dense - ffn / 2
    assert fewest.token_bytes_pack == plan.token_bytes_dense
    (line,) = [line for line in plan_lines(plan) if line.startswith("experts")]
    assert line.startswith("experts    6 of each layer stay in these figures; if only 3 do: ")
    assert f"{fewest.token_bytes_pack / 1e6:.1f} MB a token" in line
    assert plan_fields(plan)["fewest"]["num_experts"] == 3
