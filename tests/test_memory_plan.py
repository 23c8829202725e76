"""What fits on a device, by numbers."""

from dataclasses import replace

import pytest
from coreinfer.bundles import ConfigError
from coreinfer.runtime.engines.torch.memory_plan import MemoryNeeds, plan_memory

MB = 1_000_000
# An OPT-6.7b-like model in bfloat16.
NEEDS = MemoryNeeds(
    base=4800 * MB, pack=1700 * MB, dense=8600 * MB, layer=269 * MB, kv_per_token=524_288, max_positions=2048
)
KV_ALL, KV_LEAST = 2048 * 524_288, 256 * 524_288


@pytest.mark.parametrize(
    ("limit_mb", "streams"),
    [
        (24_000.0, False),
        ((4800 * MB + 1700 * MB + 8600 * MB + KV_ALL) / MB, False),
        ((4800 * MB + 1700 * MB + 8600 * MB + KV_ALL - 1) / MB, True),
        (12_000.0, True),
        ((4800 * MB + 1700 * MB + 2 * 269 * MB + KV_LEAST) / MB, True),
    ],
)
def test_the_dense_ffn_stays_where_all_fits(limit_mb: float, streams: bool) -> None:
    plan = plan_memory(NEEDS, limit_mb=limit_mb, free_bytes=0)
    assert (plan.stream_dense, plan.limit_bytes) == (streams, round(limit_mb * MB))


def test_too_little_is_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_memory(NEEDS, limit_mb=7000.0, free_bytes=10**12)
    assert str(caught.value) == (
        "gpu_memory_mb: expected at least 7172 MB (base 4800, pack 1700, two layer buffers 538, KV cache 134.2), got "
        "7000; raise it, or compile with a lower --keep or --quantize int4"
    )


def test_without_a_dense_ffn_no_buffers_are_needed() -> None:
    needs = replace(NEEDS, dense=0)
    assert not plan_memory(needs, limit_mb=6700.0, free_bytes=0).stream_dense
    with pytest.raises(ConfigError, match="two layer buffers 0"):
        plan_memory(needs, limit_mb=6600.0, free_bytes=0)


@pytest.mark.parametrize(
    ("free_mb", "limit_mb", "streams"), [(24_000, 21_600, False), (12_000, 10_800, True), (2_000, 1_744, None)]
)
def test_free_memory_is_used_with_a_margin(free_mb: int, limit_mb: int, streams: bool | None) -> None:
    if streams is None:
        with pytest.raises(ConfigError, match=f"free device memory less a margin: expected .*, got {limit_mb}"):
            plan_memory(NEEDS, limit_mb=None, free_bytes=free_mb * MB)
        return
    plan = plan_memory(NEEDS, limit_mb=None, free_bytes=free_mb * MB)
    assert (plan.stream_dense, plan.limit_bytes) == (streams, limit_mb * MB)


@pytest.mark.parametrize("limit_mb", [0.0, -5.0, float("nan")])
def test_a_bound_is_more_than_nothing(limit_mb: float) -> None:
    with pytest.raises(ConfigError, match="gpu_memory_mb: expected more than 0"):
        plan_memory(NEEDS, limit_mb=limit_mb, free_bytes=0)
