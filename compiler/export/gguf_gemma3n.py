"""Gemma 3n as a GGUF file: what llama.cpp has for all of its models, and tensors that it asks for and does not use."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
from coreinfer.bundles.families import num_cached_layers
from coreinfer.bundles.formats import GROUP_SIZE
from coreinfer.compiler.models.gguf.gemma3n import LOGIT_LIMIT
from coreinfer.compiler.models.gguf.names import TensorLayout
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from .chosen import ChosenModel
from .gguf_refusal import refusal

__all__ = ["UnusedTensor", "check_gemma3n", "stream_fields", "table_rows", "unused_tensors"]

_FIXED: dict[str, Any] = {
    "altup_num_inputs": 4,
    "altup_active_idx": 0,
    "altup_correct_scale": True,
    "hidden_size_per_layer_input": 256,
    "laurel_rank": 64,
    "final_logit_softcapping": LOGIT_LIMIT,
    "attention_bias": False,
}
"""Fields of the config -> what llama.cpp computes with, whatever a file says."""
_NUM_CACHED, _NUM_SPARSE, _SHARE = 20, 10, 0.95
"""Layers that have keys and values of their own; those whose gates are cut off, the first, and the share that is."""


@dataclass(frozen=True, kw_only=True)
class UnusedTensor:
    """A tensor that llama.cpp does not load a file without, and computes nothing with: zeros.

    Attributes:
        shape: in torch's order.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType

    @property
    def num_bytes(self) -> int:
        """In the file."""
        per_block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape)) // int(per_block) * int(block_bytes)

    @property
    def values(self) -> npt.NDArray[np.uint8]:
        """Its bytes."""
        return np.zeros(self.num_bytes, dtype=np.uint8)


def check_gemma3n(chosen: ChosenModel) -> None:
    """Refuse a model that llama.cpp would compute otherwise.

    Raises:
        UnsupportedModelError: it is none like those that were published.
    """
    config, num_layers = chosen.config, chosen.bundle.manifest.model.num_layers
    num_sparse = min(_NUM_SPARSE, num_layers)
    expected = {
        **_FIXED,
        "num_kv_shared_layers": max(0, num_layers - _NUM_CACHED),
        "activation_sparsity_pattern": [_SHARE] * num_sparse + [0.0] * (num_layers - num_sparse),
    }
    for field, value in expected.items():
        if (stated := config.get(field, value)) != value:
            raise refusal(f"llama.cpp's gemma3n has no {field} of {stated!r}, but {value!r}; use --to hf")


def stream_fields(chosen: ChosenModel) -> dict[str, Any]:
    """Return the keys of what only this architecture has."""
    config = chosen.config
    shares = config["activation_sparsity_pattern"]
    return {
        "altup.active_idx": int(config["altup_active_idx"]),
        "altup.num_inputs": int(config["altup_num_inputs"]),
        "embedding_length_per_layer_input": int(config["hidden_size_per_layer_input"]),
        "attention.shared_kv_layers": int(config["num_kv_shared_layers"]),
        "activation_sparsity_scale": [NormalDist().inv_cdf(share) if share else -float("inf") for share in shares],
        "final_logit_softcapping": float(config["final_logit_softcapping"]),
    }


def unused_tensors(chosen: ChosenModel, layout: TensorLayout) -> Iterator[UnusedTensor]:
    """Keys and values of layers that have those of others, which the bundle does not hold."""
    if not layout.caches:
        return
    model = chosen.bundle.manifest.model
    rows, hidden = model.num_kv_heads * model.head_dim, model.hidden_size
    kind = GGMLQuantizationType.F32 if hidden % GROUP_SIZE else GGMLQuantizationType.Q4_1
    for layer in range(num_cached_layers(model.family, model.num_layers, model.config), model.num_layers):
        for name in layout.caches:
            is_norm = name in layout.norms
            shape = (model.head_dim,) if is_norm else (rows, hidden)
            own_kind = GGMLQuantizationType.F32 if is_norm else kind
            yield UnusedTensor(name=f"blk.{layer}.{name}.weight", shape=shape, kind=own_kind)


def table_rows(num_rows: int, vocab_size: int) -> npt.NDArray[np.integer[Any]]:
    """Which row of a table each token has: llama.cpp wants one for each, and tokens beyond have the first one's."""
    rows = np.arange(vocab_size)
    return np.where(rows < num_rows, rows, 0)
