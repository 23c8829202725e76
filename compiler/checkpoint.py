"""What a checkpoint's files must hold: each parameter of the model, once, in its shape, in finite numbers.

transformers fills what it does not find with random numbers, drops what it does not know, and says so in its log alone.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from coreinfer.bundles.errors import ConfigError, UnsupportedModelError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

__all__ = ["check_files", "check_finite", "check_loaded", "check_quantization", "check_tied_head"]

_SHOWN = 5
_FLOATS = ("F64", "F32", "F16", "BF16")
_LEFTOVERS = ("rotary_emb.inv_freq", ".attn.masked_bias")
"""Ends of names of tensors that older checkpoints hold and no model reads."""


def check_quantization(config: PreTrainedConfig, name: str) -> None:
    """Refuse a checkpoint that is quantized already.

    Args:
        name: what the user called the model.
    Raises:
        UnsupportedModelError: its config says that it is.
    """
    for field in ("quantization_config", "quantization", "compression_config"):
        if settings := getattr(config, field, None):
            raise UnsupportedModelError(
                f"--model {name}: its weights are quantized already ({_quantizer(settings)}; {field} in config.json), "
                "expected float32, bfloat16 or float16; give the model that it was quantized from"
            )


def _quantizer(settings: Any) -> str:
    values = settings if isinstance(settings, Mapping) else vars(settings)
    method = values.get("quant_method") or values.get("format") or "an unknown method"
    bits = values.get("bits")
    return f"{getattr(method, 'value', method)}{f', {bits} bits' if bits else ''}"


def check_files(folder: Path, name: str, *, mapped: bool) -> None:
    """Look at the headers of a folder's safetensors files, as far as they can be read; others are told on loading.

    Args:
        name: what the user called the model.
        mapped: whether weights are to stay in their file.
    Raises:
        ConfigError: there are no safetensors files, and weights are to stay in them.
        UnsupportedModelError: some tensors are packed integers.
    """
    files = [file for file in _files_of(folder, name) if file.is_file()]
    if mapped and not files:
        raise ConfigError(
            f"--max-memory: expected a model in safetensors, whose weights can stay in their file, got {name}; "
            "save it with transformers first"
        )
    packed = []
    for file in files:
        with suppress(SafetensorError), safe_open(file, framework="pt") as tensors:
            dtypes = {key: tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
            packed += [f"{key} ({dtype})" for key, dtype in dtypes.items() if _is_packed(key, dtype)]
    if packed:
        raise UnsupportedModelError(
            f"--model {name}: expected weights in float32, bfloat16 or float16, got {_some(packed)}; "
            "give the model that these were quantized from"
        )


def _is_packed(key: str, dtype: str) -> bool:
    return dtype not in _FLOATS and not key.endswith(_LEFTOVERS)


def _files_of(folder: Path, name: str) -> list[Path]:
    """The safetensors files that transformers reads: the single one if it is there, else those of the index."""
    if (folder / SAFE_WEIGHTS_NAME).exists() or not (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        return [folder / SAFE_WEIGHTS_NAME]
    try:
        index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
        return [folder / shard for shard in sorted(set(index["weight_map"].values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--model {name}: {SAFE_WEIGHTS_INDEX_NAME} cannot be read ({error or type(error).__name__}); "
            "expected a weight_map from tensors to files"
        ) from error


def check_loaded(info: Mapping[str, Any], name: str) -> None:
    """Compare a checkpoint with the model that it was loaded into.

    Args:
        info: of `from_pretrained(..., output_loading_info=True, ignore_mismatched_sizes=True)`.
        name: what the user called the model.
    Raises:
        ConfigError: tensors are missing, left over or of another shape; some of each are named.
    """
    shapes = [
        f"{tensor} is {_shape(stored)} and not {_shape(expected)}"
        for tensor, stored, expected in sorted(info["mismatched_keys"])
    ]
    left_over = [tensor for tensor in info["unexpected_keys"] if not tensor.endswith(_LEFTOVERS)]
    problems = [
        f"{what} {_some(found)}"
        for what, found in (
            ("missing", sorted(info["missing_keys"])),
            ("of another shape:", shapes),
            ("left over", sorted(left_over)),
        )
        if found
    ]
    if problems:
        raise ConfigError(
            f"--model {name}: its weights are not those of its config.json: {'; '.join(problems)}; "
            "give the whole checkpoint with its own config.json"
        )


def _shape(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def _some(found: Collection[str]) -> str:
    shown = ", ".join(list(found)[:_SHOWN])
    return shown if len(found) <= _SHOWN else f"{shown} and {len(found) - _SHOWN} more"


def check_tied_head(model: nn.Module, embedding: nn.Module, *, tied: bool, name: str) -> None:
    """Refuse a head of its own in a checkpoint whose config says that the embedding serves as head.

    Raises:
        ConfigError: transformers left the two apart, because they differ.
    """
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    if tied and head.weight is not embedding.weight:
        raise ConfigError(
            f"--model {name}: its config.json says tie_word_embeddings true, but its weights hold a head that is not "
            "the embedding; set it to false, or take the head out"
        )


def check_finite(model: nn.Module, name: str) -> None:
    """Read all parameters once.

    Raises:
        ConfigError: some hold NaN or infinite values; they are named.
    """
    broken = [key for key, parameter in model.named_parameters() if not _is_finite(parameter.detach())]
    if broken:
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        raise ConfigError(
            f"--model {name}: NaN or infinite values, read as {dtype}, in {_some(broken)}; give a whole checkpoint"
        )


def _is_finite(values: torch.Tensor) -> bool:
    """Whether all values are finite; the extremes take no memory for each value, as `isfinite` does."""
    extremes = torch.stack(torch.aminmax(values)) if values.numel() else values
    return bool(torch.isfinite(extremes).all())
