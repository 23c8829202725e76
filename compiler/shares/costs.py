"""What it costs the whole model to leave out inputs of one group, of all groups in one pass.

Let a group's inputs be x - e d, d what is left out of x and e a number for each token. To second order, leaving them
out costs KL = 1/2 d^T F d with the Fisher matrix F of those inputs, which is 1/2 E[(dl/de)^2], l = -log p(y) of a whole
text and y drawn from the model itself: gradients count what a token's error does to later tokens through attention too.
Unlike measuring each group alone, it takes one pass forward and one back, however many layers there are. The errors of
two tokens, and of two experts of one token, are taken to be uncorrelated.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.contract import INPUT_GROUPS
from coreinfer.compiler.models.gradients import draw_tokens, parameters_fixed
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.progress import Advance
from coreinfer.runtime.engines.torch.wanted_inputs import Entering, Groups

from .inputs import Norms, groups_of, inputs_replaced
from .texts import BegunText

__all__ = ["group_costs"]

Floats = npt.NDArray[np.float32]
Shifts = dict[Groups, list[torch.Tensor]]
"""The numbers e of each group, (tokens,), or of each of its experts'."""


def group_costs(
    loaded: LoadedModel,
    texts: Sequence[BegunText],
    norms: Norms,
    thresholds: Mapping[Groups, float],
    advance: Advance,
    *,
    seed: int,
) -> Floats:
    """Estimate KL(whole || with inputs of one group left out) of each group alone, with the weights in use.

    Args:
        thresholds: of each group.
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
            with torch.enable_grad(), _inputs_shifted(loaded, norms, thresholds, found):
                _surprise(loaded, text, generator).backward()
            for place, shifts in found.items():
                sums[place] += sum(
                    float(shift.grad.double().square().sum()) for shift in shifts if shift.grad is not None
                )
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
    loaded: LoadedModel, norms: Norms, thresholds: Mapping[Groups, float], found: Shifts
) -> AbstractContextManager[None]:
    """Run the block with x - e d in the place of each group's inputs, and e = 0.

    Args:
        found: takes the numbers e, whose gradients tell what leaving d out does.
    """

    def shifted(place: Groups, entering: Entering, is_wanted: torch.Tensor) -> torch.Tensor:
        if entering.is_first:
            shape = entering.values.shape[:-1]
            found[place].append(torch.zeros(shape, device=loaded.device, requires_grad=True))
        left_out = entering.values.detach().masked_fill(is_wanted, 0)
        # Matrices of a group have the same inputs, and the same e.
        return entering.values - found[place][-1].to(left_out.dtype)[..., None] * left_out

    return inputs_replaced(loaded, norms, thresholds, shifted)
