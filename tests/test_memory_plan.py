"""What a limit of memory is spent on."""

from dataclasses import replace

import pytest
from coreinfer.bundles import ConfigError
from coreinfer.bundles.manifest import ExpertsRecord
from coreinfer.runtime.engines.native.memory_plan import FfnSizes, MemoryPlan, WeightSizes, ffn_sizes, plan_memory

from .bundle_factory import FFN_DIM, HIDDEN_SIZE, make_manifest

MB = 10**6
SIZES = WeightSizes(
    base=171 * MB,
    tables=68 * MB,
    table_block=12_000,
    page=MB,
    packs=[FfnSizes(total=93 * MB, largest=4 * MB), FfnSizes(total=56 * MB, largest=3 * MB)],
    dense=FfnSizes(total=186 * MB, largest=8 * MB),
    num_chosen=0,
)
LARGEST, WIDEST = 8 * MB, 93 * MB
LEAST = 103 * MB + 16 * 12_000 + MB + 2 * LARGEST


def spent(plan: MemoryPlan) -> int:
    return plan.base + plan.window + plan.kv_cache + plan.layers


@pytest.mark.parametrize("limit", [LEAST, LEAST + 1, 150 * MB, 200 * MB, 250 * MB, 300 * MB, 400 * MB, 10_000 * MB])
def test_the_parts_make_up_the_limit(limit: int) -> None:
    plan = plan_memory(limit, SIZES, None)
    assert spent(plan) == limit
    assert plan.kv_cache >= SIZES.page
    assert plan.layers >= 2 * LARGEST
    assert plan.base == (SIZES.base if plan.window == 0 else SIZES.base - SIZES.tables)
    assert plan.window == 0 or 16 * SIZES.table_block <= plan.window < SIZES.tables


def test_a_pack_comes_before_the_tables_and_they_before_the_dense_ffn() -> None:
    assert plan_memory(260 * MB, SIZES, 10 * MB).window > 0
    ample = plan_memory(280 * MB, SIZES, 10 * MB)
    assert ample.window == 0
    assert ample.layers >= WIDEST


def test_too_little_is_refused_with_the_figures() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_memory(LEAST - 1, SIZES, None)
    assert str(caught.value) == (
        "memory_mb: expected at least 120.2 MB (103.0 for the base, 0.2 for rows of its tables, 1.0 for the KV cache, "
        "16.0 for two layers; 93.0 more hold a whole pack), got 120.2; raise it"
    )


def test_a_mixture_needs_the_experts_of_a_token() -> None:
    mixture = replace(SIZES, num_chosen=4)
    least = LEAST + 2 * LARGEST
    assert plan_memory(least, mixture, MB).layers == 4 * LARGEST
    with pytest.raises(
        ConfigError, match=r"136\.2 MB .*32\.0 for the experts of a token \(4\); .*, got 136\.2; raise it"
    ):
        plan_memory(least - 1, mixture, MB)


def test_the_kv_cache_that_was_asked_for_is_counted() -> None:
    assert plan_memory(200 * MB, SIZES, 30 * MB).kv_cache == 30 * MB
    with pytest.raises(ConfigError, match=r"149\.2 MB .*30\.0 for the KV cache.* got 140\.0"):
        plan_memory(140 * MB, SIZES, 30 * MB)


def test_a_bundle_without_the_dense_ffn_needs_less() -> None:
    small = replace(SIZES, dense=None)
    assert spent(plan_memory(LEAST - 8 * MB, small, None)) == LEAST - 8 * MB


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_sizes_are_those_of_the_stored_layers_and_some_bytes_more(kind: str) -> None:
    manifest = make_manifest(ffn_format=kind)
    (sizes,) = ffn_sizes(manifest, [(FFN_DIM, 32)])
    bits = {"bf16": 16, "int8": 8.5, "int4": 4.75}[kind]
    exact = 3 * HIDDEN_SIZE * (FFN_DIM + 32) * bits / 8
    assert exact <= sizes.total <= exact + 4 * 4096
    assert sizes.total / 2 < sizes.largest < sizes.total


def test_sizes_of_a_mixture_are_those_of_its_experts() -> None:
    manifest = make_manifest(ffn_format="int8")
    experts, width = ExpertsRecord(num_experts=4, num_chosen=2, normalizes=True), 2048
    mixture = replace(manifest, model=replace(manifest.model, experts=experts, ffn_dim=4 * width))
    expert = 3 * HIDDEN_SIZE * width * 8.5 / 8
    whole, two, narrow = ffn_sizes(mixture, [(4 * width, 4 * width), (2 * width, 4 * width), (width, width)])
    for sizes, num_experts in ((whole, 8), (two, 6)):
        assert expert <= sizes.largest <= expert + 3 * 4096
        assert sizes.total == num_experts * sizes.largest
    # Of a layer with fewer neurons a token's two experts have no more than half each.
    assert expert / 2 <= narrow.largest <= expert / 2 + 3 * 4096
    with pytest.raises(ValueError, match="neurons of a layer: expected at least one of each expert, got 1"):
        ffn_sizes(mixture, [(1, 1)])
