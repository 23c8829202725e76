"""From logits to the next token, with its log-probability on request."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from coreinfer.bundles.errors import ModelOutputError
from coreinfer.runtime.generation import TopLogprob
from coreinfer.runtime.options import GenerationOptions
from tokenizers import Tokenizer

from .grammar import JsonGrammar
from .sampling import Draft, Sampler, check_finite
from .text import token_text

__all__ = ["Chosen", "TokenChooser"]

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A token, with the model's own log-probabilities if they were requested."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TopLogprob, ...] = ()


class TokenChooser:
    """Chooses the tokens of one generation: grammar, then sampling.

    Attributes:
        greedy: whether only the place of the largest logit matters, so that the others may be approximate.
    """

    def __init__(
        self,
        options: GenerationOptions,
        prompt_ids: Sequence[int],
        tokenizer: Tokenizer,
        grammar: JsonGrammar | None,
    ) -> None:
        """Begin a generation.

        Args:
            prompt_ids: count as seen for the repetition penalty.
            grammar: what the answer must follow.
        """
        self._sampler = Sampler(options, prompt_ids)
        self._num_prompt, self._num_chosen = len(prompt_ids), 0
        self._num_logprobs = options.logprobs
        self._tokenizer = tokenizer
        self._grammar = grammar
        self.greedy = self._sampler.greedy and grammar is None and options.logprobs is None

    def propose(self, logits: Logits, ahead_ids: Sequence[int]) -> Draft:
        """Draft a token from a pack's logits; see `Sampler.propose`. A grammar looks at chosen tokens only."""
        try:
            return self._sampler.propose(logits, ahead_ids)
        except ModelOutputError as error:
            raise self._placed(error, num_ahead=len(ahead_ids)) from None

    def choose(self, logits: Logits, draft: Draft | None = None) -> Chosen:
        """Choose the next token.

        Args:
            logits: (vocab,) float32; left as they are.
            draft: by `propose`; does not change what is chosen how often, see `Sampler.sample`.
        Raises:
            ModelOutputError: the logits hold NaN or infinity, or are minus infinity throughout.
        """
        try:
            token_id = self._sampler.sample(self._allowed(logits), draft)
        except ModelOutputError as error:
            raise self._placed(error) from None
        self._num_chosen += 1
        if self._grammar is not None:
            self._grammar.advance(token_id)
        if self._num_logprobs is None:
            return Chosen(token_id=token_id)
        logprobs = log_softmax(logits)
        return Chosen(
            token_id=token_id, logprob=float(logprobs[token_id]), top_logprobs=self._top(logprobs, self._num_logprobs)
        )

    def _allowed(self, logits: Logits) -> Logits:
        """Leave what the grammar allows."""
        if self._grammar is None:
            return logits
        # The mask would hide a NaN.
        check_finite(logits)
        return self._grammar.masked(logits)

    def _placed(self, error: ModelOutputError, *, num_ahead: int = 0) -> ModelOutputError:
        """Say at which token it was, and what can be done."""
        return ModelOutputError(
            f"token {self._num_chosen + num_ahead + 1} after a prompt of {self._num_prompt} tokens: {error}; the model "
            "goes beyond the range of its numbers or is damaged: check it by coreinfer-inspect DIR --verify, try the "
            "other engine (native, torch), or compile it again"
        )

    def _top(self, logprobs: npt.NDArray[np.float64], count: int) -> tuple[TopLogprob, ...]:
        # Stable, so that ties go to the lower id, as greedy decoding has it.
        order = np.argsort(-logprobs, kind="stable")[:count].tolist()
        return tuple(
            TopLogprob(
                token_id=token_id,
                text=token_text(self._tokenizer, token_id),
                logprob=float(logprobs[token_id]),
            )
            for token_id in order
        )


def log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    """Return each token's natural log-probability: (vocab,) float64.

    Raises:
        ModelOutputError: the logits hold NaN or infinity, or are minus infinity throughout.
    """
    check_finite(logits)
    scores = logits.astype(np.float64)
    scores -= scores.max()
    return np.asarray(scores - np.log(np.exp(scores).sum()), dtype=np.float64)
