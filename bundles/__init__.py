"""The bundle: the contract on disk between the compiler, which writes it, and the runtime, which loads it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import (
        BundleCorrupt,
        BundleError,
        BundleNotFound,
        BundleVersionError,
        CalibrationError,
        ConfigError,
        ContextTooLong,
        CoreInferError,
        GenerationCancelled,
        ModelOutputError,
        UnsupportedModelError,
    )
    from .manifest import Manifest, read_manifest
    from .reader import Bundle, open_bundle

__all__ = [
    "Bundle",
    "BundleCorrupt",
    "BundleError",
    "BundleNotFound",
    "BundleVersionError",
    "CalibrationError",
    "ConfigError",
    "ContextTooLong",
    "CoreInferError",
    "GenerationCancelled",
    "Manifest",
    "ModelOutputError",
    "UnsupportedModelError",
    "open_bundle",
    "read_manifest",
]

_MODULES = ("errors", "manifest", "reader")

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import a name when it is first asked for: `.shared.starting` must be there before numpy is."""
        if name in __all__:
            for module in map(import_module, (f"{__name__}.{module}" for module in _MODULES)):
                if name in module.__all__:
                    globals()[name] = value = getattr(module, name)
                    return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
