"""Frequencies of rotary embeddings, as transformers scales them, for the native engine."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from coreinfer.bundles import UnsupportedModelError

__all__ = ["rotary_table"]

Floats = npt.NDArray[np.float32]


def rotary_table(parameters: Mapping[str, Any], head_dim: int) -> tuple[list[float], float]:
    """Compute frequencies of rotary embeddings (arXiv 2104.09864) from a config's rope parameters.

    Returns:
        Inverse frequencies, (head_dim / 2) radians a position, and the scale of cos and sin.
    Raises:
        UnsupportedModelError: the scaling is none that the native engine has.
    """
    kind = parameters.get("rope_type", "default")
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies: Floats = (1.0 / np.float32(parameters["rope_theta"]) ** exponents).astype(np.float32)
    known = kind in ("default", "linear", "llama3", "yarn") or (kind == "longrope" and _is_one_set(parameters))
    if not known or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"rotary embeddings {kind!r}: the native engine has default, linear, llama3, yarn, and longrope with one "
            "set of factors, of whole heads; use engine='torch'"
        )
    scale = 1.0
    if kind == "linear":
        frequencies = np.asarray(frequencies / np.float32(parameters["factor"]), dtype=np.float32)
    elif kind == "llama3":
        frequencies = _llama3(frequencies, parameters)
    elif kind == "yarn":
        frequencies, scale = _yarn(frequencies, parameters, head_dim)
    elif kind == "longrope":
        factors = np.asarray(parameters["short_factor"], dtype=np.float32)
        frequencies = np.asarray(frequencies / factors, dtype=np.float32)
    return frequencies.tolist(), scale


def _is_one_set(parameters: Mapping[str, Any]) -> bool:
    """Whether factors are those of short and of long texts alike, and scale no more than the frequencies."""
    return parameters["short_factor"] == parameters["long_factor"] and parameters.get("attention_factor") == 1.0


def _llama3(frequencies: Floats, parameters: Mapping[str, Any]) -> Floats:
    """Slow long waves down by `factor`, leave short ones, and blend in between."""
    factor, low, high = (float(parameters[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(frequencies * (blend + (1 - blend) / factor), dtype=np.float32)


def _yarn(frequencies: Floats, parameters: Mapping[str, Any], head_dim: int) -> tuple[Floats, float]:
    """YaRN (arXiv 2309.00071): long waves by `factor`, short ones not, a ramp between two places of the head."""
    factor, theta = float(parameters["factor"]), float(parameters["rope_theta"])
    length = float(parameters["original_max_position_embeddings"])
    places = [
        head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (parameters.get("beta_fast") or 32, parameters.get("beta_slow") or 1)
    ]
    if parameters.get("truncate", True):
        places = [math.floor(places[0]), math.ceil(places[1])]
    first, last = max(places[0], 0), min(places[1], head_dim - 1)
    # As transformers avoids a ramp of no length.
    span = last - first or 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - np.float32(first)) / np.float32(span), 0.0, 1.0)
    blended = frequencies / np.float32(factor) * ramp + frequencies * (1 - ramp)
    return np.asarray(blended, dtype=np.float32), _yarn_scale(parameters, factor)


def _yarn_scale(parameters: Mapping[str, Any], factor: float) -> float:
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    numerator, denominator = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if numerator and denominator:
        return _magnitude(factor, numerator) / _magnitude(factor, denominator)
    return _magnitude(factor, 1.0)


def _magnitude(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0
