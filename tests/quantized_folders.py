"""Reading and changing the folders of quantized_factory.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from coreinfer.bundles import ConfigError, CoreInferError
from safetensors.torch import load_file, save_file

from .loading import load
from .quantized_factory import WEIGHTS, Weights

__all__ = ["MODULE", "change_settings", "change_weights", "refusal"]

MODULE = "model.layers.1.mlp.down_proj"


def refusal(folder: Path, kind: type[CoreInferError] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert f"--model {folder.name}: " in message
    return message


def change_weights(folder: Path, change: Callable[[Weights], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def change_settings(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] = {**config.get("quantization_config", {}), **settings}
    path.write_text(json.dumps(config), encoding="utf-8")
