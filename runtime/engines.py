"""Which engine executes a bundle."""

import logging
from pathlib import Path
from typing import Literal

from coreinfer.bundles import Bundle, ConfigError, UnsupportedModelError

from .decoder import Decoder

__all__ = ["EngineName", "load_decoder"]

_log = logging.getLogger(__name__)
EngineName = Literal["auto", "native", "torch"]


def load_decoder(
    bundle: Bundle, *, engine: EngineName, device: str, threads: int | None, dtype: str, isa: str
) -> Decoder:
    """Load the engine that was asked for, or the one that serves best here; see `load` of engine.py."""
    if threads is not None and threads < 1:
        raise ConfigError(f"threads: expected at least 1, got {threads}")
    if engine == "native":
        if device not in ("auto", "cpu") or dtype != "auto":
            raise ConfigError(
                f"engine native: it runs on the CPU with the bundle's own formats; got device {device!r} and dtype "
                f"{dtype!r}: leave them out, or use engine torch"
            )
        return _load_native(bundle, threads=threads, isa=isa)
    if engine == "auto" and device in ("auto", "cpu") and dtype == "auto" and not (device == "auto" and _has_gpu()):
        try:
            return _load_native(bundle, threads=threads, isa=isa)
        except UnsupportedModelError as error:
            _log.warning("%s; going on with the torch engine", error)
    if isa != "auto":
        raise ConfigError(f"isa: expected auto with the torch engine, got {isa!r}")
    return _load_torch(bundle, device=device, dtype=dtype, threads=threads)


def _has_gpu() -> bool:
    """Whether torch can use a GPU; torch is imported only where there is the driver of one."""
    if not Path("/proc/driver/nvidia/version").exists():
        return False
    try:
        import torch
    except ModuleNotFoundError:
        return False
    return bool(torch.cuda.is_available())


def _load_native(bundle: Bundle, *, threads: int | None, isa: str) -> Decoder:
    from .native_decoder import NativeDecoder

    return NativeDecoder(bundle, threads=threads, isa=isa)


def _load_torch(bundle: Bundle, *, device: str, dtype: str, threads: int | None) -> Decoder:
    try:
        import torch

        from .torch_decoder import TorchDecoder
    except ModuleNotFoundError as error:
        raise ConfigError(f"the torch engine needs the package {error.name}; pip install 'coreinfer[torch]'") from error
    if threads is not None:
        torch.set_num_threads(threads)
    return TorchDecoder(bundle, device=device, dtype=dtype)
