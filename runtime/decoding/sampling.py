"""From logits to the next token.

The filters, their order and their edge cases are those of the logits processors of transformers, so that a setting
means here what it means there.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
from coreinfer.bundles.errors import ConfigError, ModelOutputError
from coreinfer.bundles.shared.checks import between, number, raise_problems, share, whole_number
from coreinfer.bundles.shared.option_fields import field_problems, keyword, name_of, option

__all__ = ["Draft", "Sampler", "SamplingParams", "check_finite", "check_ids", "distribution"]

Logits = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_NO_COUNTS: Mapping[int, int] = {}


def _bias_problems(name: str, bias: object) -> Iterator[str]:
    if not isinstance(bias, Mapping):
        yield f"{name}: expected a mapping from token ids to numbers, got {type(bias).__name__}"
        return
    yield from filter(None, (whole_number(0).problem(name, token_id) for token_id in bias))
    yield from filter(None, (between(-100, 100).problem(f"{name}[{key!r}]", value) for key, value in bias.items()))


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen; greedily by default.

    Each option is stated here and nowhere else: `coreinfer-run`, docs/cli.md and the checks are made from these fields.
    """

    temperature: float = field(
        default=0.0, metadata=option("Temperature of sampling; 0 decodes greedily.", check=number(least=0))
    )
    """Divides the logits; 0 always takes the likeliest token, whatever the filters say."""
    top_k: int = field(
        default=0, metadata=option("Sample from the k likeliest tokens; 0 for all.", check=whole_number(0))
    )
    """What ties with the last of them is kept too."""
    top_p: float = field(
        default=1.0,
        metadata=option("Sample from the likeliest tokens that together reach this probability.", check=share()),
    )
    """That which they reach together."""
    min_p: float = field(
        default=0.0,
        metadata=option("Minimum probability of a token, relative to the likeliest one.", check=share(zero=True)),
    )
    repetition_penalty: float = field(
        default=1.0, metadata=option("Above 1 makes repetition less likely.", check=number(above=0))
    )
    """Divides positive and multiplies negative logits of tokens that were seen, the prompt's too; 1 for none."""
    presence_penalty: float = field(
        default=0.0,
        metadata=keyword(
            "Subtracted from the logits of tokens that were decoded before; tokens of the prompt do not count.",
            check=between(-2, 2),
        ),
    )
    frequency_penalty: float = field(
        default=0.0, metadata=keyword("Subtracted once for each time that a token was decoded.", check=between(-2, 2))
    )
    logit_bias: Mapping[int, float] = field(
        default_factory=dict,
        metadata=keyword(
            "Added to the logits of these token ids, each in [-100, 100], before everything else.",
            problems=_bias_problems,
        ),
    )
    seed: int | None = field(
        default=None, metadata=option("Seed of sampling.", check=whole_number(0), unset="a new one each time")
    )

    @property
    def changes_logits(self) -> bool:
        """Whether the options can change the order of the logits."""
        return self.repetition_penalty != 1 or self.counts or bool(self.logit_bias)

    @property
    def counts(self) -> bool:
        """Whether it matters how often a token was decoded."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ConfigError: naming all values that are wrong.
        """
        raise_problems(field_problems(self, name_of))


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A token proposed by another model.

    Attributes:
        token_id: what is proposed.
        probabilities: (vocab,) float64 that it was drawn from; None where nothing is drawn.
    """

    token_id: int
    probabilities: Doubles | None


class Sampler:
    """Draws the tokens of one generation.

    Attributes:
        greedy: whether only the place of the largest logit matters.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int]) -> None:
        """Start a generation.

        Args:
            params: how to draw.
            prompt_ids: the prompt's tokens, which count as seen.
        """
        self._params = params
        self.greedy, self._counts_matter = params.temperature == 0 and not params.changes_logits, params.counts
        self._seen = {int(token_id) for token_id in prompt_ids}
        self._counts: Counter[int] = Counter()

    @cached_property
    def _generator(self) -> "np.random.Generator":
        # Made for the first token that is drawn: a greedy text would wait some 10 ms for numpy to import this part.
        return np.random.Generator(np.random.PCG64(self._params.seed))

    def sample(self, logits: Logits, draft: Draft | None = None) -> int:
        """Draw the next token, which counts as seen from then on.

        Args:
            logits: (vocab,) float32; left as they are.
            draft: a proposal by `propose`. The token is distributed as without it, and is the proposed one with the
                highest probability that allows this (the rejection rule of arXiv 2211.17192 and 2302.01318).
        Returns:
            The token's id.
        Raises:
            ConfigError: the logits are no vector, or a seen token is not among them.
            ModelOutputError: the logits hold NaN or infinity, or are minus infinity throughout.
        """
        token_id = self._likeliest(logits, self._seen, self._counts)
        if token_id is None:
            token_id = self._draw_beside(distribution(logits, self._params, self._seen, self._counts), draft)
        self._seen.add(token_id)
        if self._counts_matter:
            self._counts[token_id] += 1
        return token_id

    def propose(self, logits: Logits, ahead_ids: Collection[int]) -> Draft:
        """Draw a token from another model's logits; nothing counts as seen.

        Args:
            logits: (vocab,) float32; left as they are.
            ahead_ids: tokens proposed before this one since the last that was sampled; here they do count as seen.
        Raises:
            ConfigError, ModelOutputError: as `sample`.
        """
        seen = self._seen if self._params.repetition_penalty == 1 else self._seen.union(ahead_ids)
        counts = self._counts + Counter(ahead_ids) if self._params.counts else self._counts
        token_id = self._likeliest(logits, seen, counts)
        if token_id is not None:
            return Draft(token_id=token_id, probabilities=None)
        probabilities = distribution(logits, self._params, seen, counts)
        return Draft(token_id=self._draw(probabilities), probabilities=probabilities)

    def _likeliest(self, logits: Logits, seen: Collection[int], counts: Mapping[int, int]) -> int | None:
        """Find the next token where none is drawn."""
        if self.greedy:
            return _largest(logits)
        if self._params.temperature == 0:
            return int(_penalized(logits, self._params, seen, counts).argmax())
        return None

    def _draw_beside(self, probabilities: Doubles, draft: Draft | None) -> int:
        if draft is None or draft.probabilities is None:
            return self._draw(probabilities)
        proposed = draft.probabilities[draft.token_id]
        if self._generator.random() * proposed < probabilities[draft.token_id]:
            return draft.token_id
        # Rejected only where it was proposed more often than it may come; elsewhere something is wanting then.
        return self._draw(np.maximum(probabilities - draft.probabilities, 0))

    def _draw(self, probabilities: Doubles) -> int:
        # The places of numbers that are not 0 are found ten times as fast in a mask.
        token_ids = np.flatnonzero(probabilities != 0)
        cumulative = np.cumsum(probabilities[token_ids])
        position = int(np.searchsorted(cumulative, self._generator.random() * cumulative[-1], side="right"))
        # A draw next to 1 can round up to the sum itself.
        return int(token_ids[min(position, token_ids.size - 1)])


def distribution(
    logits: Logits, params: SamplingParams, seen_ids: Collection[int], counts: Mapping[int, int] = _NO_COUNTS
) -> Doubles:
    """Return each token's probability of being drawn next.

    Args:
        logits: (vocab,) float32; left as they are.
        params: how to draw; its seed does not matter.
        seen_ids: tokens of the prompt and of the text so far, in any order.
        counts: how often each token was decoded.
    Returns:
        (vocab,) float64 that sum to 1; all of it on the lowest of the likeliest ids when the temperature is 0.
    Raises:
        ConfigError: the logits are no vector, or a seen token is not among them.
        ModelOutputError: the logits hold NaN or infinity, or are minus infinity throughout.
    """
    scores = _penalized(logits, params, seen_ids, counts)
    probabilities = np.zeros(scores.size)
    if params.temperature == 0:
        probabilities[scores.argmax()] = 1
        return probabilities
    if not 0 < params.top_k < scores.size:
        return _filtered(_softmax(scores, params.temperature), params)
    token_ids = _top_k(scores, params.top_k)
    probabilities[token_ids] = _filtered(_softmax(scores[token_ids], params.temperature), params)
    return probabilities


def check_finite(logits: Logits) -> None:
    """Refuse logits that no token can be chosen from; costs one pass over them.

    Args:
        logits: (..., vocab) float32.
    Raises:
        ModelOutputError: a row holds NaN or infinity, or is minus infinity throughout.
    """
    # The maximum of a row with a NaN is NaN.
    wrong = ~np.isfinite(logits.max(axis=-1))
    if wrong.any():
        raise ModelOutputError(_not_finite(logits.reshape(-1, logits.shape[-1])[wrong.reshape(-1).argmax()]))


def _largest(logits: Logits) -> int:
    """Find the likeliest token without a copy of the logits."""
    _check_vector(logits)
    token_id = int(logits.argmax())
    # argmax finds a NaN where there is one.
    if not np.isfinite(logits[token_id]):
        raise ModelOutputError(_not_finite(logits))
    return token_id


def _check_vector(logits: Logits) -> None:
    if logits.ndim != 1 or logits.size == 0:
        raise ConfigError(f"logits: expected the shape (vocab,), got {logits.shape}")


def _penalized(logits: Logits, params: SamplingParams, seen_ids: Collection[int], counts: Mapping[int, int]) -> Doubles:
    _check_vector(logits)
    scores, penalty = logits.astype(np.float64), params.repetition_penalty
    if params.logit_bias:
        biased = check_ids("logit_bias", params.logit_bias, scores.size)
        scores[biased] += np.fromiter(params.logit_bias.values(), dtype=np.float64)
    if penalty != 1 and seen_ids:
        seen = check_ids("seen tokens", seen_ids, scores.size)
        with np.errstate(over="ignore"):
            scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    if params.counts and counts:
        times = np.fromiter(counts.values(), dtype=np.float64)
        decoded = check_ids("decoded tokens", counts, scores.size)
        scores[decoded] -= params.presence_penalty + params.frequency_penalty * times
    # The maximum of scores with a NaN is NaN: one pass finds all that has no softmax.
    if not np.isfinite(scores.max()):
        raise ModelOutputError(_not_finite(scores))
    return scores


def check_ids(what: str, token_ids: Collection[int], vocab_size: int) -> Ids:
    """Return token ids as an array.

    Raises:
        ConfigError: one is not among the model's.
    """
    try:
        ids = np.fromiter(token_ids, dtype=np.int64, count=len(token_ids))
        outside = ids[(ids < 0) | (ids >= vocab_size)].tolist()
    except OverflowError:
        # JSON has whole numbers of any size.
        outside = [max(token_ids, key=abs)]
    if outside:
        raise ConfigError(f"{what}: expected ids from 0 to {vocab_size - 1}, got {outside[0]}")
    return ids


def _not_finite(scores: Logits | Doubles) -> str:
    num_nan, num_infinite = np.count_nonzero(np.isnan(scores)), np.count_nonzero(np.isposinf(scores))
    got = f"{num_nan} NaN and {num_infinite} infinite" if num_nan or num_infinite else "minus infinity throughout"
    return f"logits of {scores.size} tokens: expected finite numbers, got {got}"


def _top_k(scores: Doubles, top_k: int) -> Ids:
    least = scores[np.argpartition(scores, -top_k)[-top_k]]
    return np.flatnonzero(scores >= least)


def _softmax(scores: Doubles, temperature: float) -> Doubles:
    """Overwrites the scores: a vocabulary's new arrays would cost more than the arithmetic."""
    scores -= scores.max()
    # A tiny temperature takes all but the highest score to minus infinity, as it should.
    with np.errstate(over="ignore"):
        scores /= temperature
    np.exp(scores, out=scores)
    scores /= scores.sum()
    return scores


def _filtered(probabilities: Doubles, params: SamplingParams) -> Doubles:
    """Drop what top-p and min-p drop, and have the rest sum to 1; overwrites the probabilities."""
    if params.top_p == 1 and params.min_p == 0:
        probabilities /= probabilities.sum()
        return probabilities
    keep = _top_p(probabilities, params.top_p)
    if params.min_p > 0:
        # Top-p never drops the likeliest token and min-p only compares with it: min-p need not wait for its result.
        keep &= _min_p(probabilities, params.min_p)
    kept = np.flatnonzero(keep)
    weights = probabilities[kept]
    probabilities.fill(0)
    probabilities[kept] = weights
    # Summed up with the zeros: in this order the sum has the bits that it always had.
    probabilities[kept] = weights / probabilities.sum()
    return probabilities


def _top_p(probabilities: Doubles, top_p: float) -> Mask:
    if top_p == 1:
        return np.ones(probabilities.size, dtype=np.bool_)
    # Tokens below 1/vocab of the probability that may be dropped are dropped all together: no need to sort them.
    keep: Mask = probabilities >= min((1 - top_p) / probabilities.size, probabilities.max())
    head = np.flatnonzero(keep)
    ascending = head[np.argsort(-probabilities[head], kind="stable")[::-1]]
    cumulative = probabilities[~keep].sum() + np.cumsum(probabilities[ascending])
    keep[ascending[:-1][cumulative[:-1] <= 1 - top_p]] = False
    return keep


def _min_p(probabilities: Doubles, min_p: float) -> Mask:
    return np.asarray(probabilities >= min_p * probabilities.max(), dtype=np.bool_)
