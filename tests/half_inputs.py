"""What inputs that are read in half give, by the definition: each weight of the two high bits of its code."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.contract import INPUT_GROUPS, tensor_name
from coreinfer.bundles.families import Family, resolve
from coreinfer.bundles.formats import float_matrix
from coreinfer.bundles.tensors import StoredTensor, TensorFile
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.engines.torch.decoder import TorchDecoder
from torch import nn
from torch.nn import functional

Floats = npt.NDArray[np.float32]
PROMPT_IDS, NEXT_IDS = [1, 57, 200, 300, 21, 99, 140, 7], [9, 8, 77, 301]


def logits_of(decoder: TorchDecoder, choice: FfnChoice) -> Floats:
    """Logits of each token that is decoded with a choice, after a prompt that the dense FFN read."""
    decoder.truncate(0)
    decoder.use(DENSE)
    decoder.forward(PROMPT_IDS)
    decoder.use(choice)
    return np.stack([decoder.forward([token_id])[0] for token_id in NEXT_IDS])


def with_low_bits(file: Mapping[str, StoredTensor], name: str, bits: int) -> dict[str, StoredTensor]:
    """An int4 matrix with other low bits in all of its codes, two to a byte."""
    codes = file[f"{name}.q4"]
    changed = {name + suffix: file[name + suffix] for suffix in (".scale", ".zero")}
    return {**changed, f"{name}.q4": StoredTensor(codes.dtype, codes.array & 0xCC | bits * 0x11)}


def halved_matrix(file: Mapping[str, StoredTensor], name: str, shape: tuple[int, int]) -> Floats:
    """An int4 matrix read in half: the mean of what it is with the low bits 1 and 2."""
    one, two = (float_matrix(with_low_bits(file, name, bits), name, shape) for bits in (1, 2))
    return np.asarray((one + two) / 2, dtype=np.float32)


@contextmanager
def taken_by_hand(
    layers: Sequence[nn.Module], family: Family, base: TensorFile, ffn: TensorFile, thresholds: Floats, seen: list[int]
) -> Iterator[None]:
    """Run the block with each product summed up of inputs that are read whole, in half, and not at all.

    Args:
        thresholds: (layers, 4, 2).
        seen: is added to: how many inputs were read whole, in half, and not at all.
    """
    handles = []
    for number, layer in enumerate(layers):
        for place, group in enumerate(INPUT_GROUPS):
            matrices = _matrices(layer, family, base, ffn, number, group)
            norms = torch.cat([whole for whole, _ in matrices.values()]).norm(dim=0)
            for path, (whole, halved) in matrices.items():
                after = _product(whole, halved, norms, torch.tensor(thresholds[number, place]), seen)
                handles.append(resolve(layer, path).register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _matrices(
    layer: nn.Module, family: Family, base: TensorFile, ffn: TensorFile, number: int, group: str
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    roles = {path: role for role, path in family.projections.items()}
    found = {}
    for path in family.input_groups[group]:
        file, name = base, f"{family.layers}.{number}.{path}.weight"
        shape = tuple(resolve(layer, path).weight.shape)
        if path in roles:
            hidden, width = (len(ffn[tensor_name(number, f"{own}_norms")].array) for own in ("gate_up", "down"))
            file, name = ffn, tensor_name(number, roles[path])
            shape = (hidden, width) if roles[path] == "down" else (width, hidden)
        read = (float_matrix(file, name, shape), halved_matrix(file, name, shape))
        found[path] = (torch.from_numpy(read[0]), torch.from_numpy(read[1]))
    return found


def _product(
    whole: torch.Tensor, halved: torch.Tensor, norms: torch.Tensor, limits: torch.Tensor, seen: list[int]
) -> Any:
    def after(module: Any, inputs: Any, _outputs: torch.Tensor) -> torch.Tensor:
        scores = inputs[0].abs() * norms
        is_whole, is_half = scores > limits[1], (scores > limits[0]) & (scores <= limits[1])
        for place, some in enumerate((is_whole, is_half, scores <= limits[0])):
            seen[place] += int(some.sum())
        outputs = functional.linear(torch.where(is_whole, inputs[0], 0), whole, module.bias)
        return outputs + functional.linear(torch.where(is_half, inputs[0], 0), halved)

    return after
