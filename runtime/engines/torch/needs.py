"""What a bundle takes on a device, and what of it fits."""

import logging
from dataclasses import replace

from coreinfer.bundles import Bundle, ConfigError
from coreinfer.bundles.families import family_by_name
from torch import nn

from .column_products import columns_bytes
from .host_weights import FfnReader, layer_bytes
from .low_halves import low_bytes
from .memory_plan import MemoryNeeds, MemoryPlan, kv_bytes_per_token, plan_memory
from .model import base_bytes, decoder_layers, empty_model, pick_device, pick_dtype
from .packed_linear import pick_packed

__all__ = ["device_needs", "plan_device"]

_log = logging.getLogger(__name__)


def device_needs(bundle: Bundle, *, device: str, dtype: str, weights: str = "auto") -> MemoryNeeds:
    """Find out what a bundle would take on a device, without columns and without taking it.

    Args:
        device, dtype, weights: as of `TorchDecoder`.
    """
    place = pick_device(device)
    kind = pick_dtype(dtype, place)
    packed = pick_packed(bundle, weights, place, kind)
    family = family_by_name(bundle.manifest.model.family)
    reader = FfnReader(bundle=bundle, family=family, dtype=kind, device=place, packed=packed)
    return _needs(empty_model(bundle, place, kind, packed=packed), reader)


def plan_device(
    model: nn.Module, reader: FfnReader, *, columns: bool, required: bool, limit_mb: float | None, free_bytes: int
) -> tuple[MemoryNeeds, MemoryPlan]:
    """Decide what is kept on the device; `columns` of the needs says whether weights lie there in columns too.

    Args:
        model: without memory yet.
        columns: whether they are to.
        required: let it be an error that they do not fit beside the dense FFN; else they are left out.
        limit_mb, free_bytes: as of `plan_memory`.
    Raises:
        ConfigError: there is too little room.
    """
    needs = _needs(model, reader)
    if columns:
        num_bytes = columns_bytes(reader.bundle, decoder_layers(model, reader.family), reader.family)
        wider, problem = replace(needs, columns=num_bytes), f"there is no room for {num_bytes / 1e6:.4g} MB of columns"
        try:
            plan = plan_memory(wider, limit_mb=limit_mb, free_bytes=free_bytes)
        except ConfigError:
            if required:
                raise
        else:
            if not plan.stream_dense:
                return wider, plan
            if required:
                raise ConfigError(f"input_skipping 'on': {problem} beside the dense FFN; use 'masked'")
        _log.warning("input_skipping: unwanted inputs are read, and count as 0: %s", problem)
    return needs, plan_memory(needs, limit_mb=limit_mb, free_bytes=free_bytes)


def _needs(model: nn.Module, reader: FfnReader) -> MemoryNeeds:
    """Count what a model without memory will take, without columns."""
    record = reader.bundle.manifest.model
    layers = decoder_layers(model, reader.family)
    pack, dense = reader.largest_pack_bytes, reader.num_bytes(None) if reader.bundle.dense is not None else 0
    return MemoryNeeds(
        base=base_bytes(model),
        pack=pack,
        dense=dense,
        layer=layer_bytes(reader.shapes(None, 0)),
        kv_per_token=kv_bytes_per_token(record, reader.dtype.itemsize),
        max_positions=record.max_positions,
        low_bits=low_bytes(reader.bundle, layers, reader.family, max(pack, dense)),
    )
