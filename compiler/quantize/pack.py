"""Stages `pack` and `write`: tensors and files of a bundle."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.contract import expert_role, tensor_name
from coreinfer.bundles.families import ffn_tensors
from coreinfer.bundles.formats import cut_columns, cut_rows, ffn_formats
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import TensorRecord
from coreinfer.bundles.tensors import StoredTensor, stream_tensors, write_tensors
from coreinfer.bundles.zero_neurons import ffn_kind
from coreinfer.compiler.clusters.embed import StaticEncoder
from coreinfer.compiler.models.load import LoadedModel, stop_ids
from coreinfer.compiler.models.tokenizer_files import chat_templates, special_tokens
from coreinfer.compiler.prune.narrow import NarrowDown, NarrowModel, narrow_down, narrow_downs, narrow_layer
from torch import nn

from .moments import Moments, ffn_moments
from .norms import ColumnNorms
from .quantize import QuantizeOptions, store_matrix

__all__ = ["Packer", "quick_to_read", "write_base", "write_cluster", "write_dense", "write_router", "write_tokenizer"]

_HEAD = "lm_head"

_Tensors = Iterator[tuple[str, StoredTensor]]
"""Names and tensors, made as they are asked for: no more than one packed matrix is in memory."""


@dataclass(frozen=True, kw_only=True)
class Packer:
    """How matrices are stored.

    Attributes:
        formats: of FFN and attention, and of embedding and head.
        moments: of the inputs of the linear modules, which their rounding is weighed by.
        with_norms: whether the norms of columns are stored, for token shares.
    """

    formats: QuantizeOptions
    moments: Moments
    with_norms: bool = False

    def matrix(self, name: str, weight: torch.Tensor, moment: torch.Tensor | None) -> Mapping[str, StoredTensor]:
        """Store a matrix of the attention."""
        return store_matrix(name, weight, self.formats.body, moment)

    def ffn_format(self, loaded: LoadedModel, layer: int, role: str) -> str:
        """Say how a matrix of a layer's FFN is stored, or an expert's (`experts.E.` and its role)."""
        kind = ffn_kind(loaded.record, self.formats.ffn, layer)
        return ffn_formats(kind, gated=loaded.record.gated)[role.rpartition(".")[2]]


def write_base(stage: Path, loaded: LoadedModel, packer: Packer) -> dict[str, TensorRecord]:
    """Write everything that is not FFN: matrices in their group's format, vectors (norms, biases) in f32.

    Returns:
        Name -> dtype and shape of each tensor, for the manifest.
    """
    written = stream_tensors(stage / LAYOUT.base, _base_tensors(loaded, packer))
    return {name: TensorRecord(dtype=dtype, shape=shape) for name, (dtype, shape) in written.items()}


def _base_tensors(loaded: LoadedModel, packer: Packer) -> _Tensors:
    ffn = {id(tensor) for layer in loaded.layers for tensor in _ffn_parameters(layer, loaded)}
    groups, norms = _attention_groups(loaded) if packer.with_norms else {}, ColumnNorms()
    seen: set[int] = set()
    for name, parameter in loaded.model.named_parameters():
        # named_parameters leaves out the second name of a tied tensor.
        if id(parameter) not in ffn and id(parameter) not in seen:
            seen.add(id(parameter))
            yield from _counted(_base_tensor(name, parameter.detach(), loaded, packer), name, groups, norms, parameter)
    yield from norms.take()


def _counted(
    stored: Mapping[str, StoredTensor],
    name: str,
    groups: Mapping[str, tuple[int, str]],
    norms: ColumnNorms,
    parameter: torch.Tensor,
) -> _Tensors:
    """Pass a matrix on, counted if it has a group; nothing holds it when the next one is stored."""
    if name in groups:
        norms.add(*groups[name], stored, name, (parameter.shape[0], parameter.shape[1]))
    yield from stored.items()


def _attention_groups(loaded: LoadedModel) -> dict[str, tuple[int, str]]:
    """Name of a matrix of the attention -> its layer, and the group that has its inputs."""
    paths = {path: group for group in ("qkv", "o") for path in loaded.family.input_groups[group]}
    return {
        f"{loaded.family.layers}.{layer}.{path}.weight": (layer, group)
        for layer in range(loaded.record.num_layers)
        for path, group in paths.items()
    }


def _base_tensor(name: str, tensor: torch.Tensor, loaded: LoadedModel, packer: Packer) -> Mapping[str, StoredTensor]:
    if tensor.ndim == 1:
        return {name: _vector(tensor)}
    path = name.removesuffix(".weight")
    if path in (loaded.family.embedding, *loaded.family.tables, _HEAD):
        return store_matrix(name, tensor, packer.formats.head, None)
    if isinstance(loaded.model.get_submodule(path), nn.Linear) and not path.endswith(loaded.family.exact):
        return packer.matrix(name, tensor, packer.moments.get(path))
    # Learned positions, routers and the like: few bytes are read of them.
    return store_matrix(name, tensor, "bf16", None)


def _ffn_parameters(layer: nn.Module, loaded: LoadedModel) -> list[torch.Tensor]:
    modules = [layer.get_submodule(path) for path in loaded.family.projections.values()]
    return [parameter for module in modules for parameter in module.parameters()]


def write_dense(stage: Path, loaded: LoadedModel, packer: Packer) -> None:
    """Write the dense FFN."""
    stream_tensors(stage / LAYOUT.dense, _dense_tensors(loaded, packer))


def _dense_tensors(loaded: LoadedModel, packer: Packer) -> _Tensors:
    for index, layer in enumerate(loaded.layers):
        weights, experts = ffn_tensors(layer, loaded.family), loaded.record.experts
        for prefix in [""] if experts is None else [expert_role(number, "") for number in range(experts.num_experts)]:
            own = {role: weight for role, weight in weights.items() if role.startswith(prefix)}
            width = loaded.record.ffn_dim if experts is None else loaded.record.expert_neurons
            tensors = _ffn_layer(loaded, packer, index, own, None)
            yield from _with_norms(loaded, packer, index, width, tensors, prefix)
        if experts is None:
            yield tensor_name(index, "column_norms"), StoredTensor("F32", loaded.column_norms[index])


def write_cluster(
    path: Path,
    loaded: LoadedModel,
    packer: Packer,
    narrow: NarrowModel,
    cluster: int,
    dense: Mapping[str, StoredTensor],
) -> None:
    """Write one cluster pack: narrow weights, neuron ids and scores of every layer.

    Of a mixture whose experts stay whole, which there are, whose weights are the dense FFN's, and the scores of all.

    Args:
        dense: tensors that `write_dense` wrote. Each row is rounded by itself, so gate and up are cut from them unless
            they were healed. Groups of the down projection run along its neurons: other neighbours need other scales,
            so it is rounded, from the model's own weights or the repaired ones, unless it is whole. Stored neuron by
            neuron it is cut, too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stream_tensors(path, _cluster_tensors(loaded, packer, narrow, cluster, dense))


def _cluster_tensors(
    loaded: LoadedModel, packer: Packer, narrow: NarrowModel, cluster: int, dense: Mapping[str, StoredTensor]
) -> _Tensors:
    for index in range(loaded.record.num_layers):
        neuron_ids = narrow.choice.neuron_ids[cluster][index]
        if loaded.record.experts is not None and narrow.choice.keeps_whole_experts(loaded.record):
            yield tensor_name(index, "experts"), StoredTensor("I32", neuron_ids)
            yield tensor_name(index, "scores"), StoredTensor("F32", narrow.choice.scores[cluster][index])
            continue
        if loaded.record.experts is not None:
            if narrow.choice.lists_experts:
                numbers = np.array(narrow.choice.experts_of(loaded.record, cluster, index), dtype=np.int32)
                yield tensor_name(index, "experts"), StoredTensor("I32", numbers)
            yield from _narrow_experts(loaded, packer, narrow, cluster, index, dense)
        else:
            tensors = _narrow_layer(loaded, packer, narrow, cluster, index, dense)
            yield from _with_norms(loaded, packer, index, len(neuron_ids), tensors)
        yield tensor_name(index, "neuron_ids"), StoredTensor("I32", neuron_ids)
        yield tensor_name(index, "scores"), StoredTensor("F32", narrow.choice.scores[cluster][index])


def _narrow_layer(
    loaded: LoadedModel,
    packer: Packer,
    narrow: NarrowModel,
    cluster: int,
    layer: int,
    dense: Mapping[str, StoredTensor],
) -> _Tensors:
    """Store one layer's FFN of a pack."""
    neuron_ids = narrow.choice.neuron_ids[cluster][layer]
    if narrow.inner is not None:
        weights = narrow_layer(loaded, narrow, layer, cluster)
    else:
        yield from _cut_inner(loaded, dense, layer, neuron_ids)
        weights = narrow_down(loaded, narrow, layer, cluster)
        by_neuron = packer.ffn_format(loaded, layer, "down") == "int4-columns"
        if narrow.downs[layer][cluster] is None and by_neuron:
            del weights["down"]
            yield from cut_columns(dense, tensor_name(layer, "down"), neuron_ids).items()
        elif narrow.downs[layer][cluster] is None and len(neuron_ids) == loaded.record.ffn_dim:
            yield from cut_rows(dense, tensor_name(layer, "down"), np.arange(len(weights.pop("down")))).items()
    yield from _ffn_layer(loaded, packer, layer, weights, neuron_ids)


def _narrow_experts(
    loaded: LoadedModel,
    packer: Packer,
    narrow: NarrowModel,
    cluster: int,
    layer: int,
    dense: Mapping[str, StoredTensor],
) -> _Tensors:
    """Store each expert of a layer with the neurons that it keeps, by their numbers among those of all experts."""
    for expert in narrow_downs(loaded, narrow, layer, cluster):
        tensors = _narrow_expert(loaded, packer, layer, expert, dense)
        yield from _with_norms(loaded, packer, layer, len(expert.neuron_ids), tensors, expert_role(expert.number, ""))


def _narrow_expert(
    loaded: LoadedModel, packer: Packer, layer: int, expert: NarrowDown, dense: Mapping[str, StoredTensor]
) -> _Tensors:
    """Store an expert with the neurons that it keeps."""
    ids, rows = expert.neuron_ids, np.arange(loaded.record.hidden_size)
    for role in ("gate", "up", *(("gate_bias", "up_bias") if loaded.record.ffn_bias else ())):
        yield from cut_rows(dense, tensor_name(layer, expert_role(expert.number, role)), ids).items()
    down, bias = (expert_role(expert.number, role) for role in ("down", "down_bias"))
    if expert.bias is not None:
        yield tensor_name(layer, bias), _vector(expert.bias)
    elif loaded.record.ffn_bias:
        yield from cut_rows(dense, tensor_name(layer, bias), rows).items()
    if len(ids) == loaded.record.expert_neurons:
        yield from cut_rows(dense, tensor_name(layer, down), rows).items()
    else:
        yield from _ffn_layer(loaded, packer, layer, {down: expert.weight}, ids)


def _with_norms(
    loaded: LoadedModel, packer: Packer, layer: int, num_neurons: int, tensors: _Tensors, prefix: str = ""
) -> _Tensors:
    """Put the norms of the columns after a layer's FFN, or after an expert, where they are wanted.

    Args:
        prefix: of an expert's roles.
    """
    if not packer.with_norms:
        yield from tensors
        return
    stored: dict[str, StoredTensor] = {}
    for name, tensor in tensors:
        stored[name] = tensor
        yield name, tensor
    norms, size = ColumnNorms(), loaded.record.hidden_size
    for role in ("gate", "up", "down") if loaded.record.gated else ("up", "down"):
        group, shape = ("down", (size, num_neurons)) if role == "down" else ("gate_up", (num_neurons, size))
        norms.add(layer, prefix + group, stored, tensor_name(layer, prefix + role), shape)
    yield from norms.take()


def _cut_inner(
    loaded: LoadedModel, dense: Mapping[str, StoredTensor], layer: int, neuron_ids: npt.NDArray[np.int32]
) -> _Tensors:
    """Cut gate and up, and their biases, from the stored dense FFN."""
    for role in loaded.family.projections:
        if role != "down":
            yield from cut_rows(dense, tensor_name(layer, role), neuron_ids).items()
            if loaded.projection(layer, role).bias is not None:
                yield from cut_rows(dense, tensor_name(layer, f"{role}_bias"), neuron_ids).items()


def _ffn_layer(
    loaded: LoadedModel,
    packer: Packer,
    layer: int,
    weights: Mapping[str, torch.Tensor],
    neuron_ids: npt.NDArray[np.int32] | None,
) -> _Tensors:
    """Store one layer's FFN; `neuron_ids` says which neurons are the inputs of its down projection, None for all."""
    for role, tensor in weights.items():
        name = tensor_name(layer, role)
        if tensor.ndim == 1:
            yield name, _vector(tensor)
            continue
        moment = ffn_moments(packer.moments, loaded.family, layer, role, neuron_ids)
        yield from store_matrix(name, tensor, packer.ffn_format(loaded, layer, role), moment).items()


def _vector(tensor: torch.Tensor) -> StoredTensor:
    return StoredTensor("F32", np.ascontiguousarray(tensor.detach().float().cpu().numpy()))


def write_tokenizer(stage: Path, loaded: LoadedModel) -> None:
    """Write the tokenizer, the chat templates and the generation defaults."""
    (stage / LAYOUT.tokenizer).parent.mkdir()
    backend = loaded.tokenizer.backend_tokenizer
    (stage / LAYOUT.tokenizer).write_text(quick_to_read(backend.to_str()), encoding="utf-8")
    files = {"default": LAYOUT.chat_template, "tool_use": LAYOUT.tool_template}
    for name, template in chat_templates(loaded.tokenizer).items():
        (stage / files[name]).write_text(template, encoding="utf-8")
    defaults = {
        "eos_token_ids": sorted(stop_ids(loaded)),
        "special_tokens": dict(special_tokens(loaded.tokenizer)),
    }
    (stage / LAYOUT.generation).write_text(json.dumps(defaults, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def quick_to_read(tokenizer_json: str) -> str:
    """Write a tokenizer compactly, without truncation and padding, which are only for training.

    Merges of two tokens are written as "a b", the older of the two forms that `tokenizers` reads, and by a quarter the
    quicker; where a token has a space in it they stay lists.
    """
    data: dict[str, Any] = json.loads(tokenizer_json)
    data["truncation"] = data["padding"] = None
    merges = data["model"].get("merges")
    if merges and not any(" " in token for merge in merges for token in merge):
        data["model"]["merges"] = [" ".join(merge) for merge in merges]
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def write_router(stage: Path, encoder: StaticEncoder, centroids: npt.NDArray[np.float32]) -> None:
    """Write the static encoder and a FAISS index of the centroids in its space."""
    (stage / LAYOUT.router_table).parent.mkdir(parents=True)
    write_tensors(stage / LAYOUT.router_table, {"table": StoredTensor("F16", encoder.table)})
    (stage / LAYOUT.router_tokenizer).write_text(encoder.tokenizer_json, encoding="utf-8")
    index = faiss.IndexFlatIP(centroids.shape[1])
    index.add(np.ascontiguousarray(centroids))
    faiss.write_index(index, str(stage / LAYOUT.router_index))
