"""Which engine executes a bundle."""

import logging
from pathlib import Path
from typing import Any

from coreinfer.bundles import Bundle, ConfigError, UnsupportedModelError
from coreinfer.bundles.shared.extras import needs_extra
from coreinfer.bundles.shared.machine import usable_cores
from coreinfer.bundles.shared.signals import signals_held
from coreinfer.runtime.load_options import LoadOptions

from .protocol import Decoder

__all__ = ["load_decoder"]

_log = logging.getLogger(__name__)


def load_decoder(bundle: Bundle, options: LoadOptions) -> Decoder:
    """Load the engine that was asked for, or the one that serves best here; see `load` of engine.py."""
    if options.engine == "native":
        return _load_native(bundle, options)
    if options.engine == "auto" and not options.asks_for_torch and _suits_cpu(options.device):
        try:
            return _load_native(bundle, options)
        except UnsupportedModelError as error:
            if options.memory_mb is not None:
                raise
            _log.warning("%s; going on with the torch engine", error)
    if options.memory_mb is not None:
        raise ConfigError("memory_mb: only the native engine on the CPU has it; leave it out, or use engine native")
    if options.isa != "auto":
        raise ConfigError(f"isa: expected auto with the torch engine, got {options.isa!r}")
    TorchDecoder = _import_torch_decoder(options.threads)  # noqa: N806
    decoder: Decoder = TorchDecoder(
        bundle,
        device=options.device,
        dtype=options.dtype,
        gpu_memory_mb=options.gpu_memory_mb,
        cuda_graphs=options.cuda_graphs,
        weights=options.weights,
        kv_cache_bytes=options.kv_cache_bytes,
        input_skipping=options.input_skipping,
    )
    return decoder


def _suits_cpu(device: str) -> bool:
    """Whether the CPU is asked for, or the best device where there is no GPU."""
    return device == "cpu" or (device == "auto" and not _has_gpu())


def _has_gpu() -> bool:
    """Whether torch can use a GPU; torch is imported only where there is the driver of one."""
    if not Path("/proc/driver/nvidia/version").exists():
        return False
    try:
        with signals_held():
            import torch
    except ModuleNotFoundError:
        return False
    return bool(torch.cuda.is_available())


def _load_native(bundle: Bundle, options: LoadOptions) -> Decoder:
    from .native.decoder import NativeDecoder

    return NativeDecoder(
        bundle,
        threads=options.threads,
        isa=options.isa,
        kv_cache_bytes=options.kv_cache_bytes,
        memory_bytes=options.memory_bytes,
        input_skipping=options.input_skipping,
    )


def _import_torch_decoder(threads: int | None) -> Any:
    """Import the torch engine, and set torch's threads."""
    with needs_extra("the torch engine", "torch"), signals_held():
        import torch

        from .torch.decoder import TorchDecoder
    torch.set_num_threads(threads or min(torch.get_num_threads(), usable_cores()))
    return TorchDecoder
