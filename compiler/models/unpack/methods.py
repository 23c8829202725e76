"""Which methods of quantization can be undone, and whether a config asks for one of them."""

import importlib.util
from collections.abc import Mapping
from typing import Any

from coreinfer.bundles.errors import ConfigError, UnsupportedModelError
from transformers import PreTrainedConfig

from .bitsandbytes import BITSANDBYTES
from .compressed import COMPRESSED_TENSORS
from .fp8 import FP8
from .grouped import AWQ, GPTQ
from .packing import Method, Settings

__all__ = ["METHODS", "check_quantization", "describe", "settings_of"]

METHODS: Mapping[str, Method] = {
    "awq": AWQ,
    "bitsandbytes": BITSANDBYTES,
    "compressed-tensors": COMPRESSED_TENSORS,
    "fp8": FP8,
    "gptq": GPTQ,
}
"""`quant_method` of a config.json -> how it is undone."""
_FIELD = "quantization_config"
_OTHER_FIELDS = ("quantization", "compression_config")


def settings_of(config: PreTrainedConfig) -> Settings | None:
    """Return what a config says of how its weights are quantized; None if they are not."""
    settings = getattr(config, _FIELD, None)
    if not settings:
        return None
    values: Mapping[str, Any] = settings if isinstance(settings, Mapping) else {"quant_method": settings}
    return {**values, "quant_method": _method_name(values)}


def check_quantization(config: PreTrainedConfig, what: str) -> None:
    """Refuse a checkpoint that is quantized in a way that cannot be undone here.

    Args:
        what: name of the model in an error, such as "--model tiny".
    Raises:
        UnsupportedModelError: its config says that it is.
        ConfigError: a package is missing.
    """
    for field in _OTHER_FIELDS:
        if other := getattr(config, field, None):
            raise _refusal({**other} if isinstance(other, Mapping) else {}, field, what, None)
    if (settings := settings_of(config)) is None:
        return
    method = METHODS.get(settings["quant_method"])
    if method is None:
        raise _refusal(settings, _FIELD, what, None)
    if method.package and importlib.util.find_spec(method.package.replace("-", "_")) is None:
        raise ConfigError(
            f"{what}: its weights are quantized already ({describe(settings)}), and {method.package}, which unpacks "
            f"them, is not installed; run: pip install {method.package}"
        )
    if problem := method.problem(settings):
        raise _refusal(settings, _FIELD, what, problem)


def _refusal(settings: Settings, field: str, what: str, problem: str | None) -> UnsupportedModelError:
    with_what = f" with {problem}, which cannot be unpacked," if problem else ","
    return UnsupportedModelError(
        f"{what}: its weights are quantized already ({describe(settings)}; {field} in config.json){with_what} "
        f"expected float32, bfloat16 or float16, or what {', '.join(METHODS)} wrote; "
        "give the model that it was quantized from"
    )


def describe(settings: Settings) -> str:
    """Say in some words how weights are quantized."""
    bits = settings.get("bits")
    return f"{_method_name(settings)}{f', {bits} bits' if bits else ''}"


def _method_name(settings: Settings) -> str:
    method = settings.get("quant_method") or settings.get("format") or _unnamed(settings)
    return str(getattr(method, "value", method))


def _unnamed(settings: Settings) -> str:
    """Method of a config that names none, as transformers wrote them before it read others than bitsandbytes."""
    return "bitsandbytes" if settings.get("load_in_4bit") or settings.get("load_in_8bit") else "an unknown method"
