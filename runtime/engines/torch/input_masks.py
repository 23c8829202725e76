"""Inputs that a token leaves out: the reference of what the native engine does not read."""

from collections.abc import Sequence
from typing import Any

import torch
from coreinfer.bundles import Bundle
from coreinfer.bundles.contract import INPUT_GROUPS, norms_role, tensor_name
from coreinfer.bundles.families import Family, resolve
from coreinfer.bundles.tensors import TensorFile
from coreinfer.bundles.token_shares import token_thresholds
from coreinfer.runtime.engines.protocol import FfnChoice
from torch import nn

from .wanted_inputs import Groups, InputCounts, wanted

__all__ = ["InputMasks"]


class InputMasks:
    """Masks the inputs of a model's matrices while a choice with a token share is in use.

    What the masks are made of is written over in place, so that a recorded step goes by what is in use.

    Attributes:
        counts: is added to by steps that are not recorded, where it is set.
    """

    def __init__(self, layers: Sequence[nn.Module], family: Family, bundle: Bundle, device: torch.device) -> None:
        self._bundle, self._device = bundle, device
        self.counts: InputCounts | None = None
        self._is_on, self._generation = False, 0
        self._norms: dict[Groups, torch.Tensor] = {}
        self._thresholds = torch.zeros((len(layers), len(INPUT_GROUPS)), device=device)
        for number, layer in enumerate(layers) if bundle.token_shares is not None else ():
            for group, paths in family.input_groups.items():
                for path in paths:
                    before = self._hook(number, group, first=path == paths[0])
                    resolve(layer, path).register_forward_pre_hook(before)

    @property
    def key(self) -> int | None:
        """Names the memory that masks are made of, for recorded steps; None where nothing is masked."""
        return self._generation if self._is_on else None

    def thresholds(self, choice: FfnChoice) -> torch.Tensor | None:
        """What a choice's token share asks for, (layers, 4); None where all is read.

        Raises:
            ConfigError: the bundle has no such share.
        """
        if choice.token_share == 1:
            return None
        return torch.from_numpy(token_thresholds(self._bundle, choice.cluster, choice.token_share))

    def use(self, choice: FfnChoice, thresholds: torch.Tensor | None) -> None:
        """Mask by what `thresholds` returned from the next token on; the choice's weights are in place."""
        if thresholds is not None:
            self._thresholds.copy_(thresholds)
            self._fill_norms(self._bundle.weights_of(choice.cluster))
        self._is_on = thresholds is not None

    def _fill_norms(self, cluster: int | None) -> None:
        ffn = self._bundle.dense if cluster is None else self._bundle.pack(cluster)
        assert ffn is not None
        moved = False
        for layer in range(len(self._thresholds)):
            for group in INPUT_GROUPS:
                norms = _norms(self._bundle.base if group in ("qkv", "o") else ffn, layer, group)
                held = self._norms.get((layer, group))
                if held is not None and held.shape == norms.shape:
                    held.copy_(norms)
                else:
                    self._norms[layer, group], moved = norms.to(self._device), True
        self._generation += moved

    def _hook(self, layer: int, group: str, *, first: bool) -> Any:
        place = INPUT_GROUPS.index(group)

        def before(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
            if not self._is_on:
                return None
            is_wanted = wanted(inputs[0], self._norms[layer, group], self._thresholds[layer, place])
            if first and self.counts is not None:
                self.counts.add((layer, group), is_wanted)
            return inputs[0].masked_fill(~is_wanted, 0), *inputs[1:]

        return before


def _norms(file: TensorFile, layer: int, group: str) -> torch.Tensor:
    # Mapped files are read-only, which torch warns of.
    return torch.tensor(file[tensor_name(layer, norms_role(group))].array)
