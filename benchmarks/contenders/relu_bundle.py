"""Bundles of ReLU models with random weights in which a kind of text activates a known share of the neurons.

Token t is of kind t mod (number of shares). Its embedding bears its kind's mark, 32 numbers that no layer changes, and
gates of a neuron answer to each mark with plus or minus: text of kind k activates the same share k of each layer's
neurons with every token, and no others. Cluster k's pack holds just these, so that it computes what the dense model
does. That is the best case of a pack chosen once for a prompt, as predictors that are always right are that of neurons
chosen for each token.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.contract import tensor_name
from coreinfer.bundles.formats import GROUP_SIZE, NEURON_FORMAT, cut_columns, cut_rows, ffn_formats, float_matrix
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import (
    GROUPS,
    ClusterRecord,
    Manifest,
    ModelRecord,
    Plan,
    Provenance,
    QuantizationRecord,
    RouterRecord,
    TensorRecord,
    ffn_bytes,
)
from coreinfer.bundles.tensors import StoredTensor, TensorFile, stream_tensors, write_tensors
from coreinfer.bundles.writer import finish_manifest, stage_bundle
from coreinfer.compiler.quantize.quantize import store_matrix

__all__ = ["SHAPES", "ReluShape", "relu_bundle"]

_BODY, _HEAD = "int4", "int8-planes"
_MAX_POSITIONS = 2048
# Marks are far above the other numbers of an embedding, and gates answer far above the noise of their other weights:
# by more than five standard deviations. What attention and FFN add is small beside both, in all layers together.
_MARK, _ANSWER = 4.0, 0.06
_INNER_SCALE, _ATTENTION_SCALE, _DOWN_SCALE = 0.02, 0.002, 0.0004

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class ReluShape:
    """Widths of a gated model."""

    name: str
    hidden_size: int
    ffn_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int


SHAPES = {
    "1b": ReluShape(
        name="1b",
        hidden_size=2048,
        ffn_dim=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        vocab_size=49152,
    ),
    # ReluLLaMA-7B's.
    "7b": ReluShape(
        name="7b",
        hidden_size=4096,
        ffn_dim=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        vocab_size=32000,
    ),
}


def relu_bundle(
    target: Path, shape: ReluShape, shares: Sequence[float], *, ffn_format: str = _BODY, seed: int = 0
) -> Path:
    """Write a bundle with one cluster for each share of active neurons, unless it is there.

    Args:
        ffn_format: of the FFN: "int4" or `NEURON_FORMAT`.
        shares: of the neurons, in (0, 1], ascending; rounded to whole groups of 32 neurons.
    Returns:
        `target`.
    """
    if (target / LAYOUT.manifest).exists():
        return target
    random = torch.Generator().manual_seed(seed)
    counts = [max(1, round(share * shape.ffn_dim / GROUP_SIZE)) * GROUP_SIZE for share in shares]
    orders = [torch.randperm(shape.ffn_dim, generator=random).numpy() for _ in range(shape.num_layers)]
    # (clusters, layers): those of a smaller share are among those of a larger one.
    neuron_ids = [[np.sort(order[:count]).astype(np.int32) for order in orders] for count in counts]
    with stage_bundle(target, force=False) as stage:
        written = stream_tensors(stage / LAYOUT.base, _base_tensors(shape, len(shares), random))
        stream_tensors(stage / LAYOUT.dense, _dense_tensors(shape, ffn_format, neuron_ids, random))
        (stage / LAYOUT.clusters).mkdir(parents=True)
        dense = TensorFile(stage / LAYOUT.dense)
        for cluster, layer_ids in enumerate(neuron_ids):
            stream_tensors(stage / LAYOUT.cluster(cluster), _pack_tensors(shape, ffn_format, dense, layer_ids))
        del dense
        _write_small_files(stage)
        base_tensors = {name: TensorRecord(dtype=dtype, shape=size) for name, (dtype, size) in written.items()}
        finish_manifest(stage, _manifest(shape, ffn_format, counts, base_tensors))
    return target


def _normal(rows: int, columns: int, scale: float, random: torch.Generator) -> torch.Tensor:
    return torch.randn(rows, columns, generator=random).mul_(scale)


def _unmarked(matrix: torch.Tensor, num_kinds: int) -> torch.Tensor:
    """Leave marks alone: no output goes there."""
    matrix[: num_kinds * GROUP_SIZE] = 0
    return matrix


def _base_tensors(shape: ReluShape, num_kinds: int, random: torch.Generator) -> Iterator[tuple[str, StoredTensor]]:
    embedding = _normal(shape.vocab_size, shape.hidden_size, 1.0, random)
    embedding[:, : num_kinds * GROUP_SIZE] = 0
    for kind in range(num_kinds):
        embedding[kind::num_kinds, kind * GROUP_SIZE : (kind + 1) * GROUP_SIZE] = _MARK
    yield from store_matrix("model.embed_tokens.weight", embedding, _HEAD, None).items()
    ones = StoredTensor("F32", np.ones(shape.hidden_size, dtype=np.float32))
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        for role, rows in {"q_proj": queries, "k_proj": keys, "v_proj": keys}.items():
            matrix = _normal(rows, shape.hidden_size, _INNER_SCALE, random)
            yield from store_matrix(f"{prefix}.self_attn.{role}.weight", matrix, _BODY, None).items()
        output = _unmarked(_normal(shape.hidden_size, queries, _ATTENTION_SCALE, random), num_kinds)
        yield from store_matrix(f"{prefix}.self_attn.o_proj.weight", output, _BODY, None).items()
        yield f"{prefix}.input_layernorm.weight", ones
        yield f"{prefix}.post_attention_layernorm.weight", ones
    yield "model.norm.weight", ones


def _dense_tensors(
    shape: ReluShape, ffn_format: str, neuron_ids: Sequence[Sequence[Ids]], random: torch.Generator
) -> Iterator[tuple[str, StoredTensor]]:
    for layer in range(shape.num_layers):
        gate = _normal(shape.ffn_dim, shape.hidden_size, _INNER_SCALE, random)
        for kind, layer_ids in enumerate(neuron_ids):
            answers = torch.full((shape.ffn_dim, 1), -_ANSWER)
            answers[layer_ids[layer].astype(np.int64)] = _ANSWER
            gate[:, kind * GROUP_SIZE : (kind + 1) * GROUP_SIZE] = answers
        up = _normal(shape.ffn_dim, shape.hidden_size, _INNER_SCALE, random)
        down = _unmarked(_normal(shape.hidden_size, shape.ffn_dim, _DOWN_SCALE, random), len(neuron_ids))
        for role, matrix in {"gate": gate, "up": up, "down": down}.items():
            form = ffn_formats(ffn_format, gated=True)[role]
            yield from store_matrix(tensor_name(layer, role), matrix, form, None).items()
        yield tensor_name(layer, "column_norms"), StoredTensor("F32", down.norm(dim=0).numpy())


def _pack_tensors(
    shape: ReluShape, ffn_format: str, dense: TensorFile, layer_ids: Sequence[Ids]
) -> Iterator[tuple[str, StoredTensor]]:
    for layer, ids in enumerate(layer_ids):
        for role in ("gate", "up"):
            yield from cut_rows(dense, tensor_name(layer, role), ids).items()
        if ffn_format == NEURON_FORMAT:
            yield from cut_columns(dense, tensor_name(layer, "down"), ids).items()
        else:
            # Groups of the down projection run along its neurons: other neighbours, another rounding.
            down = _float_down(shape, dense, layer)[:, ids.astype(np.int64)]
            yield from store_matrix(tensor_name(layer, "down"), down, _BODY, None).items()
        yield tensor_name(layer, "neuron_ids"), StoredTensor("I32", ids)
        scores = np.zeros(shape.ffn_dim, dtype=np.float32)
        scores[ids] = 1
        yield tensor_name(layer, "scores"), StoredTensor("F32", scores)


def _float_down(shape: ReluShape, dense: TensorFile, layer: int) -> torch.Tensor:
    matrix = float_matrix(dense, tensor_name(layer, "down"), (shape.hidden_size, shape.ffn_dim))
    return torch.from_numpy(matrix)


def _write_small_files(stage: Path) -> None:
    """What a bundle must have and the decoder does not open: there is no text here."""
    for name in (LAYOUT.tokenizer, LAYOUT.generation, LAYOUT.router_index, LAYOUT.router_tokenizer):
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).write_text("{}", encoding="utf-8")
    write_tensors(stage / LAYOUT.router_table, {"table": StoredTensor("F32", np.zeros((1, 1), dtype=np.float32))})


def _manifest(
    shape: ReluShape, ffn_format: str, counts: Sequence[int], base_tensors: Mapping[str, TensorRecord]
) -> Manifest:
    model = _model(shape)
    packed = {"embedding": _HEAD, "head": _HEAD, "attention": _BODY, "ffn": ffn_format}
    formats = {
        group: QuantizationRecord(format=packed[group], group_size=GROUP_SIZE)
        if group in packed
        else QuantizationRecord(format="f32")
        for group in GROUPS
    }
    return Manifest(
        model=model,
        quantization=formats,
        clusters=tuple(_cluster(model, ffn_format, number, count) for number, count in enumerate(counts)),
        router=RouterRecord(encoder="static", dimension=1, distance_p99=1.0, agreement=None, num_agreement_sentences=0),
        plan=_plan(shape, counts[0]),
        quality=None,
        provenance=Provenance(
            coreinfer="benchmark", packages={}, model_sha256="", corpus_sha256="", encoder="", config={}
        ),
        base_tensors=dict(base_tensors),
    )


def _model(shape: ReluShape) -> ModelRecord:
    config: dict[str, Any] = {
        "model_type": "llama",
        "hidden_act": "relu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_dim,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": _MAX_POSITIONS,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return ModelRecord(
        name=f"relu-{shape.name}",
        family="llama",
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_dim=shape.ffn_dim,
        vocab_size=shape.vocab_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_positions=_MAX_POSITIONS,
        activation="relu",
        gated=True,
        ffn_bias=False,
        tied_head=True,
        config=config,
    )


def _cluster(model: ModelRecord, ffn_format: str, number: int, count: int) -> ClusterRecord:
    budgets = (count,) * model.num_layers
    return ClusterRecord(
        file=LAYOUT.cluster(number),
        label=f"kind {number}",
        num_sentences=1,
        num_tokens=1,
        examples=(),
        layer_budgets=budgets,
        keep_ratio=count / model.ffn_dim,
        ffn_bytes=ffn_bytes(model, ffn_format, budgets),
        map_x=0.0,
        map_y=0.0,
    )


def _plan(shape: ReluShape, count: int) -> Plan:
    return Plan(
        selection="output-aware",
        keep=count / shape.ffn_dim,
        alpha=0.4,
        beta=0.4,
        cluster_weight=1.0,
        budgets="uniform",
        layer_budgets=(count,) * shape.num_layers,
        reconstruct=False,
        ridges=(None,) * shape.num_layers,
        dense=True,
        stability_min_tokens=200,
        fused_half_tokens=100,
    )
