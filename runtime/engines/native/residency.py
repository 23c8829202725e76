"""What of a bundle's files is in memory, where `memory_mb` limits it."""

import logging
from dataclasses import dataclass
from typing import Any

from coreinfer.bundles import Bundle
from coreinfer.bundles.tensors import TensorFile
from coreinfer.runtime.generation import DiskReads

from .memory_plan import MemoryPlan, WeightSizes, ffn_sizes

__all__ = ["Residency", "disk_reads", "hold_base", "weight_sizes"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Residency:
    """A limit that is kept to."""

    plan: MemoryPlan

    def in_layers(self, ffn: Any, file: TensorFile) -> Any:
        """Have a native FFN read layer by layer; pages of its file that checks have touched are let go."""
        streamed = ffn.in_layers(str(file.path))
        file.forget()
        return streamed


def weight_sizes(bundle: Bundle, page_bytes: int, table_bytes: int, table_block_bytes: int) -> WeightSizes:
    """Count what there is to hold; see `WeightSizes`."""
    manifest = bundle.manifest
    dense = (manifest.model.ffn_dim,) * manifest.model.num_layers
    own = [cluster.layer_budgets for cluster in manifest.clusters if cluster.file is not None]
    *packs, whole = ffn_sizes(manifest, [*own, dense])
    return WeightSizes(
        base=len(bundle.base.mapped_bytes),
        tables=table_bytes,
        table_block=table_block_bytes,
        page=page_bytes,
        # Thin clusters decode with the dense FFN.
        packs=[*packs, whole] if manifest.has_thin else packs,
        dense=whole if bundle.dense else None,
        num_chosen=0 if manifest.model.experts is None else manifest.model.experts.num_chosen,
    )


def hold_base(bundle: Bundle, model: Any, plan: MemoryPlan) -> Residency:
    """Bring a bundle's base in and keep it, and let go of all other pages that opening the bundle has brought in."""
    for file in (bundle.base, *bundle.packs, *([bundle.dense] if bundle.dense else [])):
        file.forget()
    model.limit(str(bundle.base.path), plan.layers, plan.window)
    parts = (plan.base, plan.window, plan.kv_cache, plan.layers)
    _log.info(
        "memory_mb: %.1f MB for the base, %.1f for rows of its tables, %.1f for the KV cache, %.1f for layers",
        *(part / 1e6 for part in parts),
    )
    return Residency(plan=plan)


def disk_reads(model: Any) -> DiskReads | None:
    """What a native model has read from disk since it was loaded; None where its memory is not limited."""
    figures = model.read_figures()
    if figures is None:
        return None
    layer_bytes, num_hits, num_misses, seconds, table_bytes = figures
    return DiskReads(
        num_bytes=layer_bytes + table_bytes, num_hits=num_hits, num_misses=num_misses, waited_seconds=seconds
    )
