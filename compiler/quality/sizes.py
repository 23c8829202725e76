"""How much is kept: the decision, and the keep ratio of a budget of bytes per token."""

from dataclasses import dataclass
from typing import Literal

from coreinfer.bundles.formats import matrix_bytes
from coreinfer.compiler.budget import keep_of_budget
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.samples import NEURON_BLOCK
from torch import nn

__all__ = ["Sizes", "base_bytes", "block_bytes", "fit_budget"]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What was decided where `CompileConfig` says what to aim at.

    Attributes:
        clusters: that were asked of the clustering, which merges empty and tiny ones; "auto" where it counted them.
        keep: keep ratio of one narrow model that has as many bytes on held-out text as the clusters' packs.
        keeps: of each cluster.
        layer_budgets: of each layer, at `keep`.
    """

    clusters: int | Literal["auto"]
    keep: float
    keeps: tuple[float, ...]
    layer_budgets: tuple[int, ...]


def fit_budget(config: CompileConfig, loaded: LoadedModel) -> float:
    """Turn `budget_mb` into the largest keep ratio whose weights fit; without it, return `keep`.

    Raises:
        ConfigError: not even the smallest narrow FFN fits.
    """
    if config.budget_mb is None:
        return config.effective_keep
    return keep_of_budget(
        config,
        fixed_bytes=base_bytes(config, loaded),
        block_bytes=block_bytes(config, loaded),
        num_layers=loaded.record.num_layers,
        blocks_per_layer=loaded.record.ffn_dim / NEURON_BLOCK,
    )


def base_bytes(config: CompileConfig, loaded: LoadedModel) -> int:
    """Bytes of attention, other linear layers and the whole head that one decoded token reads, as they are stored."""
    ffn = {id(loaded.projection(layer, role)) for layer in range(loaded.record.num_layers) for role in _roles(loaded)}
    total = 0
    for path, module in loaded.model.named_modules():
        if isinstance(module, nn.Linear) and id(module) not in ffn:
            kind = config.effective_head_quantize if path == "lm_head" else config.quantize
            total += matrix_bytes(kind, (module.weight.shape[0], module.weight.shape[1]))
    return total


def block_bytes(config: CompileConfig, loaded: LoadedModel) -> int:
    """Bytes of 32 neurons of one layer."""
    size = loaded.record.hidden_size
    shapes = [(size, NEURON_BLOCK) if role == "down" else (NEURON_BLOCK, size) for role in _roles(loaded)]
    return sum(matrix_bytes(config.quantize, shape) for shape in shapes)


def _roles(loaded: LoadedModel) -> tuple[str, ...]:
    return tuple(loaded.family.projections)
