"""What share of inputs passes which threshold, on text that is read as a device decodes it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.contract import INPUT_GROUPS
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.samples import NUM_SHARE_LEVELS
from coreinfer.runtime.engines.torch.wanted_inputs import Entering, Groups

from .inputs import Norms, groups_of, inputs_seen
from .texts import BegunText

__all__ = ["LEVELS", "lost_energies", "sample_scores", "thresholds_of"]

Floats = npt.NDArray[np.float32]
Scores = Mapping[Groups, Floats]

LEVELS = np.linspace(0, 1, NUM_SHARE_LEVELS, dtype=np.float32)
"""Shares of inputs that thresholds are stored for."""
_TEXT_SCORES = 8192
"""Of a text, a layer and a group; a share settles soon."""


def sample_scores(loaded: LoadedModel, texts: Sequence[BegunText], norms: Norms, *, seed: int) -> dict[Groups, Floats]:
    """Sample the scores of inputs (`Entering.scores`) over the texts' second halves, with the weights in use.

    Returns:
        Group -> scores, ascending.
    """
    parts: defaultdict[Groups, list[torch.Tensor]] = defaultdict(list)
    found: defaultdict[Groups, list[torch.Tensor]] = defaultdict(list)
    generator = torch.Generator().manual_seed(seed)

    def draw() -> None:
        for place, values in found.items():
            scores = torch.cat(values).cpu()
            drawn = torch.randint(scores.numel(), (min(_TEXT_SCORES, scores.numel()),), generator=generator)
            parts[place].append(scores[drawn])
        found.clear()

    def see(layer: int, group: str, entering: Entering) -> None:
        # A layer's experts come one after another, and count by their tokens.
        if layer not in {number for number, _ in found}:
            draw()
        found[layer, group].append(entering.scores(norms[layer, group]).flatten())

    with inputs_seen(loaded, see), torch.inference_mode():
        for text in texts:
            text.states(loaded)
            draw()
    return {place: torch.cat(found).sort().values.numpy() for place, found in parts.items()}


def thresholds_of(loaded: LoadedModel, scores: Scores) -> Floats:
    """Return the threshold that each of `LEVELS` passes: (layers, 4, levels) float32, from the greatest score to 0."""
    return _by_group(loaded, {place: _quantiles(found) for place, found in scores.items()})


def _quantiles(scores: Floats) -> Floats:
    values = np.quantile(scores, 1 - LEVELS.astype(np.float64)).astype(np.float32)
    # At share 1 nothing is left out, whatever other text has.
    values[-1] = 0
    return values


def lost_energies(loaded: LoadedModel, scores: Scores) -> Floats:
    """Return the mean square of what is left out at each of `LEVELS`, as a share of all: (layers, 4, levels) float32.

    Of inputs that are uncorrelated it is the relative square error of the group's outputs.
    """
    return _by_group(loaded, {place: _energies(found) for place, found in scores.items()})


def _energies(scores: Floats) -> Floats:
    sums = np.concatenate([[0], np.cumsum(np.square(scores, dtype=np.float64))])
    left_out = np.round((1 - LEVELS.astype(np.float64)) * len(scores)).astype(np.int64)
    return np.asarray(sums[left_out] / max(sums[-1], 1e-30), dtype=np.float32)


def _by_group(loaded: LoadedModel, values: Mapping[Groups, Floats]) -> Floats:
    stacked = np.stack([values[place] for place in groups_of(loaded)])
    return stacked.reshape(loaded.record.num_layers, len(INPUT_GROUPS), -1)
