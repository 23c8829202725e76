"""Which tensors a bundle's files must hold: the part of the format that a manifest implies."""

from collections.abc import Mapping

import numpy as np

from .formats import ffn_formats, stored_shapes
from .manifest import Manifest, TensorRecord
from .tensors import TensorFile

__all__ = ["check_neuron_ids", "check_tensors", "cluster_tensors", "dense_tensors", "tensor_name"]


def tensor_name(layer: int, role: str) -> str:
    """Name a tensor of the dense FFN or of a cluster pack, as in `layers.3.down`."""
    return f"layers.{layer}.{role}"


def dense_tensors(manifest: Manifest) -> dict[str, TensorRecord]:
    """List the tensors of the dense FFN file: weights, biases, and the norms of the down projection's columns."""
    records: dict[str, TensorRecord] = {}
    for layer in range(manifest.model.num_layers):
        records |= _ffn_tensors(manifest, layer, manifest.model.ffn_dim)
        records[tensor_name(layer, "column_norms")] = TensorRecord(dtype="F32", shape=(manifest.model.ffn_dim,))
    return records


def cluster_tensors(manifest: Manifest, cluster: int) -> dict[str, TensorRecord]:
    """List the tensors of a cluster's pack: narrow weights, biases, neuron ids and the cluster's scores."""
    records: dict[str, TensorRecord] = {}
    for layer, budget in enumerate(manifest.clusters[cluster].layer_budgets):
        records |= _ffn_tensors(manifest, layer, budget)
        records[tensor_name(layer, "neuron_ids")] = TensorRecord(dtype="I32", shape=(budget,))
        records[tensor_name(layer, "scores")] = TensorRecord(dtype="F32", shape=(manifest.model.ffn_dim,))
    return records


def _ffn_tensors(manifest: Manifest, layer: int, num_neurons: int) -> dict[str, TensorRecord]:
    model = manifest.model
    shape = (num_neurons, model.hidden_size)
    records: dict[str, TensorRecord] = {}
    for role, kind in ffn_formats(manifest.quantization["ffn"].format, gated=model.gated).items():
        parts = stored_shapes(tensor_name(layer, role), kind, shape[::-1] if role == "down" else shape)
        records |= {name: TensorRecord(dtype=dtype, shape=part) for name, (dtype, part) in parts.items()}
    if model.ffn_bias:
        if model.gated:
            records[tensor_name(layer, "gate_bias")] = TensorRecord(dtype="F32", shape=(num_neurons,))
        records[tensor_name(layer, "up_bias")] = TensorRecord(dtype="F32", shape=(num_neurons,))
        records[tensor_name(layer, "down_bias")] = TensorRecord(dtype="F32", shape=(model.hidden_size,))
    return records


def check_tensors(file: TensorFile, expected: Mapping[str, TensorRecord]) -> list[str]:
    """Compare names, dtypes and shapes; one line for each difference."""
    problems = [f"{file.path}: tensor {name!r} is missing" for name in expected if name not in file]
    problems += [f"{file.path}: tensor {name!r} is unknown" for name in file if name not in expected]
    for name, record in expected.items():
        if name in file and (got := _record(file, name)) != record:
            problems.append(
                f"{file.path}: tensor {name!r}: expected {record.dtype} {list(record.shape)}, "
                f"got {got.dtype} {list(got.shape)}"
            )
    return problems


def _record(file: TensorFile, name: str) -> TensorRecord:
    dtype, shape = file.shape_of(name)
    return TensorRecord(dtype=dtype, shape=shape)


def check_neuron_ids(file: TensorFile, manifest: Manifest) -> list[str]:
    """Check that every layer's neuron ids ascend within 0 .. ffn_dim - 1; one line for each layer where not."""
    problems = []
    for layer in range(manifest.model.num_layers):
        name = tensor_name(layer, "neuron_ids")
        ids = file[name].array.astype(np.int64)
        if ids.size == 0 or ids[0] < 0 or ids[-1] >= manifest.model.ffn_dim or np.any(np.diff(ids) <= 0):
            problems.append(f"{file.path}: {name}: expected ascending ids below {manifest.model.ffn_dim}")
    return problems
