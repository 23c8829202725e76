"""What the safetensors files of a folder hold, by their headers alone."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from coreinfer.bundles.errors import ConfigError

__all__ = ["INDEX", "WEIGHTS", "has_head", "safetensors_files", "tensor_sizes"]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_HEAD = "lm_head."
_MOST_HEADER_BYTES = 100_000_000
"""As the safetensors library has it."""


def safetensors_files(folder: Path, what: str) -> list[Path]:
    """List the safetensors files that transformers reads: the single one if it is there, else those of the index.

    Args:
        what: name of the model in an error, such as "--model tiny".
    Returns:
        Paths, of which some may be missing.
    Raises:
        ConfigError: the index cannot be read.
    """
    shards = _shards(folder, what)
    return [folder / WEIGHTS] if shards is None else [folder / shard for shard in sorted(set(shards.values()))]


def has_head(folder: Path, what: str) -> bool | None:
    """Whether a model's files have a head beside the embedding; None where they are no safetensors, or not here.

    Raises:
        ConfigError: the index cannot be read.
    """
    names: Collection[str] | None = _shards(folder, what)
    if names is None:
        names = _sizes(folder / WEIGHTS)
    return any(_HEAD in name for name in names) if names else None


def tensor_sizes(folder: Path, what: str) -> dict[str, int]:
    """Tensors of all files that are there -> their bytes.

    Raises:
        ConfigError: the index cannot be read.
    """
    return {name: size for file in safetensors_files(folder, what) for name, size in _sizes(file).items()}


def _shards(folder: Path, what: str) -> Mapping[str, str] | None:
    """Names of tensors -> of files, as the index has it; None where there is a single file, or nothing."""
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return None
    try:
        shards: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        if wrong := [shard for shard in shards.values() if not isinstance(shard, str)]:
            raise TypeError(f"{wrong[0]!r} is no file's name")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{what}: {INDEX} cannot be read ({error or type(error).__name__}); "
            "expected a weight_map from tensors to files"
        ) from error
    return shards


def _sizes(file: Path) -> dict[str, int]:
    """Tensors of a file -> their bytes; none of a file that is missing or damaged, which is told on loading."""
    try:
        with file.open("rb") as opened:
            num_bytes = min(int.from_bytes(opened.read(8), "little"), _MOST_HEADER_BYTES)
            header: dict[str, Any] = json.loads(opened.read(num_bytes))
        offsets = {name: fields["data_offsets"] for name, fields in header.items() if name != "__metadata__"}
        return {name: end - begin for name, (begin, end) in offsets.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
