"""Where FFN weights are: mapped in place on the CPU, or one pack at a time on a device.

On a device there are fixed buffers for one pack, and either the whole dense FFN or, where that does not fit, two
buffers of a layer through which it is streamed. docs/gpu.md shows what is kept where.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Protocol

import torch
from coreinfer.bundles import ConfigError
from coreinfer.bundles.families import Family, assign_ffn, resolve
from coreinfer.runtime.engines.protocol import FfnChoice
from torch import nn
from torch.utils.hooks import RemovableHandle

from .host_weights import FfnReader, HostWeights, gather
from .memory_plan import MemoryNeeds, MemoryPlan
from .packed_linear import PackedLinear, Tensors
from .transfer import Kind, Ticket, Transfer

__all__ = ["DevicePlacement", "MappedPlacement", "Placement"]


class Placement(Protocol):
    """Brings FFN weights to where they are used."""

    def prepare(self, choice: FfnChoice) -> None:
        """Begin to load weights that will soon be used, without touching those in use."""

    def use(self, choice: FfnChoice) -> None:
        """Put weights into the model."""

    def settle(self) -> None:
        """Have the weights in use complete before what is asked of the device next."""

    @property
    def addresses(self) -> Hashable | None:
        """Names the addresses of the weights in use, for recorded steps; None where they change within a pass."""

    @property
    def kv_room_bytes(self) -> int | None:
        """Memory for a KV cache next to the weights; None where there is no limit."""

    def hold_kv(self, num_bytes: int) -> None:
        """Say how much the KV cache takes."""


def assign(layer: nn.Module, family: Family, tensors: Tensors) -> None:
    """Put FFN tensors into a layer: a pointer swap, of any width."""
    if family.experts is not None:
        assign_ffn(layer, family, tensors)
        return
    for role, path in family.projections.items():
        module: Any = resolve(layer, path)
        if isinstance(module, PackedLinear):
            module.weight, module.grid = tensors[role], tensors.get(f"{role}_grid")
            module.bias = tensors.get(f"{role}_bias")
            continue
        module.weight.data = tensors[role]
        if module.bias is not None:
            module.bias.data = tensors[f"{role}_bias"]


class MappedPlacement:
    """Weights are used where they are mapped, or where a conversion put them; the dense FFN stays."""

    def __init__(self, layers: Sequence[nn.Module], family: Family, reader: FfnReader) -> None:
        self._layers, self._family, self._reader = layers, family, reader
        self._dense = self._read(None) if reader.bundle.dense else None
        self._last_pack: dict[int, list[Tensors]] = {}

    def prepare(self, choice: FfnChoice) -> None:
        """Have the system read the pack ahead."""
        if choice.cluster is not None:
            self._reader.bundle.prefetch(choice.cluster)

    def use(self, choice: FfnChoice) -> None:
        """See `Placement`."""
        for layer, tensors in zip(self._layers, self._chosen(choice), strict=True):
            assign(layer, self._family, tensors)

    def settle(self) -> None:
        """See `Placement`."""

    @property
    def addresses(self) -> Hashable | None:
        """See `Placement`. Each choice has its own."""
        return None

    @property
    def kv_room_bytes(self) -> int | None:
        """See `Placement`."""
        return None

    def hold_kv(self, num_bytes: int) -> None:
        """See `Placement`."""

    def _chosen(self, choice: FfnChoice) -> list[Tensors]:
        if choice.cluster is not None:
            # Lossless decoding goes to and fro between one pack and the dense FFN.
            if choice.cluster not in self._last_pack:
                self._last_pack = {choice.cluster: self._read(choice.cluster)}
            return self._last_pack[choice.cluster]
        dense = self._dense if self._dense is not None else self._read(None)
        if choice.neuron_ids is None:
            return dense
        if self._reader.packed:
            dense = self._read(None, packed=False)
        model = self._reader.bundle.manifest.model
        return [gather(tensors, ids, model) for tensors, ids in zip(dense, choice.neuron_ids, strict=True)]

    def _read(self, cluster: int | None, *, packed: bool | None = None) -> list[Tensors]:
        device = self._reader.device
        return [
            {role: tensor.to(device) for role, tensor in self._reader.layer(cluster, layer, packed=packed).items()}
            for layer in range(len(self._layers))
        ]


class Slot:
    """Device memory for the FFN of all layers, written over in place as long as the shapes stay."""

    def __init__(self, kind: Kind, transfer: Transfer) -> None:
        self._kind, self._transfer = kind, transfer
        self._ticket: Ticket | None = None
        self.tensors: list[Tensors] = []
        self.generation = 0
        """Goes up when the memory moves."""

    @property
    def num_bytes(self) -> int:
        """Memory that is held."""
        return _num_bytes(self.tensors)

    def fill(
        self,
        layers: Iterable[Tensors],
        *,
        limit_bytes: int | None = None,
        let_go: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin to copy host tensors over what is there; `settle` before they are used.

        Args:
            limit_bytes: memory that they may take.
            let_go: called where the memory has to move, to drop references to it.
        Raises:
            ConfigError: they take more than `limit_bytes`; what is there stays.
        """
        self.settle()
        sources = list(layers)
        num_bytes = _num_bytes(sources)
        if limit_bytes is not None and num_bytes > limit_bytes:
            raise ConfigError(
                f"gpu_memory_mb: these FFN weights take {num_bytes / 1e6:.3g} MB, and {limit_bytes / 1e6:.3g} MB are "
                "left beside base and KV cache; use mode similarity or dense, or raise it"
            )
        if _layout(sources) != _layout(self.tensors):
            # First given back, then taken: two packs are never held at once.
            let_go()
            self.tensors = []
            self.tensors = [
                {role: self._transfer.allocate(self._kind, old.shape, old.dtype) for role, old in tensors.items()}
                for tensors in sources
            ]
            self.generation += 1
        both = zip(sources, self.tensors, strict=True)
        self._ticket = self._transfer.copy([(source[role], target[role]) for source, target in both for role in source])

    def settle(self) -> None:
        """Have what is asked of the device next wait for the copy."""
        if self._ticket is not None:
            self._transfer.wait(self._ticket)
            self._ticket = None


def _layout(layers: Iterable[Tensors]) -> list[dict[str, tuple[torch.Size, torch.dtype]]]:
    return [{role: (tensor.shape, tensor.dtype) for role, tensor in tensors.items()} for tensors in layers]


def _num_bytes(layers: Iterable[Tensors]) -> int:
    return sum(tensor.nbytes for tensors in layers for tensor in tensors.values())


class LayerStream:
    """Runs the dense FFN through two buffers: while one layer computes from one, the next is copied into the other."""

    def __init__(self, layers: Sequence[nn.Module], family: Family, host: HostWeights, transfer: Transfer) -> None:
        self._layers, self._family, self._host, self._transfer = layers, family, host, transfer
        first = host.layer(None, 0)
        self._buffers = [
            {role: transfer.allocate("layer", tensor.shape, tensor.dtype) for role, tensor in first.items()}
            for _ in range(2)
        ]
        self._coming: Ticket | None = None
        self._handles: list[RemovableHandle] = []

    @property
    def num_bytes(self) -> int:
        """Memory that both buffers hold."""
        return _num_bytes(self._buffers)

    def start(self) -> None:
        """Bring each layer's weights before it runs, from now on."""
        if not self._handles:
            for number, layer in enumerate(self._layers):
                # Nothing of the layer refers to a pack any more, whose memory may move.
                assign(layer, self._family, self._buffers[number % 2])
            self._handles = [
                layer.register_forward_pre_hook(lambda module, inputs, number=number: self._before(number))
                for number, layer in enumerate(self._layers)
            ]

    def stop(self) -> None:
        """Leave the layers alone."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, layer: int) -> None:
        if layer == 0:
            # A pass that was interrupted may have left another layer on its way.
            self._begin(0)
        assert self._coming is not None
        self._transfer.wait(self._coming)
        assign(self._layers[layer], self._family, self._buffers[layer % 2])
        # The other buffer's layer was asked for before, so that the copy waits for it and for no more.
        if layer + 1 < len(self._layers):
            self._begin(layer + 1)

    def _begin(self, layer: int) -> None:
        source, target = self._host.layer(None, layer), self._buffers[layer % 2]
        self._coming = self._transfer.copy([(source[role], target[role]) for role in source])


class DevicePlacement:
    """Holds one pack, and the dense FFN whole or in two layer buffers; see the module's text."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        family: Family,
        host: HostWeights,
        transfer: Transfer,
        plan: MemoryPlan,
        needs: MemoryNeeds,
    ) -> None:
        self._layers, self._family, self._host = layers, family, host
        self._limit_bytes, self._needs = plan.limit_bytes, needs
        self._pack = Slot("pack", transfer)
        self._dense = Slot("dense", transfer)
        self._stream = None
        self._in_pack: FfnChoice | None = None
        """What the pack's memory holds, or will hold once the copy is done."""
        self._used: FfnChoice | None = None
        self._kv_bytes = 0
        if plan.stream_dense:
            host.pin_dense()
            self._stream = LayerStream(layers, family, host, transfer)
        elif needs.dense:
            self._dense.fill(host.layer(None, number) for number in range(len(layers)))
            self._dense.settle()

    def prepare(self, choice: FfnChoice) -> None:
        """Begin to copy a pack, unless the one that it would be copied over is in use."""
        in_use = self._used is not None and not _is_dense(self._used)
        if choice.cluster is not None and not in_use:
            self._fill_pack(choice)

    def use(self, choice: FfnChoice) -> None:
        """See `Placement`.

        Raises:
            ConfigError: the choice needs the dense FFN, which the bundle lacks; or there is no room for it.
        """
        if choice.cluster is None and not self._needs.dense:
            # Says that there is none.
            self._host.layer(None, 0)
        if not _is_dense(choice):
            self._fill_pack(choice)
        if self._stream is not None and _is_dense(choice):
            self._stream.start()
        else:
            if self._stream is not None:
                self._stream.stop()
            slot = self._dense if _is_dense(choice) else self._pack
            for layer, tensors in zip(self._layers, slot.tensors, strict=True):
                assign(layer, self._family, tensors)
        self._used = choice

    def settle(self) -> None:
        """Wait for the pack where it is in use; while a prompt is read dense, it may still be on its way."""
        if self._used is not None and not _is_dense(self._used):
            self._pack.settle()

    @property
    def addresses(self) -> Hashable | None:
        """See `Placement`."""
        if self._used is None or not _is_dense(self._used):
            return "pack", self._pack.generation
        return None if self._stream is not None else ("dense", self._dense.generation)

    @property
    def kv_room_bytes(self) -> int | None:
        """See `Placement`. The pack's room is kept for it from the start."""
        pack_bytes = max(self._needs.pack, self._pack.num_bytes)
        return self._limit_bytes - self._needs.resident - pack_bytes - self._buffer_bytes

    def hold_kv(self, num_bytes: int) -> None:
        """See `Placement`."""
        self._kv_bytes = num_bytes

    @property
    def _buffer_bytes(self) -> int:
        return self._dense.num_bytes + (self._stream.num_bytes if self._stream is not None else 0)

    def _fill_pack(self, choice: FfnChoice) -> None:
        # Arrays do not compare as one, so neurons are always gathered.
        if choice.neuron_ids is None and choice == self._in_pack:
            return
        left = self._limit_bytes - self._needs.resident - self._buffer_bytes - self._kv_bytes
        ids = choice.neuron_ids
        source = self._host.layers(choice.cluster) if ids is None else self._host.neurons(ids)
        self._in_pack = None
        self._pack.fill(source, limit_bytes=left, let_go=self._let_go)
        self._in_pack = choice

    def _let_go(self) -> None:
        """Drop the model's references to the pack's memory, where the pack is in use."""
        if self._used is None or _is_dense(self._used):
            return
        for layer, tensors in zip(self._layers, self._pack.tensors, strict=True):
            assign(layer, self._family, {role: tensor.new_empty(0) for role, tensor in tensors.items()})


def _is_dense(choice: FfnChoice) -> bool:
    return choice.cluster is None and choice.neuron_ids is None
