"""What it costs the whole model to leave out inputs of one group and read others in half, of all groups in one pass.

Let a group's inputs be x - e d and its outputs less e E h, d what is left out of x, E h what halves h lose of their
weights, and e a number for each token. To second order, what is lost costs KL = 1/2 d^T F d with the Fisher matrix F of
such errors, which is 1/2 E[(dl/de)^2], l = -log p(y) of a whole text and y drawn from the model itself: gradients count
what a token's error does to later tokens through attention too. Unlike measuring each group alone, it takes one pass
forward and one back, however many layers there are. The errors of two tokens, and of two experts of one token, are
taken to be uncorrelated.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.contract import INPUT_GROUPS
from coreinfer.compiler.models.gradients import draw_tokens, parameters_fixed
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.progress import Advance
from coreinfer.runtime.engines.torch.wanted_inputs import Entering, Groups, Taken, take
from torch.nn import functional

from .inputs import LowWeights, Norms, groups_of, groups_read, reads_halves_of
from .texts import BegunText

__all__ = ["group_costs"]

Floats = npt.NDArray[np.float32]
Shifts = dict[Groups, list[torch.Tensor]]
"""The numbers e of each group, (tokens,), or of each of its experts'."""


def group_costs(
    loaded: LoadedModel,
    texts: Sequence[BegunText],
    norms: Norms,
    thresholds: Mapping[Groups, tuple[float, float]],
    low_weights: LowWeights,
    advance: Advance,
    *,
    seed: int,
) -> Floats:
    """Estimate KL(whole || inputs of one group by its thresholds) of each group alone, with the weights in use.

    Args:
        thresholds: of each group.
        low_weights: of the groups that have halves.
        advance: called once a text.
        seed: of the tokens that are drawn.
    Returns:
        (layers, 4) float32, nats a token.
    """
    places = groups_of(loaded)
    sums, num_tokens = dict.fromkeys(places, 0.0), 0
    generator = torch.Generator(device=loaded.device).manual_seed(seed)
    with parameters_fixed(loaded):
        for text in texts:
            found: Shifts = {place: [] for place in places}
            with torch.enable_grad(), _inputs_shifted(loaded, norms, thresholds, low_weights, found):
                _surprise(loaded, text, generator).backward()
            for place, shifts in found.items():
                sums[place] += sum(_square(shift) for shift in shifts)
            num_tokens += text.token_ids.shape[1]
            advance()
    costs = np.array([sums[place] for place in places]) / (2 * max(1, num_tokens))
    return costs.reshape(-1, len(INPUT_GROUPS)).astype(np.float32)


def _square(shift: torch.Tensor) -> float:
    """Of its gradient, summed over tokens."""
    assert shift.grad is not None
    return float(shift.grad.double().square().sum())


def _surprise(loaded: LoadedModel, text: BegunText, generator: torch.Generator) -> torch.Tensor:
    """-log p of tokens that the model draws, one after each of the text's second half, summed."""
    log_p = loaded.head(text.states(loaded)).float().log_softmax(dim=-1)
    chances = torch.rand((len(log_p), 1), generator=generator, device=loaded.device)
    return -log_p.gather(1, draw_tokens(log_p.detach(), chances)).sum()


def _inputs_shifted(
    loaded: LoadedModel,
    norms: Norms,
    thresholds: Mapping[Groups, tuple[float, float]],
    low_weights: LowWeights,
    found: Shifts,
) -> AbstractContextManager[None]:
    """Run the block with x - e d in the place of each group's inputs, E h times e taken from its outputs, and e = 0.

    Args:
        found: takes the numbers e, whose gradients tell what such a loss does.
    """

    def reading(place: Groups) -> Callable[[Entering], Taken]:
        limits = torch.tensor(thresholds[place], dtype=torch.float32, device=loaded.device)
        has_halves = reads_halves_of(loaded, place, low_weights)

        def read(entering: Entering) -> Taken:
            if entering.is_first:
                shape = entering.values.shape[:-1]
                found[place].append(torch.zeros(shape, device=loaded.device, requires_grad=True))
            with torch.no_grad():
                taken = take(entering, norms[place], limits, has_halves=has_halves)
                left_out = entering.values - taken.values
            # Matrices of a group have the same inputs, and the same e.
            return replace(taken, values=entering.values - _column(found[place][-1], left_out) * left_out)

        return read

    def losing(place: Groups) -> Callable[[str, torch.Tensor], torch.Tensor]:
        def lost(path: str, halves: torch.Tensor) -> torch.Tensor:
            product = functional.linear(halves, low_weights[place[0], path])
            return _column(found[place][-1], product) * product

        return lost

    return groups_read(loaded, thresholds, reading, losing)


def _column(shift: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return shift.to(like.dtype)[..., None]
