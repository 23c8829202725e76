"""Inputs that a token leaves out: the reference of what the native engine does not read."""

from collections.abc import Callable, Sequence

import torch
from coreinfer.bundles import Bundle
from coreinfer.bundles.contract import INPUT_GROUPS
from coreinfer.bundles.families import Family
from coreinfer.bundles.token_shares import column_norms, ffn_with_norms, token_thresholds
from coreinfer.runtime.engines.protocol import FfnChoice
from torch import nn

from .wanted_inputs import Entering, Groups, InputCounts, change_inputs, wanted

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
            for group in INPUT_GROUPS:
                change_inputs(layer, family, group, self._masking(number, group))

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
            self._fill_norms(choice.cluster)
        self._is_on = thresholds is not None

    def _fill_norms(self, cluster: int | None) -> None:
        ffn, model = ffn_with_norms(self._bundle, cluster), self._bundle.manifest.model
        moved = False
        for layer in range(len(self._thresholds)):
            for group in INPUT_GROUPS:
                # Mapped files are read-only, which torch warns of.
                norms = torch.tensor(column_norms(self._bundle.base, ffn, model, layer, group))
                held = self._norms.get((layer, group))
                if held is not None and held.shape == norms.shape:
                    held.copy_(norms)
                else:
                    self._norms[layer, group], moved = norms.to(self._device), True
        self._generation += moved

    def _masking(self, layer: int, group: str) -> Callable[[Entering], torch.Tensor]:
        place = INPUT_GROUPS.index(group)

        def masked(entering: Entering) -> torch.Tensor:
            if not self._is_on:
                return entering.values
            is_wanted = wanted(entering, self._norms[layer, group], self._thresholds[layer, place])
            if entering.is_first and self.counts is not None:
                self.counts.add((layer, group), is_wanted)
            return entering.values.masked_fill(~is_wanted, 0)

        return masked
