"""What fits on a device: the base and a pack always, the dense FFN where there is room, else two buffers of a layer."""

from dataclasses import dataclass

from coreinfer.bundles import ConfigError
from coreinfer.bundles.manifest import ModelRecord

__all__ = ["MemoryNeeds", "MemoryPlan", "kv_bytes_per_token", "plan_memory"]

_MIN_KV_TOKENS = 256
_ROOMY_KV_TOKENS = 4096
# Activations, workspaces of the libraries and recorded steps.
_MARGIN_SHARE, _MARGIN_BYTES = 0.1, 256_000_000
_MB = 1e6


@dataclass(frozen=True, kw_only=True)
class MemoryNeeds:
    """Bytes that the parts of a bundle take on the device.

    Attributes:
        dense: 0 where the bundle has no dense FFN.
        layer: one layer of the dense FFN.
        kv_per_token: keys and values of one token, all layers.
    """

    base: int
    pack: int
    dense: int
    layer: int
    kv_per_token: int
    max_positions: int


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How much may be used, and whether the dense FFN is streamed through two layer buffers."""

    limit_bytes: int
    stream_dense: bool


def kv_bytes_per_token(model: ModelRecord, item_bytes: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * item_bytes


def plan_memory(needs: MemoryNeeds, *, limit_mb: float | None, free_bytes: int) -> MemoryPlan:
    """Decide what lives on the device.

    Args:
        limit_mb: megabytes for weights and KV cache; None for the free memory less a margin.
        free_bytes: memory of the device that no one holds.
    Raises:
        ConfigError: base, pack, layer buffers and a short KV cache do not fit.
    """
    if limit_mb is not None and not limit_mb > 0:
        raise ConfigError(f"gpu_memory_mb: expected more than 0, got {limit_mb}")
    limit = int(free_bytes - max(_MARGIN_SHARE * free_bytes, _MARGIN_BYTES) if limit_mb is None else limit_mb * _MB)
    roomy = needs.kv_per_token * min(needs.max_positions, _ROOMY_KV_TOKENS)
    stream = bool(needs.dense) and needs.base + needs.pack + needs.dense + roomy > limit
    buffers = 2 * needs.layer if stream else 0
    kv = needs.kv_per_token * min(needs.max_positions, _MIN_KV_TOKENS)
    total = needs.base + needs.pack + buffers + kv
    if total > limit:
        name = "gpu_memory_mb" if limit_mb is not None else "free device memory less a margin"
        raise ConfigError(
            f"{name}: expected at least {_mb(total)} MB (base {_mb(needs.base)}, pack {_mb(needs.pack)}, two layer "
            f"buffers {_mb(buffers)}, KV cache {_mb(kv)}), got {_mb(limit)}; raise it, or compile with a lower --keep "
            "or --quantize int4"
        )
    return MemoryPlan(limit_bytes=limit, stream_dense=stream)


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / _MB:.3g}" if num_bytes < 100 * _MB else f"{num_bytes / _MB:.0f}"
