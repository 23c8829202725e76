"""What share of inputs passes which threshold, on text that is read as a device decodes it, and what the rest loses."""

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

__all__ = [
    "LEVELS",
    "RATIOS",
    "energies_at",
    "half_ratios",
    "lost_energies",
    "sample_scores",
    "thresholds_at_levels",
    "thresholds_of",
]

Floats = npt.NDArray[np.float32]
Scores = Mapping[Groups, Floats]

LEVELS = np.linspace(0, 1, NUM_SHARE_LEVELS, dtype=np.float32)
"""Shares of a group's bytes that thresholds are stored for: an input that is read in half counts half."""
RATIOS = tuple(np.array([1, 1.5, 2, 2.33, 2.67, 3, 3.5, 4, 5], dtype=np.float32))
"""Of what a score must pass to be read whole, and to be read at all; 1 where nothing is read in half."""
_RATIO_LEVEL, _RATIO_SCORES = 0.6, 16_384
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


def thresholds_of(loaded: LoadedModel, scores: Scores, ratios: Floats) -> Floats:
    """Return the thresholds by which each of `LEVELS` is read: (layers, 4, levels) float32, from the greatest one to 0.

    Args:
        ratios: (layers, 4) of what a score must pass to be read whole, and to be read at all; see `half_ratios`.
    """
    own = dict(zip(groups_of(loaded), ratios.flatten(), strict=True))
    return _by_group(loaded, {place: thresholds_at_levels(found, own[place]) for place, found in scores.items()})


def thresholds_at_levels(scores: Floats, ratio: np.float32) -> Floats:
    """Return for each of `LEVELS` the t with (P(score > t) + P(score > ratio t)) / 2 of that level: (levels,).

    Args:
        scores: ascending.
    """
    values = np.quantile(_steps(scores, ratio), 1 - LEVELS.astype(np.float64)).astype(np.float32)
    # At share 1 nothing is left out, whatever other text has.
    values[-1] = 0
    return values


def _steps(scores: Floats, ratio: np.float32) -> Floats:
    """Thresholds at which a score's input is no more read, or no more whole: each is worth half of its bytes."""
    # A stable sort merges what ascends already.
    return scores if ratio == 1 else np.sort(np.concatenate([scores, scores / ratio]), kind="stable")


def lost_energies(loaded: LoadedModel, scores: Scores, ratios: Floats, low_energies: Floats) -> Floats:
    """Return the mean square of what is not read at each of `LEVELS`, as a share of all: (layers, 4, levels) float32.

    Of inputs that are uncorrelated it is the relative square error of the group's outputs.

    Args:
        ratios: (layers, 4), as `thresholds_of` takes them.
        low_energies: (layers, 4) share of a weight's square that is lost where it is read in half.
    """
    own = zip(groups_of(loaded), ratios.flatten(), low_energies.flatten(), strict=True)
    return _by_group(
        loaded,
        {
            place: energies_at(scores[place], thresholds_at_levels(scores[place], ratio), ratio, low_energy)
            for place, ratio, low_energy in own
        },
    )


def energies_at(scores: Floats, thresholds: Floats, ratio: np.float32, low_energy: np.float32) -> Floats:
    """Return what `lost_energies` does of one group, at thresholds of any number.

    Args:
        scores: ascending.
    """
    sums = np.concatenate([[0], np.cumsum(np.square(scores, dtype=np.float64))])
    left_out, not_whole = (
        sums[np.searchsorted(scores, limits, side="right")] for limits in (thresholds, ratio * thresholds)
    )
    return np.asarray((left_out + low_energy * (not_whole - left_out)) / max(sums[-1], 1e-30), dtype=np.float32)


def half_ratios(loaded: LoadedModel, scores: Scores, low_energies: Floats) -> Floats:
    """Choose for each group what an input's score must pass to be read whole, as a multiple of the threshold.

    Args:
        low_energies: as `lost_energies` takes them.
    Returns:
        (layers, 4) float32 of `RATIOS`.
    """
    own = zip(groups_of(loaded), low_energies.flatten(), strict=True)
    chosen = [_best_ratio(scores[place], low_energy) for place, low_energy in own]
    return np.array(chosen, dtype=np.float32).reshape(low_energies.shape)


def _best_ratio(scores: Floats, low_energy: np.float32) -> np.float32:
    # Of scores that ascend each n-th is as good a sample as any.
    some = scores[:: -(-len(scores) // _RATIO_SCORES)]

    def lost(ratio: np.float32) -> float:
        threshold = np.asarray(np.quantile(_steps(some, ratio), 1 - _RATIO_LEVEL), dtype=np.float32)
        return float(energies_at(some, threshold, ratio, low_energy))

    return min(RATIOS, key=lost)


def _by_group(loaded: LoadedModel, values: Mapping[Groups, Floats]) -> Floats:
    stacked = np.stack([values[place] for place in groups_of(loaded)])
    return stacked.reshape(loaded.record.num_layers, len(INPUT_GROUPS), -1)
