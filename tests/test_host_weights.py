"""FFN weights on the host: what is pinned, and for how long."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from coreinfer.bundles import open_bundle
from coreinfer.bundles.families import family_by_name
from coreinfer.runtime.engines.torch.host_weights import FfnReader, HostWeights, layer_bytes
from coreinfer.runtime.engines.torch.transfer import CpuTransfer


class PinningCpu(CpuTransfer):
    def __init__(self) -> None:
        super().__init__()
        self.num_pinned = 0

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self.num_pinned += 1
        return tensor


@pytest.fixture
def reader(tiny_bundle: Callable[..., Path]) -> FfnReader:
    return reader_of(tiny_bundle("llama"))


def reader_of(folder: Path, *, packed: bool = False) -> FfnReader:
    bundle = open_bundle(folder)
    family = family_by_name(bundle.manifest.model.family)
    return FfnReader(bundle=bundle, family=family, dtype=torch.float32, device=torch.device("cpu"), packed=packed)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_shapes_are_those_of_the_tensors(family: str, packed: bool, tiny_bundle: Callable[..., Path]) -> None:
    reader = reader_of(tiny_bundle(family, quantize="int4"), packed=packed)
    host = HostWeights(reader, CpuTransfer())
    for cluster in (None, 0, 3):
        layers = list(host.layers(cluster))
        for number, tensors in enumerate(layers):
            got = {role: (tuple(tensor.shape), tensor.dtype) for role, tensor in tensors.items()}
            assert got == reader.shapes(cluster, number)
        assert host.bytes_of(cluster) == sum(tensor.nbytes for tensors in layers for tensor in tensors.values())


def test_a_pack_is_pinned_when_it_is_first_asked_for(reader: FfnReader) -> None:
    transfer = PinningCpu()
    host = HostWeights(reader, transfer)
    assert transfer.num_pinned == 0
    first = list(host.layers(1))
    assert transfer.num_pinned == 9
    again = list(host.layers(1))
    assert transfer.num_pinned == 9
    assert all(a[role] is b[role] for a, b in zip(first, again, strict=True) for role in a)


def test_the_pack_that_was_used_least_recently_goes_first(reader: FfnReader) -> None:
    transfer = PinningCpu()
    host = HostWeights(reader, transfer, pinned_limit_bytes=2 * HostWeights(reader, transfer).bytes_of(0))
    for cluster, num_pinned in ((0, 9), (1, 18), (0, 18), (2, 27), (0, 27), (1, 36)):
        list(host.layers(cluster))
        assert transfer.num_pinned == num_pinned, cluster


def test_the_dense_ffn_is_never_given_up_for_a_pack(reader: FfnReader) -> None:
    transfer = PinningCpu()
    sizes = HostWeights(reader, transfer)
    host = HostWeights(reader, transfer, pinned_limit_bytes=sizes.bytes_of(None) + sizes.bytes_of(0))
    assert host.pin_dense()
    for cluster in (0, 1, 2):
        list(host.layers(cluster))
    num_pinned = transfer.num_pinned
    host.layer(None, 0)
    list(host.layers(None))
    assert transfer.num_pinned == num_pinned == 9 + 27


def test_what_is_too_much_to_pin_is_read_each_time(reader: FfnReader) -> None:
    transfer = PinningCpu()
    host = HostWeights(reader, transfer, pinned_limit_bytes=100)
    assert not host.pin_dense()
    first, again = list(host.layers(2)), list(host.layers(2))
    assert transfer.num_pinned == 0
    for a, b in zip(first, again, strict=True):
        for role in a:
            torch.testing.assert_close(a[role], b[role], rtol=0, atol=0)
    assert layer_bytes(reader.shapes(2, 0)) == sum(tensor.nbytes for tensor in first[0].values())
