"""What gradients through a model need: fixed parameters, and tokens that the model itself draws."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .load import LoadedModel

__all__ = ["draw_tokens", "parameters_fixed"]


@contextmanager
def parameters_fixed(loaded: LoadedModel) -> Iterator[None]:
    """Parameters need no gradients meanwhile."""
    needs = [(parameter, parameter.requires_grad) for parameter in loaded.model.parameters()]
    try:
        for parameter, _ in needs:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, needed in needs:
            parameter.requires_grad_(needed)


def draw_tokens(log_p: torch.Tensor, chances: torch.Tensor) -> torch.Tensor:
    """Draw a token of each of (tokens, vocabulary) distributions: (tokens, 1).

    Args:
        chances: (tokens, 1) random numbers in [0, 1); `torch.multinomial` takes one for each entry of the vocabulary.
    """
    sums = log_p.exp().cumsum(dim=-1)
    # Rounding could put a chance on the last sum itself.
    return torch.searchsorted(sums, chances * sums[:, -1:], right=True).clamp_max(sums.shape[1] - 1)
