"""Inputs that a token leaves out, or reads in half: the reference of what the native engine does not read."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from coreinfer.bundles import Bundle
from coreinfer.bundles.contract import INPUT_GROUPS
from coreinfer.bundles.families import Family, resolve
from coreinfer.bundles.tensors import TensorFile
from coreinfer.bundles.token_shares import column_norms, ffn_with_norms, token_thresholds
from coreinfer.runtime.engines.protocol import FfnChoice
from torch import nn

from .column_products import ColumnProducts
from .low_halves import LowProducts, hold
from .wanted_inputs import Entering, Groups, InputCounts, Taken, take, take_inputs

__all__ = ["InputMasks", "make_masks"]


class InputMasks:
    """Masks the inputs of a model's matrices while a choice with a token share is in use.

    What the masks are made of is written over in place, so that a recorded step goes by what is in use.

    Attributes:
        counts: is added to by steps that are not recorded, where it is set.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        family: Family,
        bundle: Bundle,
        low: LowProducts,
        device: torch.device,
        columns: ColumnProducts | None = None,
    ) -> None:
        """Mask nothing yet.

        Args:
            low: of the same layers and bundle.
            columns: of the same; a token that comes alone then reads only what it wants. None masks all tokens.
        """
        self._bundle, self._device, self._low, self._columns = bundle, device, low, columns
        self.counts: InputCounts | None = None
        self._is_on, self._generation = False, 0
        self._norms: dict[Groups, torch.Tensor] = {}
        self._thresholds = torch.zeros((len(layers), len(INPUT_GROUPS), 2), device=device)
        for number, layer in enumerate(layers) if bundle.token_shares is not None else ():
            for group in INPUT_GROUPS:
                take_inputs(layer, family, group, self._taking(number, group), partial(self._low.product, number))
                for path in family.input_groups.get(group, ()):
                    self._read_columns((number, group), path, resolve(layer, path))

    @property
    def key(self) -> int | None:
        """Names the memory that masks are made of, for recorded steps; None where nothing is masked."""
        return self._generation if self._is_on else None

    def thresholds(self, choice: FfnChoice) -> torch.Tensor | None:
        """What a choice's token share asks for, (layers, 4, 2); None where all is read.

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
            ffn = ffn_with_norms(self._bundle, choice.cluster)
            moved = [self._low.use(ffn), self._fill_norms(ffn)]
            if self._columns is not None:
                moved.append(self._columns.use(ffn))
            self._generation += any(moved)
        self._is_on = thresholds is not None

    def _fill_norms(self, ffn: TensorFile) -> bool:
        """Put the norms of the weights in use in place; returns whether memory moved."""
        moved = False
        for layer in range(len(self._thresholds)):
            for group in INPUT_GROUPS:
                # Mapped files are read-only, which torch warns of.
                norms = torch.tensor(column_norms(self._bundle.base, ffn, self._bundle.manifest.model, layer, group))
                moved |= hold(self._norms, (layer, group), norms, self._device)
        return moved

    def _taking(self, layer: int, group: str) -> Callable[[Entering], Taken | None]:
        place, limits = (layer, group), self._thresholds[layer, INPUT_GROUPS.index(group)]
        has_halves = self._low.has_halves(place)

        def taken(entering: Entering) -> Taken | None:
            if not self._is_on or self._leaves_out(place, entering.values):
                return None
            found = take(entering, self._norms[place], limits, has_halves=has_halves)
            if entering.is_first and self.counts is not None:
                self.counts.add(place, found)
            return found

        return taken

    def _leaves_out(self, place: Groups, inputs: torch.Tensor) -> bool:
        """Whether a module reads only what is wanted of its inputs: those of one token, which nobody counts."""
        is_alone = inputs.numel() == inputs.shape[-1]
        return self._columns is not None and self._columns.has(place) and is_alone and self.counts is None

    def _read_columns(self, place: Groups, path: str, module: Any) -> None:
        """Let a module multiply by columns where it is to leave out inputs, and else as it does."""
        columns = self._columns
        if columns is None or not columns.has(place):
            return
        plain, limits = module.forward, self._thresholds[place[0], INPUT_GROUPS.index(place[1])]

        def forward(inputs: torch.Tensor) -> torch.Tensor:
            if self._is_on and self._leaves_out(place, inputs):
                return columns.product(place, path, inputs, self._norms[place], limits, module.bias)
            found: torch.Tensor = plain(inputs)
            return found

        module.forward = forward


def make_masks(
    layers: Sequence[nn.Module],
    family: Family,
    bundle: Bundle,
    device: torch.device,
    dtype: torch.dtype,
    *,
    packed: bool,
    has_columns: bool,
) -> InputMasks:
    """Make masks, and what they multiply by.

    Args:
        packed: whether the FFN is multiplied as int4.
        has_columns: whether a token that comes alone reads only what it wants.
    """
    low = LowProducts(layers, family, bundle, dtype=dtype, device=device, packed=packed)
    columns = ColumnProducts(layers, family, bundle, device, packed=packed) if has_columns else None
    return InputMasks(layers, family, bundle, low, device, columns)
