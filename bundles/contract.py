"""Which tensors a bundle's files must hold: the part of the format that a manifest implies."""

from collections.abc import Mapping, Sequence

import numpy as np

from .formats import ffn_formats, stored_shapes
from .manifest import Manifest, TensorRecord
from .tensors import TensorFile
from .zero_neurons import ffn_kind

__all__ = [
    "ATTENTION_GROUPS",
    "FFN_GROUPS",
    "INPUT_GROUPS",
    "check_neuron_ids",
    "check_tensors",
    "cluster_tensors",
    "dense_tensors",
    "expert_role",
    "is_norms",
    "kept_experts",
    "norms_role",
    "tensor_name",
    "token_share_tensors",
]

_EXPERTS = "experts"
ATTENTION_GROUPS, FFN_GROUPS = ("qkv", "o"), ("gate_up", "down")
INPUT_GROUPS = (*ATTENTION_GROUPS, *FFN_GROUPS)
"""Matrices of a layer that have the same inputs, of which a token may leave some out."""


def tensor_name(layer: int, role: str) -> str:
    """Name a tensor of the dense FFN or of a cluster pack, as in `layers.3.down`."""
    return f"layers.{layer}.{role}"


def expert_role(expert: int, role: str) -> str:
    """Name a matrix ("gate", "up", "down"), or a bias, of one of a layer's experts, as in `experts.5.down_bias`."""
    return f"experts.{expert}.{role}"


def norms_role(group: str) -> str:
    """Name the norms of the columns of a group's matrices, all outputs together, as in `layers.3.` and `qkv_norms`."""
    return f"{group}_norms"


def is_norms(name: str) -> bool:
    """Whether a tensor holds such norms, which no model has."""
    return name.endswith(tuple(f".{norms_role(group)}" for group in INPUT_GROUPS))


def token_share_tensors(manifest: Manifest) -> dict[str, TensorRecord]:
    """List the tensors of the file of token shares, which there is where the manifest has such a record."""
    record = manifest.token_shares
    assert record is not None
    shape = (manifest.model.num_layers, len(INPUT_GROUPS))
    whose = [*(["dense"] if manifest.plan.dense else []), *map(str, range(len(manifest.clusters)))]
    shapes: dict[str, tuple[int, ...]] = {"levels": (record.num_levels,), "targets": (record.num_targets,)}
    shapes |= {f"thresholds.{name}": (*shape, record.num_levels) for name in whose}
    shapes["plan"] = (record.num_targets, *shape)
    if record.halves:
        shapes["half_ratios"] = shape
    return {name: TensorRecord(dtype="F32", shape=found) for name, found in shapes.items()}


def dense_tensors(manifest: Manifest) -> dict[str, TensorRecord]:
    """List the tensors of the dense FFN file: weights, biases, and the norms of the down projection's columns.

    Of a mixture of experts, the matrices and biases of each expert, and norms for token shares alone.
    """
    records: dict[str, TensorRecord] = {}
    experts = manifest.model.experts
    for layer in range(manifest.model.num_layers):
        if experts is not None:
            for expert in range(experts.num_experts):
                width, prefix = manifest.model.expert_neurons, expert_role(expert, "")
                records |= _ffn_tensors(manifest, layer, width, prefix)
                records |= _input_norms(manifest, layer, width, prefix)
            continue
        records |= _ffn_tensors(manifest, layer, manifest.model.ffn_dim)
        records[tensor_name(layer, "column_norms")] = TensorRecord(dtype="F32", shape=(manifest.model.ffn_dim,))
        records |= _input_norms(manifest, layer, manifest.model.ffn_dim)
    return records


def cluster_tensors(manifest: Manifest, cluster: int, file: TensorFile | None = None) -> dict[str, TensorRecord]:
    """List the tensors of a cluster's pack: narrow weights, biases, neuron ids and the cluster's scores.

    Of a mixture of experts, which experts the cluster has, and its scores of all: their weights are the dense FFN's.
    Where experts are narrowed, the narrow weights of each, and neuron ids and scores of all experts' neurons together;
    where some of them are left out besides, which experts the cluster has.

    Args:
        file: the pack, which says which experts it has; None for the first ones.
    """
    records: dict[str, TensorRecord] = {}
    experts = manifest.model.experts
    for layer, budget in enumerate(manifest.clusters[cluster].layer_budgets):
        if experts is not None and manifest.narrows_experts:
            numbers = _narrow_experts(manifest, cluster, layer, file)
            for expert in numbers:
                width, prefix = budget // len(numbers), expert_role(expert, "")
                records |= _ffn_tensors(manifest, layer, width, prefix)
                records |= _input_norms(manifest, layer, width, prefix)
            if manifest.lists_experts:
                records[tensor_name(layer, _EXPERTS)] = TensorRecord(dtype="I32", shape=(len(numbers),))
            records |= _chosen_neurons(manifest, layer, budget)
            continue
        if experts is not None:
            kept = budget // manifest.model.expert_neurons
            records[tensor_name(layer, _EXPERTS)] = TensorRecord(dtype="I32", shape=(kept,))
            records[tensor_name(layer, "scores")] = TensorRecord(dtype="F32", shape=(experts.num_experts,))
            continue
        records |= _ffn_tensors(manifest, layer, budget)
        records |= _input_norms(manifest, layer, budget)
        records |= _chosen_neurons(manifest, layer, budget)
    return records


def _narrow_experts(manifest: Manifest, cluster: int, layer: int, file: TensorFile | None) -> Sequence[int]:
    """The experts of a layer of a pack that narrows them, by what the pack lists where it has as many as it should."""
    record = manifest.clusters[cluster]
    assert manifest.model.experts is not None
    if record.layer_experts is None:
        return range(manifest.model.experts.num_experts)
    count, name = record.layer_experts[layer], tensor_name(layer, _EXPERTS)
    if file is None or name not in file or _record(file, name) != TensorRecord(dtype="I32", shape=(count,)):
        return range(count)
    numbers: list[int] = file[name].array.tolist()
    return numbers


def _chosen_neurons(manifest: Manifest, layer: int, budget: int) -> dict[str, TensorRecord]:
    return {
        tensor_name(layer, "neuron_ids"): TensorRecord(dtype="I32", shape=(budget,)),
        tensor_name(layer, "scores"): TensorRecord(dtype="F32", shape=(manifest.model.ffn_dim,)),
    }


def _matrices(manifest: Manifest, layer: int, prefix: str, num_neurons: int) -> dict[str, TensorRecord]:
    model = manifest.model
    shape = (num_neurons, model.hidden_size)
    records: dict[str, TensorRecord] = {}
    stored = ffn_kind(model, manifest.quantization["ffn"].format, layer)
    for role, kind in ffn_formats(stored, gated=model.gated).items():
        parts = stored_shapes(tensor_name(layer, prefix + role), kind, shape[::-1] if role == "down" else shape)
        records |= {name: TensorRecord(dtype=dtype, shape=part) for name, (dtype, part) in parts.items()}
    return records


def _ffn_tensors(manifest: Manifest, layer: int, num_neurons: int, prefix: str = "") -> dict[str, TensorRecord]:
    """An FFN's matrices and biases, or an expert's, whose roles begin with a prefix."""
    model = manifest.model
    records = _matrices(manifest, layer, prefix, num_neurons)
    if model.ffn_bias:
        sizes = {"gate_bias": num_neurons} if model.gated else {}
        sizes |= {"up_bias": num_neurons, "down_bias": model.hidden_size}
        for role, size in sizes.items():
            records[tensor_name(layer, prefix + role)] = TensorRecord(dtype="F32", shape=(size,))
    return records


def _input_norms(manifest: Manifest, layer: int, num_neurons: int, prefix: str = "") -> dict[str, TensorRecord]:
    """Norms of the columns of an FFN, or of an expert, of a bundle with token shares."""
    if manifest.token_shares is None:
        return {}
    sizes = {"gate_up": manifest.model.hidden_size, "down": num_neurons}
    return {
        tensor_name(layer, prefix + norms_role(group)): TensorRecord(dtype="F32", shape=(size,))
        for group, size in sizes.items()
    }


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
    """Check that every layer's neuron ids, or experts, ascend within what a layer has.

    Of experts there must be as many as a token uses, and of narrow ones each must have as many neurons.

    Returns:
        One line for each layer where not.
    """
    if manifest.narrows_experts:
        return _check_narrow_experts(file, manifest)
    experts = manifest.model.experts
    role, count = ("neuron_ids", manifest.model.ffn_dim) if experts is None else (_EXPERTS, experts.num_experts)
    least = 1 if experts is None else experts.num_chosen
    problems = []
    for layer in range(manifest.model.num_layers):
        name = tensor_name(layer, role)
        ids = file[name].array.astype(np.int64)
        if ids.size < least or ids[0] < 0 or ids[-1] >= count or np.any(np.diff(ids) <= 0):
            at_least = "" if least == 1 else f"{least} or more "
            problems.append(f"{file.path}: {name}: expected {at_least}ascending ids below {count}")
    return problems


def _check_narrow_experts(file: TensorFile, manifest: Manifest) -> list[str]:
    model = manifest.model
    assert model.experts is not None
    problems = []
    for layer, numbers in enumerate(kept_experts(file, manifest)):
        name = tensor_name(layer, "neuron_ids")
        ids = file[name].array.astype(np.int64)
        width = ids.size // len(numbers)
        if min(numbers) < 0 or max(numbers) >= model.experts.num_experts or np.any(np.diff(numbers) <= 0):
            listed = tensor_name(layer, _EXPERTS)
            problems.append(f"{file.path}: {listed}: expected ascending ids below {model.experts.num_experts}")
        elif not np.array_equal(ids // model.expert_neurons, np.repeat(numbers, width)) or np.any(np.diff(ids) <= 0):
            expected = f"ascending ids below {model.ffn_dim}, {width} of each {model.expert_neurons}"
            whose = " that it has" if manifest.lists_experts else ""
            problems.append(f"{file.path}: {name}: expected {expected}{whose}")
    return problems


def kept_experts(file: TensorFile | None, manifest: Manifest) -> list[list[int]]:
    """List each layer's experts, ascending: those of a cluster's pack, which was checked, or with None all."""
    experts = manifest.model.experts
    assert experts is not None
    if file is None or (manifest.narrows_experts and not manifest.lists_experts):
        return [list(range(experts.num_experts))] * manifest.model.num_layers
    return [file[tensor_name(layer, _EXPERTS)].array.tolist() for layer in range(manifest.model.num_layers)]
