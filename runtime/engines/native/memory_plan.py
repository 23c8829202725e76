"""Which part of a bundle is in memory under a limit: sums over sizes, nothing is read."""

from collections.abc import Sequence
from dataclasses import dataclass

from coreinfer.bundles import ConfigError, Manifest
from coreinfer.bundles.formats import ffn_layer_bytes

__all__ = ["FfnSizes", "MemoryPlan", "WeightSizes", "ffn_sizes", "plan_memory"]

_SECTOR_BYTES = 4096
_ALIGNMENT_BYTES = 64
_HUGE_BYTES = 2 << 20
# Two of an FFN that is streamed: one is computed with while one is read.
_LAYERS_AHEAD = 2
_KV_SHARE = 8
_WINDOW_SHARE = 16
_LEAST_BLOCKS = 16


@dataclass(frozen=True, kw_only=True)
class FfnSizes:
    """Bytes of an FFN's layers as they are read: all together, and of the largest."""

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
        page: bytes of a page of the KV cache.
        packs: of the clusters.
        dense: None in a bundle without the dense FFN.
    """

    base: int
    tables: int
    table_block: int
    page: int
    packs: Sequence[FfnSizes]
    dense: FfnSizes | None

    @property
    def largest_layer(self) -> int:
        """Bytes of the largest layer of all FFNs."""
        return max(ffn.largest for ffn in (*self.packs, *([self.dense] if self.dense else [])))

    @property
    def widest_pack(self) -> int:
        """Bytes of the widest pack."""
        return max(pack.total for pack in self.packs)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes for each part; together they are at most the limit.

    Attributes:
        base: what always stays of the base.
        window: for rows of its tables; 0 where the tables stay as a whole.
        kv_cache: for keys and values.
        layers: for layers of FFNs, kept or passing through.
    """

    base: int
    window: int
    kv_cache: int
    layers: int


def ffn_sizes(manifest: Manifest, num_neurons: Sequence[int]) -> FfnSizes:
    """Bytes of an FFN's layers by the number of neurons in each, in whole sectors; a few more than there are."""
    layers = [_layer_bytes(manifest, count) for count in num_neurons]
    return FfnSizes(total=sum(layers), largest=max(layers))


def _layer_bytes(manifest: Manifest, count: int) -> int:
    model, kind = manifest.model, manifest.quantization["ffn"].format
    num_inner, hidden = 2 if model.gated else 1, model.hidden_size
    # Tensors that are no weights, as biases, may lie between them.
    others = num_inner * 4 * count + 4 * hidden if model.ffn_bias else 0
    weights = ffn_layer_bytes(kind, hidden, count, gated=model.gated)
    num_tensors = 4 * (num_inner + 1)
    size = _rounded(weights + others + num_tensors * _ALIGNMENT_BYTES + _SECTOR_BYTES, _SECTOR_BYTES)
    # The native module takes whole huge pages where that wastes little.
    whole = _rounded(size, _HUGE_BYTES)
    return whole if whole - size <= size // 16 else size


def _rounded(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def plan_memory(limit_bytes: int, sizes: WeightSizes, kv_cache_bytes: int | None) -> MemoryPlan:
    """Share a limit out: base, KV cache, rows of tables, and the rest for layers of FFNs.

    Args:
        limit_bytes: of everything together.
        kv_cache_bytes: as asked for; None for an eighth of the limit, or for less where that leaves layers too little.
    Raises:
        ConfigError: the limit is too small; with the figures.
    """
    hot, window = sizes.base - sizes.tables, min(sizes.tables, _LEAST_BLOCKS * sizes.table_block)
    ahead = _LAYERS_AHEAD * sizes.largest_layer
    left = limit_bytes - hot - window - ahead
    kv_cache = kv_cache_bytes or max(sizes.page, min(limit_bytes // _KV_SHARE, left))
    left -= kv_cache
    if left < 0:
        raise ConfigError(
            f"memory_mb: expected at least {(limit_bytes - left) / 1e6:.1f} MB ({hot / 1e6:.1f} for the base, "
            f"{window / 1e6:.1f} for rows of its tables, {kv_cache / 1e6:.1f} for the KV cache, {ahead / 1e6:.1f} for "
            f"two layers; {sizes.widest_pack / 1e6:.1f} more hold a whole pack), got {limit_bytes / 1e6:.1f}; raise it"
        )
    # What the widest pack leaves over is best spent on the tables: sampling needs all of them for each token.
    spare = left + ahead - sizes.widest_pack
    window = min(sizes.tables, window + max(min(left, limit_bytes // _WINDOW_SHARE), min(left, spare), 0))
    layers = limit_bytes - hot - window - kv_cache
    return MemoryPlan(
        base=hot if window < sizes.tables else sizes.base,
        window=window if window < sizes.tables else 0,
        kv_cache=kv_cache,
        layers=layers,
    )
