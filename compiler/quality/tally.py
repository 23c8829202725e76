"""Sums over decoded tokens: how far one model's predictions are from another's."""

import math
from dataclasses import dataclass, field

import torch
from coreinfer.bundles.errors import ModelOutputError
from coreinfer.bundles.manifest import Score

__all__ = ["Tally", "compare_logits"]

_BLOCK_TOKENS = 16


@dataclass(kw_only=True)
class Tally:
    """Sums over decoded tokens."""

    nll: float = 0.0
    kl: float = 0.0
    agreements: int = 0
    num_tokens: int = 0
    texts: set[int] = field(default_factory=set)

    def add(self, other: "Tally") -> None:
        """Add another tally's sums."""
        self.nll += other.nll
        self.kl += other.kl
        self.agreements += other.agreements
        self.num_tokens += other.num_tokens
        self.texts |= other.texts

    def score(self, name: str) -> Score:
        """Turn sums into means."""
        count = max(1, self.num_tokens)
        return Score(
            name=name,
            perplexity=round(math.exp(min(self.nll / count, 50.0)), 4),
            kl=round(self.kl / count, 5),
            top1=round(self.agreements / count, 5),
            num_texts=len(self.texts),
            num_tokens=self.num_tokens,
        )


def compare_logits(dense: torch.Tensor, narrow: torch.Tensor, targets: torch.Tensor, text: int) -> Tally:
    """Compare two models' predictions of the same tokens.

    Args:
        dense, narrow: (tokens, vocabulary) logits.
        targets: (tokens,) the tokens that came.
        text: number of the text, to count texts.
    Raises:
        ModelOutputError: the logits are not finite.
    """
    tally = Tally(texts={text})
    # A few rows at a time, which stay in the CPU's caches: all would pass through memory a dozen times.
    blocks = (rows.split(_BLOCK_TOKENS) for rows in (dense, narrow, targets))
    for dense_rows, narrow_rows, target_rows in zip(*blocks, strict=True):
        tally.add(_compare_rows(dense_rows, narrow_rows, target_rows))
    if not (math.isfinite(tally.nll) and math.isfinite(tally.kl)):
        raise ModelOutputError(
            f"held-out text {text}: expected finite logits, got a mean of {float(dense.float().mean())} from the dense "
            f"model and {float(narrow.float().mean())} from the narrow one; compile with --dtype float32, or check the "
            "model's weights"
        )
    return tally


def _compare_rows(dense: torch.Tensor, narrow: torch.Tensor, targets: torch.Tensor) -> Tally:
    log_p = dense.float().log_softmax(dim=-1)
    log_q = narrow.float().log_softmax(dim=-1)
    nll = -float(log_q.gather(1, targets[:, None]).double().sum())
    agreements = int((dense.argmax(dim=-1) == narrow.argmax(dim=-1)).sum())
    # In place: memory that is written for the first time costs more than what is computed.
    weights = log_p.exp()
    of_rows = log_p.sub_(log_q).mul_(weights).sum(dim=-1)
    return Tally(nll=nll, kl=float(of_rows.double().sum()), agreements=agreements, num_tokens=len(targets))
