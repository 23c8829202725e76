"""Options of a compile that are right one by one, and do not go together."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from coreinfer.bundles.shared.ray_cluster import LOCAL

from .options import TRIED_KEEPS

if TYPE_CHECKING:
    from .config import CompileConfig

__all__ = ["conflicts"]


def conflicts(config: "CompileConfig") -> Iterator[str]:
    """Options that are right one by one, and do not go together."""
    yield from _of_aims(config)
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
    elif config.half_inputs is not None:
        switch = "--half-inputs" if config.half_inputs else "--no-half-inputs"
        yield f"{switch}: expected --token-share with it, by which inputs are read at all"
    yield from _of_packs(config)
    yield from _of_ray(config)
    if config.max_memory is not None and config.heals:
        yield "--max-memory: healing trains all layers at once; give --heal-steps 0, and no --heal-cluster-steps"
    elif config.max_memory is not None and config.device != "cpu":
        yield f"--max-memory: expected --device cpu, where weights can stay in their file, got {config.device}"


def _of_aims(config: "CompileConfig") -> Iterator[str]:
    """Sizes and qualities that would decide the same thing."""
    # A quality may choose token shares instead of keep ratios.
    names = ("budget_mb",) if config.searches_share else ("budget_mb", "max_kl", "min_top1")
    aims = [name for name in names if getattr(config, name) is not None]
    if config.keep is not None and aims:
        yield f"--keep and --{aims[0].replace('_', '-')}: expected one of them, got both"
    if config.budget_mb is not None and len(aims) > 1:
        yield "--budget-mb and --max-kl or --min-top1: expected bytes or a quality to aim at, got both"
    if config.packs == "own" and config.searches_share and config.keep is None and config.budget_mb is None:
        yield "--token-share auto: expected --keep or --budget-mb with it, which size packs, or --packs thin or auto"


def _not_with_token_shares(config: "CompileConfig") -> Iterator[str]:
    if config.by_neuron:
        yield "--token-share: expected a FFN that is not stored neuron by neuron, got --by-neuron"
    if config.max_memory is not None:
        yield "--token-share: gradients go through all of its weights at once; leave out --max-memory"


def _of_packs(config: "CompileConfig") -> Iterator[str]:
    if config.packs == "thin":
        yield from _not_with_thin_clusters(config)
    elif config.packs == "auto":
        yield from _not_with_chosen_packs(config)


def _not_with_thin_clusters(config: "CompileConfig") -> Iterator[str]:
    """Options that say how packs are made, or that need packs."""
    if config.token_share is None:
        yield "--packs thin: expected --token-share with it, a share or auto, by which clusters differ"
    elif not config.searches_share and (config.max_kl is not None or config.min_top1 is not None):
        yield f"--max-kl, --min-top1: expected --token-share auto with --packs thin, got {config.token_share:g}"
    if config.clusters == "auto":
        yield "--clusters auto: it compares packs, of which --packs thin has none; expected a number"
    if not config.dense:
        yield "--no-dense: thin clusters decode with the dense FFN; leave it out"
    heals = {"--heal-steps": bool(config.heal_steps), "--heal-cluster-steps": bool(config.heal_cluster_steps)}
    if wrong := [name for name, is_given in heals.items() if is_given]:
        yield (
            f"{', '.join(wrong)}: thin clusters decode with the weights of prompts, which lose more by healing than "
            f"they gain (docs/token_shares.md); leave {_them(wrong)} out, or give --packs own"
        )
    given = {
        "--keep": config.keep is not None,
        f"--experts {config.experts}": config.experts != "whole",
        "--budget-mb": config.budget_mb is not None,
        "--budgets": config.budgets is not None,
        f"--selection {config.selection}": config.selection != "output-aware",
        "--cluster-weight": config.cluster_weight is not None,
        "--removal": config.removal is not None,
        "--no-reconstruct": not config.reconstruct,
        "--carry": bool(config.carry),
        "--repair-rounding": config.repair_rounding,
        "--ridge": config.ridge is not None,
    }
    if wrong := [name for name, is_given in given.items() if is_given]:
        yield f"{', '.join(wrong)}: with --packs thin nothing is narrowed; leave {_them(wrong)} out"


def _them(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"


def _not_with_chosen_packs(config: "CompileConfig") -> Iterator[str]:
    """Options that decide what `--packs auto` chooses, or that only one of its choices has."""
    if not config.searches_share:
        yield f"--token-share {config.token_share:g}: expected auto with --packs auto, or nothing"
    if config.clusters == "auto":
        yield "--clusters auto: it compares packs of all clusters, which --packs auto may leave out; expected a number"
    if not config.dense:
        yield "--no-dense: thin clusters, which --packs auto may choose, decode with the dense FFN; leave it out"
    if config.keep is not None:
        yield "--keep: --packs auto chooses each cluster's keep ratio; leave it out, or give --packs own"
    if config.budget_mb is not None:
        yield (
            "--budget-mb: --packs auto chooses by a quality; give --max-kl, or --packs own with --budget-mb and "
            "--token-share auto"
        )
    if config.heals:
        yield "--packs auto: packs that are healed are not compared yet; give --heal-steps 0, or --packs own"
    if config.experts != "whole":
        yield f"--experts {config.experts}: --packs auto does not choose for mixtures of experts; give --packs own"
    if config.controls:
        yield "--controls: they have the bytes of packs, which --packs auto may leave out; leave it out"
    if config.effective_budgets != "uniform" and config.min_layer_keep > TRIED_KEEPS[-1]:
        yield f"--min-layer-keep {config.min_layer_keep:g}: expected at most {TRIED_KEEPS[-1]:g} with --packs auto"


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
