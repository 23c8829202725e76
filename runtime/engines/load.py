"""Which engine executes a bundle."""

import logging
from pathlib import Path
from typing import Any, Literal

from coreinfer.bundles import Bundle, ConfigError, UnsupportedModelError
from coreinfer.bundles.shared.extras import needs_extra
from coreinfer.bundles.shared.machine import usable_cores

from .kv_limits import limit_bytes
from .protocol import Decoder

__all__ = ["CudaGraphs", "EngineName", "Weights", "load_decoder"]

_log = logging.getLogger(__name__)
EngineName = Literal["auto", "native", "torch"]
CudaGraphs = Literal["auto", "on", "off"]
Weights = Literal["auto", "bfloat16", "packed"]


def load_decoder(
    bundle: Bundle,
    *,
    engine: EngineName,
    device: str,
    threads: int | None,
    dtype: str,
    isa: str,
    kv_cache_mb: float | None = None,
    gpu_memory_mb: float | None = None,
    cuda_graphs: CudaGraphs = "auto",
    weights: Weights = "auto",
) -> Decoder:
    """Load the engine that was asked for, or the one that serves best here; see `load` of engine.py."""
    kv_cache_bytes = limit_bytes(kv_cache_mb)
    if threads is not None and threads < 1:
        raise ConfigError(f"threads: expected at least 1, got {threads}")
    for_torch = dtype != "auto" or gpu_memory_mb is not None or (cuda_graphs, weights) != ("auto", "auto")
    if engine == "native":
        if device not in ("auto", "cpu") or for_torch:
            raise ConfigError(
                f"engine native: it runs on the CPU with the bundle's own formats; got device {device!r}, dtype "
                f"{dtype!r}, gpu_memory_mb {gpu_memory_mb}, cuda_graphs {cuda_graphs!r} and weights {weights!r}: leave "
                "them out, or use engine torch"
            )
        return _load_native(bundle, threads=threads, isa=isa, kv_cache_bytes=kv_cache_bytes)
    if engine == "auto" and device in ("auto", "cpu") and not for_torch and not (device == "auto" and _has_gpu()):
        try:
            return _load_native(bundle, threads=threads, isa=isa, kv_cache_bytes=kv_cache_bytes)
        except UnsupportedModelError as error:
            _log.warning("%s; going on with the torch engine", error)
    if isa != "auto":
        raise ConfigError(f"isa: expected auto with the torch engine, got {isa!r}")
    TorchDecoder = _import_torch_decoder(threads)  # noqa: N806
    decoder: Decoder = TorchDecoder(
        bundle,
        device=device,
        dtype=dtype,
        gpu_memory_mb=gpu_memory_mb,
        cuda_graphs=cuda_graphs,
        weights=weights,
        kv_cache_bytes=kv_cache_bytes,
    )
    return decoder


def _has_gpu() -> bool:
    """Whether torch can use a GPU; torch is imported only where there is the driver of one."""
    if not Path("/proc/driver/nvidia/version").exists():
        return False
    try:
        import torch
    except ModuleNotFoundError:
        return False
    return bool(torch.cuda.is_available())


def _load_native(bundle: Bundle, *, threads: int | None, isa: str, kv_cache_bytes: int | None) -> Decoder:
    from .native.decoder import NativeDecoder

    return NativeDecoder(bundle, threads=threads, isa=isa, kv_cache_bytes=kv_cache_bytes)


def _import_torch_decoder(threads: int | None) -> Any:
    """Import the torch engine, and set torch's threads."""
    with needs_extra("the torch engine", "torch"):
        import torch

        from .torch.decoder import TorchDecoder
    torch.set_num_threads(threads or min(torch.get_num_threads(), usable_cores()))
    return TorchDecoder
