"""What the tests of the engine load and ask."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from coreinfer import runtime
from coreinfer.bundles import Bundle

from .model_factory import corpus_texts

PROMPT = corpus_texts()[0]
UNFAMILIAR = "zzz qqq"
DIALOGUE = [
    {"role": "system", "content": "Speak of ships, storms and the harbour."},
    {"role": "user", "content": "The sea text number 4 speaks of whale and anchor"},
    {"role": "assistant", "content": "tide"},
    {"role": "user", "content": "The kitchen text number 5 speaks of soup and lemon and salt"},
]
MAX_POSITIONS = 256
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_k": 100, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1}


def load(bundle_dir: Path, **options: Any) -> runtime.Engine:
    return runtime.load(bundle_dir, **{"device": "cpu", "dtype": "float32", **options})


def with_room(bundle: Bundle, *, factor: int = 4) -> Bundle:
    """A bundle of a model with rotary positions, as if it had been made for more of them."""
    model = replace(bundle.manifest.model, max_positions=factor * MAX_POSITIONS)
    return replace(bundle, manifest=replace(bundle.manifest, model=model))
