"""What fits on a device: the base and a pack always, the dense FFN where there is room, else two buffers of a layer."""

from dataclasses import dataclass

from coreinfer.bundles import ConfigError
from coreinfer.bundles.families import num_cached_layers
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
        low_bits: second copy of the weights whose inputs are read in half; 0 where none are.
        columns: copy of the weights that is read input by input; 0 where there is none.
        kv_per_token: keys and values of one token, all layers that have any.
    """

    base: int
    pack: int
    dense: int
    layer: int
    kv_per_token: int
    max_positions: int
    low_bits: int
    columns: int = 0

    @property
    def resident(self) -> int:
        """What is never given back."""
        return self.base + self.low_bits + self.columns

    @property
    def least(self) -> int:
        """The smallest limit that works: base, pack, two layer buffers for a dense FFN, a short KV cache."""
        buffers = 2 * self.layer if self.dense else 0
        return self.resident + self.pack + buffers + self.kv_per_token * min(self.max_positions, _MIN_KV_TOKENS)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How much may be used, and whether the dense FFN is streamed through two layer buffers."""

    limit_bytes: int
    stream_dense: bool


def kv_bytes_per_token(model: ModelRecord, item_bytes: int) -> int:
    """Keys and values of one token in all layers."""
    num_layers = num_cached_layers(model.family, model.num_layers, model.config)
    return 2 * num_layers * model.num_kv_heads * model.head_dim * item_bytes


def plan_memory(needs: MemoryNeeds, *, limit_mb: float | None, free_bytes: int) -> MemoryPlan:
    """Decide what is kept on the device.

    Args:
        limit_mb: maximum megabytes of weights and KV cache; None for the free memory minus a margin.
        free_bytes: free memory of the device.
    Raises:
        ConfigError: base, pack, layer buffers and a short KV cache do not fit.
    """
    if limit_mb is not None and not limit_mb > 0:
        raise ConfigError(f"gpu_memory_mb: expected more than 0, got {limit_mb}")
    room = free_bytes - max(_MARGIN_SHARE * free_bytes, _MARGIN_BYTES)
    limit = round(room if limit_mb is None else limit_mb * _MB)
    roomy = needs.kv_per_token * min(needs.max_positions, _ROOMY_KV_TOKENS)
    stream = bool(needs.dense) and needs.resident + needs.pack + needs.dense + roomy > limit
    buffers = 2 * needs.layer if needs.dense else 0
    if (stream or not needs.dense) and needs.least > limit:
        kv = needs.least - needs.resident - needs.pack - buffers
        name = "gpu_memory_mb" if limit_mb is not None else "free device memory less a margin"
        extra = f", for halves {_mb(needs.low_bits)} (none with --no-half-inputs)" if needs.low_bits else ""
        extra += f", for columns {_mb(needs.columns)} (none with input_skipping 'masked')" if needs.columns else ""
        raise ConfigError(
            f"{name}: expected at least {_mb(needs.least)} MB (base {_mb(needs.base)}{extra}, pack {_mb(needs.pack)}, "
            f"two layer buffers {_mb(buffers)}, KV cache {_mb(kv)}), got {_mb(limit)}; raise it, or compile with a "
            "lower --keep or --quantize int4"
        )
    return MemoryPlan(limit_bytes=limit, stream_dense=stream)


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / _MB:.4g}" if num_bytes < 1000 * _MB else f"{num_bytes / _MB:.0f}"
