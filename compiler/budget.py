"""Budgets of bytes: the keep ratio of what a token may read, and what moments may take."""

from coreinfer.bundles.errors import ConfigError

from .config import CompileConfig

__all__ = ["MOMENT_SHARE", "keep_of_budget", "moment_bytes"]

_MOMENT_BYTES = 4 << 30
MOMENT_SHARE = 1 / 8
"""Share of `max_memory` for the moments of all clusters."""


def keep_of_budget(
    config: CompileConfig, *, fixed_bytes: int, block_bytes: int, num_layers: int, blocks_per_layer: float
) -> float:
    """Turn `budget_mb` into the largest keep ratio whose weights fit; without it, return `keep`.

    Args:
        fixed_bytes: that a token reads of what is no FFN.
        block_bytes: of a block of neurons in one layer.
    Raises:
        ConfigError: not even the smallest narrow FFN fits.
    """
    if config.budget_mb is None:
        return config.effective_keep
    num_blocks = num_layers * blocks_per_layer
    least = max(num_layers, config.min_layer_keep * num_blocks)
    fitting = (config.budget_mb * 1e6 - fixed_bytes) // block_bytes
    if fitting < least:
        raise ConfigError(
            f"--budget-mb: expected at least {(fixed_bytes + least * block_bytes) / 1e6:.1f}, {fixed_bytes / 1e6:.1f} "
            f"of it no FFN, got {config.budget_mb:g}; use fewer bits (--quantize) or a lower --min-layer-keep"
        )
    return min(1.0, float(fitting / num_blocks))


def moment_bytes(config: CompileConfig) -> int:
    """Maximum bytes of moments of all clusters in memory; larger moments are summed in two passes."""
    return (
        _MOMENT_BYTES if config.max_memory is None else min(_MOMENT_BYTES, int(config.max_memory * 1e9 * MOMENT_SHARE))
    )
