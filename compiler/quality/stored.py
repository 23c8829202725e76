"""The model as its bundle's files hold it: what is measured are the rounded weights that a device will read."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from coreinfer.bundles.contract import expert_role, tensor_name
from coreinfer.bundles.formats import float_matrix
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import TensorRecord
from coreinfer.bundles.tensors import TensorFile
from coreinfer.bundles.writer import disk_errors
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.models.swapping import Parameters, assign_values, parameters_in_use, values_of
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.prune.narrow import Cut, CutOf, NarrowModel
from coreinfer.compiler.quantize.pack import Packer, write_base, write_cluster, write_dense
from coreinfer.compiler.team.dealing import home, in_turn
from coreinfer.compiler.team.team import Pending, Shared, Team, Worker
from torch import nn

__all__ = ["StoredModel", "StoredPacks", "base_in_use", "dense_cut", "stored_packs", "store_model"]


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A model's files, ready for a bundle.

    Attributes:
        folder: where they lie, as in a bundle.
        target: of the bundle, to name it where the disk cannot take them.
        base_tensors: dtype and shape of each tensor of the base, for the manifest.
    """

    packer: Packer
    folder: Path
    target: Path
    base_tensors: dict[str, TensorRecord]


@dataclass(frozen=True, kw_only=True)
class StoredPacks:
    """The packs of a narrow model.

    Attributes:
        folder: where they lie, as in a bundle.
        cut: returns their layers, for a model.
        dense: file of the dense FFN where the packs only name experts of it; else None.
        thin: clusters that have none, and decode with the dense FFN.
    """

    folder: Path
    cut: CutOf
    dense: Path | None = None
    thin: frozenset[int] = frozenset()

    def without(self, clusters: Collection[int]) -> "StoredPacks":
        """Make more clusters thin: their packs' files are removed."""
        for cluster in clusters:
            (self.folder / LAYOUT.cluster(cluster)).unlink()
        return replace(self, thin=self.thin | frozenset(clusters))

    def ffn(self, cluster: int) -> TensorFile:
        """Open the file in which the weights of a cluster's pack are."""
        return TensorFile(self.dense or self.folder / LAYOUT.cluster(cluster))


def store_model(loaded: LoadedModel, packer: Packer, folder: Path, target: Path, progress: Progress) -> StoredModel:
    """Write base and dense FFN into a folder.

    Raises:
        BundleError: the disk cannot take them.
    """
    with progress.stage("pack", 2) as advance, disk_errors(target):
        base_tensors = write_base(folder, loaded, packer)
        advance()
        write_dense(folder, loaded, packer)
        advance()
    return StoredModel(packer=packer, folder=folder, target=target, base_tensors=base_tensors)


@contextmanager
def stored_packs(
    team: Team,
    stored: StoredModel,
    models: Mapping[str, NarrowModel],
    progress: Progress,
    thin: frozenset[int] = frozenset(),
) -> Iterator[dict[str, StoredPacks]]:
    """Store narrow models' packs for the time of the block.

    Args:
        thin: clusters whose packs are left out.
    Raises:
        BundleError: the disk cannot take them.
    """
    with disk_errors(stored.target):
        folder = TemporaryDirectory(dir=stored.folder, prefix="packs-")
    with folder as root:
        with disk_errors(stored.target):
            packs = _write_packs(team, stored, Path(root), models, progress, thin)
        yield packs


def _write_packs(
    team: Team,
    stored: StoredModel,
    root: Path,
    models: Mapping[str, NarrowModel],
    progress: Progress,
    thin: frozenset[int],
) -> dict[str, StoredPacks]:
    shared = team.share(stored)
    folders = {name: root / str(number) for number, name in enumerate(models)}
    clusters = [
        (name, number)
        for name, narrow in models.items()
        for number in range(len(narrow.choice.neuron_ids))
        if number not in thin
    ]

    def ask(pack: tuple[str, int]) -> Pending[None]:
        name, cluster = pack
        path = folders[name] / LAYOUT.cluster(cluster)
        return team.call(home(team, cluster), "pack", _write_pack, shared, path, models[name].only(cluster))

    with progress.stage("pack", len(clusters)) as advance:
        for _, written in in_turn(team, clusters, ask):
            written.result()
            advance()
    return {
        name: StoredPacks(
            folder=folders[name],
            cut=partial(_packs_cut, stored=stored, folder=folders[name]),
            dense=stored.folder / LAYOUT.dense if narrow.choice.keeps_whole_experts(team.loaded.record) else None,
            thin=thin,
        )
        for name, narrow in models.items()
    }


def _write_pack(worker: Worker, shared: Shared[StoredModel], path: Path, narrow: NarrowModel) -> None:
    stored = shared.value()
    write_cluster(path, worker.loaded, stored.packer, narrow, 0, TensorFile(stored.folder / LAYOUT.dense))


def _packs_cut(loaded: LoadedModel, stored: StoredModel, folder: Path) -> Cut:
    @cache
    def pack(cluster: int) -> TensorFile:
        return TensorFile(folder / LAYOUT.cluster(cluster))

    if loaded.record.experts is not None:
        return partial(_stored_experts, loaded, TensorFile(stored.folder / LAYOUT.dense), pack)
    return partial(_stored_layer, loaded, pack)


def dense_cut(loaded: LoadedModel, stored: StoredModel) -> Cut:
    """Return the layers of the dense FFN, as those of one cluster."""
    dense = TensorFile(stored.folder / LAYOUT.dense)
    if loaded.record.experts is not None:
        return partial(_stored_experts, loaded, dense, lambda _: None)
    return partial(_stored_layer, loaded, lambda _: dense)


def _stored_layer(
    loaded: LoadedModel, pack: Callable[[int], TensorFile], layer: int, cluster: int
) -> dict[str, torch.Tensor]:
    """Read one layer's FFN, as `narrow_layer` returns it.

    Args:
        pack: opens a cluster's, which only those do that need it.
    """
    file, tensors = pack(cluster), dict[str, torch.Tensor]()
    chosen = tensor_name(layer, "neuron_ids")
    num_neurons = file.shape_of(chosen)[1][0] if chosen in file else loaded.record.ffn_dim
    for role in loaded.family.projections:
        size = loaded.record.hidden_size
        shape = (size, num_neurons) if role == "down" else (num_neurons, size)
        tensors[role] = _matrix(loaded, file, tensor_name(layer, role), shape)
        if loaded.projection(layer, role).bias is not None:
            tensors[f"{role}_bias"] = _vector(loaded, file, tensor_name(layer, f"{role}_bias"))
    return tensors


def _stored_experts(
    loaded: LoadedModel, dense: TensorFile, pack_of: Callable[[int], TensorFile | None], layer: int, cluster: int
) -> dict[str, torch.Tensor]:
    """Read the experts of one layer that a pack has, or with None all, as `assign_ffn` takes them.

    Narrow ones are in the pack, whole ones in the dense FFN.
    """
    record, pack = loaded.record, pack_of(cluster)
    assert record.experts is not None
    numbers, inner, file = range(record.experts.num_experts), record.expert_neurons, dense
    if pack is not None and (listed := tensor_name(layer, "experts")) in pack:
        numbers = pack[listed].array.tolist()
    if pack is not None and (chosen := tensor_name(layer, "neuron_ids")) in pack:
        inner, file = pack.shape_of(chosen)[1][0] // len(numbers), pack
    size = record.hidden_size
    shapes = {"gate": (inner, size), "up": (inner, size), "down": (size, inner)}
    tensors: dict[str, torch.Tensor] = {}
    for role, shape in ((expert_role(number, role), shape) for number in numbers for role, shape in shapes.items()):
        tensors[role] = _matrix(loaded, file, tensor_name(layer, role), shape)
        if record.ffn_bias:
            tensors[f"{role}_bias"] = _vector(loaded, file, tensor_name(layer, f"{role}_bias"))
    return tensors


def _vector(loaded: LoadedModel, file: TensorFile, name: str) -> torch.Tensor:
    return torch.tensor(file[name].array).to(loaded.device, loaded.dtype)


def _matrix(loaded: LoadedModel, file: TensorFile, name: str, shape: tuple[int, int]) -> torch.Tensor:
    return torch.from_numpy(float_matrix(file, name, shape)).to(loaded.device, loaded.dtype)


@contextmanager
def base_in_use(loaded: LoadedModel, stored: StoredModel) -> Iterator[None]:
    """Run the block with the stored matrices of everything but the FFN in the model; vectors are stored as they are."""
    file = TensorFile(stored.folder / LAYOUT.base)
    layers = f"{loaded.family.layers}."
    ffn = tuple(f"{path}.weight" for path in loaded.family.projections.values())
    with ExitStack() as stack:
        for index, layer in enumerate(loaded.layers):
            matrices = _matrices(layer, without=ffn)
            weights = partial(_stored_matrices, loaded, file, f"{layers}{index}.", matrices)
            stack.enter_context(parameters_in_use(loaded, layer, matrices, weights))
        around = _matrices(loaded.model, without=(layers,))
        stack.callback(assign_values, around, values_of(around))
        assign_values(around, _stored_matrices(loaded, file, "", around))
        yield


def _matrices(module: nn.Module, *, without: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """A module's matrices by name, but for those whose names begin with one of `without`."""
    named = module.named_parameters()
    return {name: parameter for name, parameter in named if parameter.ndim == 2 and not name.startswith(without)}


def _stored_matrices(
    loaded: LoadedModel, file: TensorFile, prefix: str, matrices: Parameters
) -> dict[str, torch.Tensor]:
    """Read the stored values of parameters."""
    return {
        name: _matrix(loaded, file, prefix + name, (matrix.shape[0], matrix.shape[1]))
        for name, matrix in matrices.items()
    }
