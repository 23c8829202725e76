"""How much is kept: the decision, and the keep ratio of a budget of bytes per token."""

from dataclasses import dataclass
from typing import Literal

from coreinfer.bundles.formats import ffn_layer_bytes, matrix_bytes
from coreinfer.compiler.budget import keep_of_budget
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.samples import NEURON_BLOCK
from coreinfer.runtime.engines.torch.mixture import Router
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
        layer_experts: into how many experts these are divided, where packs have some experts, each narrower; else None.
    """

    clusters: int | Literal["auto"]
    keep: float
    keeps: tuple[float, ...]
    layer_budgets: tuple[int, ...]
    layer_experts: tuple[int, ...] | None = None


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
        blocks_per_layer=_num_blocks(config, loaded),
    )


def _num_blocks(config: CompileConfig, loaded: LoadedModel) -> float:
    """Blocks of 32 neurons of a layer: of a mixture those of one expert, as all keep as many."""
    neurons = loaded.record.ffn_dim if loaded.record.experts is None else loaded.record.expert_neurons
    # Some experts are divided into whole blocks, of which the last may be cut short.
    return -(-neurons // NEURON_BLOCK) if config.experts == "both" else neurons / NEURON_BLOCK


def base_bytes(config: CompileConfig, loaded: LoadedModel) -> int:
    """Bytes of attention, routers, other linear layers and the whole head that a token reads, as they are stored."""
    ffn = {id(loaded.projection(layer, role)) for layer in range(loaded.record.num_layers) for role in _roles(loaded)}
    total = 0
    for path, module in loaded.model.named_modules():
        if isinstance(module, nn.Linear) and id(module) not in ffn:
            exact = path.endswith(loaded.family.exact)
            kind = "bf16" if exact else config.effective_head_quantize if path == "lm_head" else config.quantize
            total += matrix_bytes(kind, (module.weight.shape[0], module.weight.shape[1]))
        elif isinstance(module, Router):
            total += matrix_bytes("bf16", (module.weight.shape[0], module.weight.shape[1]))
    return total


def block_bytes(config: CompileConfig, loaded: LoadedModel) -> int:
    """Bytes of 32 neurons of one layer that a token reads, of a mixture 32 of each expert that it uses."""
    experts = loaded.record.experts
    num_chosen = 1 if experts is None else experts.num_chosen
    size, gated = loaded.record.hidden_size, loaded.record.gated
    return num_chosen * ffn_layer_bytes(config.quantize, size, NEURON_BLOCK, gated=gated)


def _roles(loaded: LoadedModel) -> tuple[str, ...]:
    return tuple(loaded.family.projections)
