"""Whether a config says that weights are quantized already, and by a method that can be undone; without torch."""

import importlib.util
from collections.abc import Mapping
from typing import Any

from coreinfer.bundles.errors import ConfigError, UnsupportedModelError

__all__ = ["FIELD", "PACKAGES", "Settings", "check_method", "describe", "refusal", "settings_of"]

Settings = Mapping[str, Any]
PACKAGES: Mapping[str, str | None] = {
    "awq": None,
    "bitsandbytes": None,
    "compressed-tensors": "compressed-tensors",
    "fp8": None,
    "gptq": None,
    "mxfp4": None,
}
"""`quant_method` of each method that can be undone -> the package that this takes, if any."""
FIELD = "quantization_config"
_OTHER_FIELDS = ("quantization", "compression_config")


def settings_of(config: Mapping[str, Any]) -> Settings | None:
    """Return what a config.json says of how its weights are quantized; None if they are not."""
    settings = config.get(FIELD)
    if not settings:
        return None
    values: Settings = settings if isinstance(settings, Mapping) else {"quant_method": settings}
    return {**values, "quant_method": _method_name(values)}


def check_method(config: Mapping[str, Any], what: str) -> None:
    """Refuse a checkpoint that is quantized by a method that cannot be undone here.

    Args:
        config: of config.json.
        what: name of the model in an error, such as "--model tiny".
    Raises:
        UnsupportedModelError: its config says that it is.
        ConfigError: a package is missing.
    """
    for field in _OTHER_FIELDS:
        if other := config.get(field):
            raise refusal({**other} if isinstance(other, Mapping) else {}, field, what, None)
    if (settings := settings_of(config)) is None:
        return
    if settings["quant_method"] not in PACKAGES:
        raise refusal(settings, FIELD, what, None)
    package = PACKAGES[settings["quant_method"]]
    if package and importlib.util.find_spec(package.replace("-", "_")) is None:
        raise ConfigError(
            f"{what}: its weights are quantized already ({describe(settings)}), and {package}, which unpacks "
            f"them, is not installed; run: pip install {package}"
        )


def refusal(settings: Settings, field: str, what: str, problem: str | None) -> UnsupportedModelError:
    """Make the error of a checkpoint whose quantization cannot be undone.

    Args:
        field: of config.json that says so.
        problem: what of the settings cannot be read; None for the method as such.
    """
    with_what = f" with {problem}, which cannot be unpacked," if problem else ","
    return UnsupportedModelError(
        f"{what}: its weights are quantized already ({describe(settings)}; {field} in config.json){with_what} "
        f"expected float32, bfloat16 or float16, or what {', '.join(PACKAGES)} wrote; "
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
