"""llama.cpp, where it is installed."""

import importlib
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


def load_llama_cpp(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Load a GGUF file (`contenders.llama_logits.LlamaModel`); skips the test where llama.cpp is not installed."""
    monkeypatch.syspath_prepend(SCRIPTS)
    llama = importlib.import_module("contenders.llama_logits")
    if llama.find_llama_cpp() is None:
        pytest.skip("needs xllamacpp or llama-cpp-python")
    return llama.LlamaModel(path, num_positions=64, threads=1)
