"""FFN weights on the host, in the form that the device takes: read from the bundle, kept pinned where that fits."""

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles import Bundle, ConfigError
from coreinfer.bundles.contract import expert_role, kept_experts, tensor_name
from coreinfer.bundles.families import Family
from coreinfer.bundles.manifest import ModelRecord
from coreinfer.bundles.tensors import TensorFile
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice

from .model import matrix_to_torch, to_torch
from .packed_linear import Shapes, Tensors, is_down, pack_matrix, packed_shapes
from .transfer import Transfer

__all__ = ["FfnReader", "HostWeights", "gather", "layer_bytes"]

DENSE_KEY = None
_PINNED_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class FfnReader:
    """Reads FFN layers of a bundle as host tensors: role ("gate", "up_bias", ...) -> tensor.

    Attributes:
        packed: keep int4 matrices packed; see `packed_linear`.
        device: whose layout packed matrices take.
    """

    bundle: Bundle
    family: Family
    dtype: torch.dtype
    device: torch.device
    packed: bool = False

    def layer(self, cluster: int | None, layer: int, *, packed: bool | None = None) -> Tensors:
        """Read a layer of a pack, or with None of the dense FFN. Values that need no conversion are not copied.

        A pack of a mixture names experts of the dense FFN, or has narrower ones of its own.

        Raises:
            ConfigError: the bundle has no dense FFN.
            BundleCorrupt: the pack is damaged.
        """
        packed = self.packed if packed is None else packed
        file = self._file(cluster)
        tensors: Tensors = {}
        for role, shape in self._matrices(cluster, layer, self._experts(cluster, layer)).items():
            name = tensor_name(layer, role)
            if packed:
                tensors |= pack_matrix(file, name, role, shape, self.dtype, self.device)
            else:
                tensors[role] = matrix_to_torch(file, name, shape).to(self.dtype)
            if f"{name}_bias" in file:
                tensors[f"{role}_bias"] = self._bias(file, name, tensors, role)
        return tensors

    def shapes(self, cluster: int | None, layer: int) -> Shapes:
        """Shapes and dtypes of what `layer` returns, from the manifest alone, where experts count from 0 on."""
        shapes: Shapes = {}
        for role, shape in self._matrices(cluster, layer, range(self._num_experts(cluster, layer))).items():
            if self.packed:
                shapes |= packed_shapes(role, shape, self.dtype, self.device)
            else:
                shapes[role] = (shape, self.dtype)
            if self.bundle.manifest.model.ffn_bias:
                width = shapes[f"{role}_grid"][0][1] if self.packed and not is_down(role) else shape[0]
                shapes[f"{role}_bias"] = ((width,), self.dtype)
        return shapes

    def num_bytes(self, cluster: int | None) -> int:
        """Memory that all layers take."""
        num_layers = self.bundle.manifest.model.num_layers
        return sum(layer_bytes(self.shapes(cluster, layer)) for layer in range(num_layers))

    @property
    def largest_pack_bytes(self) -> int:
        """Memory that the largest pack takes; 0 where all clusters are thin."""
        clusters = enumerate(self.bundle.manifest.clusters)
        return max((self.num_bytes(number) for number, cluster in clusters if cluster.file is not None), default=0)

    def weights_of(self, choice: FfnChoice) -> FfnChoice:
        """The FFN weights of a choice, all of which are read: of a thin cluster the dense FFN's."""
        whole = choice.whole
        return DENSE if whole.neuron_ids is None and self.bundle.weights_of(whole.cluster) is None else whole

    def _bias(self, file: TensorFile, name: str, tensors: Tensors, role: str) -> torch.Tensor:
        bias = to_torch(file[f"{name}_bias"]).to(self.dtype)
        if is_down(role) or f"{role}_grid" not in tensors:
            return bias
        return torch.nn.functional.pad(bias, (0, tensors[f"{role}_grid"].shape[1] - len(bias)))

    def _file(self, cluster: int | None) -> TensorFile:
        if cluster is not None and (self.family.experts is None or self.bundle.manifest.narrows_experts):
            return self.bundle.pack(cluster)
        if self.bundle.dense is None:
            raise ConfigError(f"bundle {self.bundle.path} has no dense FFN; compile it with --dense or use a cluster")
        return self.bundle.dense

    def _matrices(self, cluster: int | None, layer: int, experts: Sequence[int]) -> dict[str, tuple[int, int]]:
        """Shapes of a layer's matrices; `experts`: numbers of those that are there, none where the FFN is one."""
        manifest = self.bundle.manifest
        hidden = manifest.model.hidden_size
        wide = self._num_neurons(cluster, layer)
        if self.family.experts is not None:
            wide //= len(experts)
            return {
                expert_role(number, role): (hidden, wide) if role == "down" else (wide, hidden)
                for number in experts
                for role in ("gate", "up", "down")
            }
        return {role: (hidden, wide) if role == "down" else (wide, hidden) for role in self.family.projections}

    def _num_neurons(self, cluster: int | None, layer: int) -> int:
        """Neurons of a layer, of all experts that are there together."""
        manifest = self.bundle.manifest
        return manifest.model.ffn_dim if cluster is None else manifest.clusters[cluster].layer_budgets[layer]

    def _experts(self, cluster: int | None, layer: int) -> Sequence[int]:
        """Numbers of the experts that a layer has."""
        manifest = self.bundle.manifest
        if manifest.model.experts is None:
            return ()
        pack = None if cluster is None else self.bundle.pack(cluster)
        return kept_experts(pack, manifest)[layer]

    def _num_experts(self, cluster: int | None, layer: int) -> int:
        """How many a layer has, without a look at the pack, which would be fetched or checked for it."""
        model = self.bundle.manifest.model
        if model.experts is None:
            return 0
        if cluster is None:
            return model.experts.num_experts
        if (listed := self.bundle.manifest.clusters[cluster].layer_experts) is not None:
            return listed[layer]
        if self.bundle.manifest.narrows_experts:
            return model.experts.num_experts
        return self._num_neurons(cluster, layer) // model.expert_neurons


class HostWeights:
    """The layers of packs and of the dense FFN, in pinned memory while that lasts, else read again when asked for."""

    def __init__(self, reader: FfnReader, transfer: Transfer, *, pinned_limit_bytes: int | None = None) -> None:
        """Begin with nothing pinned.

        Args:
            pinned_limit_bytes: pinned memory to use at most; None for a quarter of the machine's memory.
        """
        self._reader = reader
        self._transfer = transfer
        self._limit_bytes = _quarter_of_memory() if pinned_limit_bytes is None else pinned_limit_bytes
        # The one that was used last is last.
        self._pinned: OrderedDict[int | None, list[Tensors]] = OrderedDict()
        self._num_layers = reader.bundle.manifest.model.num_layers

    def layers(self, cluster: int | None) -> Iterator[Tensors]:
        """Yield the layers of a pack, or with None of the dense FFN."""
        self._pin(cluster)
        for layer in range(self._num_layers):
            yield self.layer(cluster, layer)

    def layer(self, cluster: int | None, layer: int) -> Tensors:
        """Return one layer, pinned if its pack is."""
        pinned = self._pinned.get(cluster)
        return self._reader.layer(cluster, layer) if pinned is None else pinned[layer]

    def neurons(self, neuron_ids: tuple[npt.NDArray[np.int32], ...]) -> Iterator[Tensors]:
        """Return the dense FFN's layers cut down to some neurons, unpacked."""
        for layer, ids in enumerate(neuron_ids):
            yield gather(self._reader.layer(None, layer, packed=False), ids, self._reader.bundle.manifest.model)

    def pin_dense(self) -> bool:
        """Pin the dense FFN, which is read layer by layer at each pass; say whether it fits."""
        self._pin(DENSE_KEY)
        return DENSE_KEY in self._pinned

    def _pin(self, cluster: int | None) -> None:
        if cluster in self._pinned:
            self._pinned.move_to_end(cluster)
            return
        num_bytes = self.bytes_of(cluster)
        if num_bytes + (self.bytes_of(DENSE_KEY) if DENSE_KEY in self._pinned else 0) > self._limit_bytes:
            return
        while self._pinned_bytes + num_bytes > self._limit_bytes:
            del self._pinned[next(key for key in self._pinned if key is not DENSE_KEY)]
        self._pinned[cluster] = [
            {role: self._transfer.pin(tensor) for role, tensor in self._reader.layer(cluster, layer).items()}
            for layer in range(self._num_layers)
        ]

    @property
    def _pinned_bytes(self) -> int:
        return sum(self.bytes_of(cluster) for cluster in self._pinned)

    def bytes_of(self, cluster: int | None) -> int:
        """Memory that a pack, or with None the dense FFN, takes."""
        return self._reader.num_bytes(cluster)


def gather(tensors: Tensors, neuron_ids: npt.NDArray[np.int32], model: ModelRecord) -> Tensors:
    """Cut a dense layer down to some neurons; the bias after the down projection stays whole.

    Args:
        neuron_ids: ascending; see `FfnChoice`. Experts of which all are kept are not copied.
    Raises:
        ConfigError: experts would be left with unlike numbers of neurons, or with fewer experts than a token uses.
    """
    if model.experts is None:
        return _gather(tensors, neuron_ids)
    size, owners = model.expert_neurons, neuron_ids // model.expert_neurons
    kept, counts = np.unique(owners, return_counts=True)
    if len(kept) < model.experts.num_chosen or len(set(counts.tolist())) > 1:
        raise ConfigError(
            f"neuron_ids: expected as many of each expert of {model.experts.num_chosen} or more, got "
            f"{', '.join(map(str, counts))} of {len(kept)}"
        )
    gathered: Tensors = {}
    for number in kept.tolist():
        prefix = expert_role(number, "")
        expert = {role.removeprefix(prefix): tensor for role, tensor in tensors.items() if role.startswith(prefix)}
        own = neuron_ids[owners == number] - number * size
        expert = expert if len(own) == size else _gather(expert, own)
        gathered |= {prefix + role: tensor for role, tensor in expert.items()}
    return gathered


def _gather(tensors: Tensors, neuron_ids: npt.NDArray[np.int32]) -> Tensors:
    ids = torch.from_numpy(neuron_ids).long().to(tensors["down"].device)
    narrow = {role: tensor[ids] for role, tensor in tensors.items() if role not in ("down", "down_bias")}
    narrow["down"] = tensors["down"][:, ids]
    return narrow | {role: tensors[role] for role in ("down_bias",) if role in tensors}


def layer_bytes(shapes: Shapes) -> int:
    """Memory of tensors of these shapes and dtypes."""
    return sum(dtype.itemsize * torch.Size(shape).numel() for shape, dtype in shapes.values())


def _quarter_of_memory() -> int:
    return int(_PINNED_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
