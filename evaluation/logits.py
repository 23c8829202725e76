"""Compare logits, and decode greedily from them."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from coreinfer.runtime.decoding.sampling import check_finite

__all__ = ["Divergence", "Predictions", "diverge", "greedy_ids", "log_likelihood", "predictions"]

Floats = npt.NDArray[np.float32]
Append = Callable[[Sequence[int]], Floats]


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The reference's predictions of a text's tokens.

    Attributes:
        probabilities: (tokens, vocabulary) float32.
        entropies: (tokens,) nats.
        choices: (tokens,) likeliest token ids.
    """

    probabilities: Floats
    entropies: Floats
    choices: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """What a model makes of the same tokens.

    Attributes:
        kl: (tokens,) KL(reference || model) in nats.
        nll: (tokens,) -log p of the tokens that came.
        agrees: (tokens,) whether both find the same token likeliest.
    """

    kl: Floats
    nll: Floats
    agrees: npt.NDArray[np.bool_]


def predictions(logits: Floats) -> Predictions:
    """Turn the reference's logits (tokens, vocabulary) into what others are compared with."""
    log_p = logits - _log_sum_exp(logits)[:, None]
    probabilities = np.exp(log_p)
    return Predictions(
        probabilities=probabilities,
        entropies=-np.einsum("tv,tv->t", probabilities, log_p),
        choices=logits.argmax(axis=1),
    )


def diverge(reference: Predictions, logits: Floats, targets: Sequence[int]) -> Divergence:
    """Compare a model's logits (tokens, vocabulary) with the reference's predictions of the same tokens.

    KL = sum_v p_v (log p_v - z_v) + log sum_v exp(z_v), so that the model's own probabilities are never written out.
    """
    normalizers = _log_sum_exp(logits)
    kl = normalizers - np.einsum("tv,tv->t", reference.probabilities, logits) - reference.entropies
    rows = np.arange(len(targets))
    return Divergence(
        # Rounding can leave a little below nothing.
        kl=np.maximum(kl, 0),
        nll=normalizers - logits[rows, np.asarray(targets)],
        agrees=logits.argmax(axis=1) == reference.choices,
    )


def log_likelihood(logits: Floats, targets: Sequence[int]) -> tuple[float, bool]:
    """Sum of log p of tokens, and whether each is the likeliest: logits (tokens, vocabulary)."""
    rows = np.arange(len(targets))
    chosen = logits[rows, np.asarray(targets)]
    return float((chosen - _log_sum_exp(logits)).sum()), bool((logits.argmax(axis=1) == np.asarray(targets)).all())


def greedy_ids(
    append: Append, last_id: int, *, max_new_tokens: int, eos_ids: Collection[int], stopped: Callable[[list[int]], bool]
) -> list[int]:
    """Continue after `last_id` with the likeliest token each time, until a stop token, or until `stopped(ids)`.

    Raises:
        ModelOutputError: logits are not finite.
    """
    ids: list[int] = []
    token_id = last_id
    while len(ids) < max_new_tokens and not stopped(ids):
        logits = append([token_id])[-1]
        check_finite(logits)
        token_id = int(logits.argmax())
        if token_id in eos_ids:
            break
        ids.append(token_id)
    return ids


def _log_sum_exp(logits: Floats) -> Floats:
    check_finite(logits)
    top = logits.max(axis=1)
    sums = np.exp(logits - top[:, None]).sum(axis=1)
    return np.asarray(top + np.log(sums), dtype=np.float32)
