"""The bundle: the contract on disk between the compiler, which writes it, and the runtime, which loads it."""

from .errors import (
    BundleCorrupt,
    BundleError,
    BundleNotFound,
    BundleVersionError,
    CalibrationError,
    ConfigError,
    ContextTooLong,
    CoreInferError,
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
    "Manifest",
    "UnsupportedModelError",
    "open_bundle",
    "read_manifest",
]
