"""Which part of a bundle is in memory under a limit; the sums are the native module's (assembly/memory_plan.cpp)."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from coreinfer.bundles import ConfigError, Manifest

from . import _native

__all__ = ["FfnSizes", "MemoryPlan", "WeightSizes", "ffn_sizes", "plan_memory"]


@dataclass(frozen=True, kw_only=True)
class FfnSizes:
    """Bytes of an FFN's layers as they are read: all together, and of the largest; of mixtures of their experts."""

    total: int
    largest: int


@dataclass(frozen=True, kw_only=True)
class WeightSizes:
    """What there is to hold.

    Attributes:
        base: bytes of the whole base.
        tables: bytes of those tables of the base of which a token needs a few rows only: the low halves of a screened
            head, and an embedding that is not the head.
        table_block: most bytes that a block of 16 rows of such a table takes in whole pages.
        page: of a page of the KV cache.
        packs: of the clusters.
        dense: None in a bundle without the dense FFN.
        num_chosen: experts of a token; 0 where layers are read as a whole.
    """

    base: int
    tables: int
    table_block: int
    page: int
    packs: Sequence[FfnSizes]
    dense: FfnSizes | None
    num_chosen: int


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes for each part; together they are the limit.

    Attributes:
        base: what always stays of the base.
        window: for rows of its tables; 0 where the tables stay as a whole.
        kv_cache: for keys and values.
        layers: for layers of FFNs or experts, kept or passing through.
    """

    base: int
    window: int
    kv_cache: int
    layers: int


def ffn_sizes(manifest: Manifest, ffns: Sequence[Sequence[int]]) -> list[FfnSizes]:
    """Bytes of the layers of FFNs, in whole sectors; a few more than there are.

    Args:
        ffns: of each, the number of neurons in its layers, of all their experts together.
    """
    record = json.dumps(asdict(manifest.model), allow_nan=False)
    sizes = _native.ffn_sizes(record, manifest.quantization["ffn"].format, ffns)
    return [FfnSizes(total=total, largest=largest) for total, largest in sizes]


def plan_memory(limit_bytes: int, sizes: WeightSizes, kv_cache_bytes: int | None) -> MemoryPlan:
    """Share a limit out: base, KV cache, rows of tables, and the rest for layers of FFNs.

    Args:
        limit_bytes: of everything together.
        kv_cache_bytes: as asked for; None for an eighth of the limit, or for less where that leaves layers too little.
    Raises:
        ConfigError: the limit is too small; with the figures.
    """
    packs = [(pack.total, pack.largest) for pack in sizes.packs]
    dense = (sizes.dense.total, sizes.dense.largest) if sizes.dense else None
    parts = (sizes.base, sizes.tables, sizes.table_block, sizes.page)
    try:
        base, window, kv_cache, layers = _native.plan_memory(
            max(0, limit_bytes), parts, packs, dense, kv_cache_bytes or 0, sizes.num_chosen
        )
    except ValueError as error:
        raise ConfigError(f"memory_mb: {error}") from error
    return MemoryPlan(base=base, window=window, kv_cache=kv_cache, layers=layers)
