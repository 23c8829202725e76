"""Stages `pack` and `write`: tensors and files of a bundle."""

import json
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.contract import tensor_name
from coreinfer.bundles.families import ffn_tensors
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import TensorRecord
from coreinfer.bundles.tensors import StoredTensor, write_tensors
from torch import nn

from .embedding import StaticEncoder
from .models import LoadedModel, special_tokens, stop_ids
from .narrowing import NarrowModel, bf16_bits, narrow_layer

__all__ = ["pack_ffn_bytes", "write_base", "write_cluster", "write_dense", "write_router", "write_tokenizer"]


def write_base(stage: Path, loaded: LoadedModel) -> dict[str, TensorRecord]:
    """Write everything that is not FFN; matrices in bf16, vectors (norms, biases) in f32.

    Returns:
        Name -> dtype and shape of each tensor, for the manifest.
    """
    ffn = {id(tensor) for layer in loaded.layers for tensor in _ffn_parameters(layer, loaded)}
    tensors: dict[str, StoredTensor] = {}
    seen: set[int] = set()
    for name, parameter in loaded.model.named_parameters():
        # named_parameters leaves out the second name of a tied tensor.
        if id(parameter) not in ffn and id(parameter) not in seen:
            seen.add(id(parameter))
            tensors[name] = _stored(parameter.detach())
    write_tensors(stage / LAYOUT.base, tensors)
    return {name: TensorRecord(dtype=tensor.dtype, shape=tuple(tensor.array.shape)) for name, tensor in tensors.items()}


def _ffn_parameters(layer: nn.Module, loaded: LoadedModel) -> list[torch.Tensor]:
    modules = [layer.get_submodule(path) for path in loaded.family.projections.values()]
    return [parameter for module in modules for parameter in module.parameters()]


def write_dense(stage: Path, loaded: LoadedModel) -> None:
    """Write the dense FFN."""
    tensors: dict[str, StoredTensor] = {}
    for index, layer in enumerate(loaded.layers):
        for role, tensor in ffn_tensors(layer, loaded.family).items():
            tensors[tensor_name(index, role)] = _stored(tensor)
        tensors[tensor_name(index, "column_norms")] = StoredTensor("F32", loaded.column_norms[index])
    write_tensors(stage / LAYOUT.dense, tensors)


def write_cluster(stage: Path, loaded: LoadedModel, narrow: NarrowModel, cluster: int) -> None:
    """Write one cluster pack: narrow weights, neuron ids and scores of every layer."""
    tensors: dict[str, StoredTensor] = {}
    for index in range(loaded.record.num_layers):
        for role, tensor in narrow_layer(loaded, narrow, index, cluster).items():
            tensors[tensor_name(index, role)] = _stored(tensor)
        tensors[tensor_name(index, "neuron_ids")] = StoredTensor("I32", narrow.choice.neuron_ids[cluster][index])
        tensors[tensor_name(index, "scores")] = StoredTensor("F32", narrow.choice.scores[cluster][index])
    path = stage / LAYOUT.cluster(cluster)
    path.parent.mkdir(exist_ok=True)
    write_tensors(path, tensors)


def pack_ffn_bytes(loaded: LoadedModel, budgets: list[int]) -> int:
    """Bytes of narrow weights in bf16 that are read for one token."""
    num_matrices = len(loaded.family.projections)
    return sum(budgets) * num_matrices * loaded.record.hidden_size * 2


def _stored(tensor: torch.Tensor) -> StoredTensor:
    if tensor.ndim == 1:
        return StoredTensor("F32", np.ascontiguousarray(tensor.detach().float().cpu().numpy()))
    return StoredTensor("BF16", bf16_bits(tensor))


def write_tokenizer(stage: Path, loaded: LoadedModel) -> None:
    """Write the tokenizer, the chat template and the generation defaults."""
    (stage / LAYOUT.tokenizer).parent.mkdir()
    backend = loaded.tokenizer.backend_tokenizer
    (stage / LAYOUT.tokenizer).write_text(_without_limits(backend.to_str()), encoding="utf-8")
    if loaded.tokenizer.chat_template:
        (stage / LAYOUT.chat_template).write_text(str(loaded.tokenizer.chat_template), encoding="utf-8")
    defaults = {
        "eos_token_ids": sorted(stop_ids(loaded)),
        "special_tokens": dict(special_tokens(loaded.tokenizer)),
    }
    (stage / LAYOUT.generation).write_text(json.dumps(defaults, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_limits(tokenizer_json: str) -> str:
    """Drop truncation and padding, which belong to whoever trained with the tokenizer."""
    data: dict[str, Any] = json.loads(tokenizer_json)
    data["truncation"] = data["padding"] = None
    return json.dumps(data, ensure_ascii=False)


def write_router(stage: Path, encoder: StaticEncoder, centroids: npt.NDArray[np.float32]) -> None:
    """Write the static encoder and a FAISS index of the centroids in its space."""
    (stage / LAYOUT.router_table).parent.mkdir(parents=True)
    write_tensors(stage / LAYOUT.router_table, {"table": StoredTensor("F16", encoder.table)})
    (stage / LAYOUT.router_tokenizer).write_text(encoder.tokenizer_json, encoding="utf-8")
    index = faiss.IndexFlatIP(centroids.shape[1])
    index.add(np.ascontiguousarray(centroids))
    faiss.write_index(index, str(stage / LAYOUT.router_index))
