"""One running generation: its request, its progress, and the tokens that were not taken yet."""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from coreinfer.bundles.errors import CoreInferError, GenerationCancelled
from coreinfer.runtime.decoding.choosing import TokenChooser
from coreinfer.runtime.decoding.drafting import DraftLength
from coreinfer.runtime.decoding.grammar import JsonGrammar
from coreinfer.runtime.decoding.sampling import Draft, check_ids
from coreinfer.runtime.decoding.text import TextStream
from coreinfer.runtime.decoding.tool_grammar import call_grammar
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.generation import DiskReads, PathStep, Token
from coreinfer.runtime.options import GenerationOptions
from coreinfer.runtime.prompts.requests import Loaded, Request
from coreinfer.runtime.routing.drift import DriftWatch
from coreinfer.runtime.routing.modes import serving_cluster
from coreinfer.runtime.routing.token_shares import decoding_share

__all__ = ["Logits", "Post", "Row", "Run", "decoding", "path_step", "prepare"]

_log = logging.getLogger(__name__)

Logits = npt.NDArray[np.float32]
Post = Callable[[Token | Exception], object]


@dataclass(frozen=True, kw_only=True)
class Row:
    """The model's logits at the position of a token to choose, and the pack's draft for it.

    Attributes:
        logits: (vocab,) float32.
        draft: None where nothing was drafted.
    """

    logits: Logits
    draft: Draft | None = None


@dataclass(kw_only=True, eq=False)
class Run:
    """A generation from its request to its last token.

    Attributes:
        max_tokens: maximum number of tokens that it decodes.
        lengths: of drafts, in mode lossless.
        path: the clusters so far.
        ahead: maximum number of decoded tokens that were not taken yet; None for no limit.
        watched: whether its tokens are followed as they come, so that they should come evenly.
        post: called with each token, or the error, by the thread that steps; None keeps them for `take`.
        choice: the FFN weights that decode, in mode lossless those that draft; known after the prompt was read.
        sequence: its number in the decoder; None while it waits.
        num_read: tokens of the prompt that are in the KV cache.
        num_cached_tokens: tokens of the prompt that were in the KV cache when it began.
        token_ids: the decoded tokens.
        rows: verified rows that no token was chosen from yet, in mode lossless.
        num_to_draft: length of the next round, decided and not yet drafted, in mode lossless.
        weight_bytes: that the pass of each decoded token read, where not all have as many.
        read_start, decode_start: by `time.perf_counter`.
        reads_before: what had been read from disk at `read_start`; None where memory is not limited.
        ended: it is no longer needed; the next step frees what it holds.
        failure: the error that ended it.
    """

    loaded: Loaded
    request: Request
    options: GenerationOptions
    chooser: TokenChooser
    text: TextStream
    drift: DriftWatch
    max_tokens: int
    lengths: DraftLength | None
    path: tuple[PathStep, ...]
    ahead: int | None = None
    watched: bool = False
    post: Post | None = None
    choice: FfnChoice = DENSE
    sequence: int | None = None
    num_read: int = 0
    num_cached_tokens: int = 0
    statistic: Logits | None = None
    token_ids: list[int] = field(default_factory=list)
    weight_bytes: list[int] = field(default_factory=list)
    rows: deque[Row] = field(default_factory=deque)
    num_to_draft: int | None = None
    tokens: deque[Token] = field(default_factory=deque)
    read_start: float | None = None
    reads_before: DiskReads | None = None
    prefill_seconds: float = 0.0
    decode_start: float | None = None
    finished: bool = False
    ended: bool = False
    failure: Exception | None = None

    @property
    def num_left(self) -> int:
        """Tokens of the prompt that are still to be read."""
        return len(self.request.token_ids) - self.num_read

    @property
    def is_read(self) -> bool:
        """Whether all that comes before the next token is in the KV cache."""
        return self.sequence is not None and self.num_left == 0

    @property
    def is_over(self) -> bool:
        """Whether nothing more will be decoded."""
        return self.finished or self.ended or self.failure is not None

    @property
    def wants(self) -> bool:
        """Whether another token may be decoded now."""
        return not self.is_over and (self.ahead is None or len(self.tokens) < self.ahead)

    @property
    def is_ready(self) -> bool:
        """Whether a waiting thread has something to take: a token, or without a limit the last one."""
        return self.is_over if self.ahead is None else self.is_over or len(self.tokens) > 0

    @property
    def decoded_in_cache(self) -> list[int]:
        """Tokens after the prompt that are in the KV cache; drafts that may still be chosen are."""
        drafts = [row.draft.token_id for row in self.rows if row.draft is not None]
        return self.token_ids + drafts if self.rows else self.token_ids[:-1]

    def give(self, token: Token) -> None:
        """Hand a token to the waiting thread."""
        self.finished = token.finish_reason is not None
        if self.post is not None:
            self.post(token)
        else:
            self.tokens.append(token)

    def take(self) -> Token:
        """Take the next token, or raise the error."""
        if not self.tokens:
            raise self.failure or CoreInferError("the generation was ended by another thread")
        return self.tokens.popleft()

    def take_all(self) -> list[Token]:
        """Take all tokens of a run that is over, or raise its error."""
        if not self.finished:
            raise self.failure or CoreInferError("the generation was ended by another thread")
        return list(self.tokens)

    def check_cancelled(self) -> None:
        """End it between two steps, if it was cancelled and has no tokens; one that has tokens ends with its next."""
        cancel = self.options.cancel
        if cancel is not None and cancel.is_set() and not self.token_ids and not self.is_over:
            self.fail(GenerationCancelled(self.num_read, len(self.request.token_ids)))

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        self.failure = error
        if self.post is None:
            return
        try:
            self.post(error)
        except Exception:
            # It may be what failed. The other generations go on.
            _log.exception("a generation failed (%s), and so did telling whoever waits for it", error)


def prepare(loaded: Loaded, request: Request, options: GenerationOptions) -> Run:
    """Make the run that answers a request.

    Raises:
        ConfigError: the JSON schema cannot be used, or `logit_bias` names a token that does not exist.
    """
    tokenizer = loaded.prompts.tokenizer
    check_ids("logit_bias", options.logit_bias, loaded.bundle.manifest.model.vocab_size)
    cluster = serving_cluster(request.plan, request.route)
    return Run(
        loaded=loaded,
        request=request,
        options=options,
        chooser=TokenChooser(options, request.token_ids, tokenizer, _grammar(loaded, options)),
        text=TextStream(
            tokenizer,
            options.stop,
            after_ids=request.token_ids,
            skip_special_tokens=options.skip_special_tokens,
        ),
        drift=DriftWatch(cluster, stretch_tokens=options.drift_tokens if request.plan.uses_pack else 0),
        max_tokens=min(options.max_new_tokens, loaded.max_tokens - len(request.token_ids)),
        lengths=_draft_length(loaded, options) if request.plan.mode == "lossless" else None,
        path=(path_step(loaded, cluster, first_token=1, distance=request.distance),),
    )


def _grammar(loaded: Loaded, options: GenerationOptions) -> JsonGrammar | None:
    if options.must_call and options.tools:
        prompts = loaded.prompts
        return loaded.grammars.calls(
            call_grammar(prompts.tool_format, options.tools, options.tool_choice, prompts.tokenizer)
        )
    return None if options.json_schema is None else loaded.grammars.grammar(options.json_schema)


def path_step(loaded: Loaded, cluster: int, *, first_token: int, distance: float) -> PathStep:
    """Describe a stretch that a cluster serves."""
    label = loaded.bundle.manifest.clusters[cluster].label
    return PathStep(first_token=first_token, cluster=cluster, label=label, distance=distance)


def decoding(run: Run, choice: FfnChoice) -> FfnChoice:
    """The same weights, with the share of them that a decoded token of the run reads.

    A thin cluster that reads all is the dense FFN, so that its runs share a pass with others.
    """
    loaded = run.loaded
    share = decoding_share(
        loaded.bundle.manifest, run.options.token_share, choice, pays=loaded.decoder.token_shares_pay
    )
    if share < 1:
        return replace(choice, token_share=share)
    is_dense = choice.neuron_ids is None and loaded.bundle.weights_of(choice.cluster) is None
    return DENSE if is_dense else choice


def _draft_length(loaded: Loaded, options: GenerationOptions) -> DraftLength:
    # With a seed the text must not depend on the clock, nor on what ran before. Greedy text does not anyhow.
    return DraftLength(loaded.draft_costs if options.seed is None or options.temperature == 0 else None)
