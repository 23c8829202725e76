"""Options of a compile that are right one by one, and do not go together."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from coreinfer.bundles.shared.ray_cluster import LOCAL

if TYPE_CHECKING:
    from .config import CompileConfig

__all__ = ["conflicts"]


def conflicts(config: "CompileConfig") -> Iterator[str]:
    """Options that are right one by one, and do not go together."""
    has_quality = config.max_kl is not None or config.min_top1 is not None
    aims = [name for name in ("budget_mb", "max_kl", "min_top1") if getattr(config, name) is not None]
    if config.keep is not None and aims:
        yield f"--keep and --{aims[0].replace('_', '-')}: expected one of them, got both"
    if config.budget_mb is not None and has_quality:
        yield "--budget-mb and --max-kl or --min-top1: expected bytes or a quality to aim at, got both"
    if config.keep is not None and config.effective_budgets != "uniform" and config.min_layer_keep > config.keep:
        yield f"--min-layer-keep {config.min_layer_keep:g}: expected at most --keep {config.keep:g}; lower one of them"
    if config.cluster_weight == "auto" and not config.reconstruct:
        yield "--cluster-weight auto: expected --reconstruct, whose weight it chooses, got --no-reconstruct"
    if config.removal == "second-order" and not config.reconstruct:
        yield "--removal second-order: expected --reconstruct, which it counts on, got --no-reconstruct"
    if config.by_neuron and config.quantize != "int4":
        yield f"--by-neuron: expected --quantize int4, got {config.quantize}"
    if config.token_share is not None:
        yield from _not_with_token_shares(config)
    yield from _of_ray(config)
    if config.max_memory is not None and config.heals:
        yield "--max-memory: healing trains all layers at once; give --heal-steps 0, and no --heal-cluster-steps"
    elif config.max_memory is not None and config.device != "cpu":
        yield f"--max-memory: expected --device cpu, where weights can stay in their file, got {config.device}"


def _not_with_token_shares(config: "CompileConfig") -> Iterator[str]:
    if config.by_neuron:
        yield "--token-share: expected a FFN that is not stored neuron by neuron, got --by-neuron"
    if config.heals:
        yield "--token-share: packs that are healed are not measured with it yet; give --heal-steps 0"
    if config.max_memory is not None:
        yield "--token-share: it runs the model once for every layer and group; leave out --max-memory"


def _of_ray(config: "CompileConfig") -> Iterator[str]:
    if config.ray is None:
        if config.workers is not None:
            yield f"--workers {config.workers}: expected --ray ADDRESS with it, or --ray local"
        return
    if config.workers is None:
        yield f"--ray {config.ray}: expected --workers N with it, among which text and clusters are divided"
    if config.ray != LOCAL and config.threads is None:
        yield f"--ray {config.ray}: expected --threads N with it, the CPU threads of each worker"
    if config.device != "cpu":
        yield f"--ray {config.ray}: expected --device cpu, got {config.device}"
