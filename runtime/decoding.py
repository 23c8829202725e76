"""Read a prompt, then decode token by token: the loop of every generation that runs alone, and the steps of all."""

import logging
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .cached import blocks
from .choosing import Chosen, TokenChooser
from .decoder import DENSE, FfnChoice
from .drafting import DraftLength
from .drift import DriftWatch
from .generation import FinishReason, PathStep, Token
from .json_schema import JsonGrammar
from .lossless import Row, lossless_rows
from .options import GenerationOptions
from .planning import decode_choice, serving_cluster
from .requests import Loaded, Request
from .sampling import check_ids
from .text import TextStream
from .tool_grammar import call_grammar

__all__ = ["Run", "decode", "follow_drift", "next_token", "prepare", "read_prompt", "tokens"]

Logits = npt.NDArray[np.float32]

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Run:
    """One generation under way.

    Attributes:
        lengths: of drafts, in mode lossless.
        choice: the FFN weights that decode, in mode lossless those that draft; known when the prompt was read.
        num_cached_tokens: of the prompt, those that were not read again.
        token_ids: that were decoded.
    """

    loaded: Loaded
    request: Request
    options: GenerationOptions
    chooser: TokenChooser
    text: TextStream
    drift: DriftWatch
    lengths: DraftLength | None
    path: tuple[PathStep, ...]
    choice: FfnChoice = DENSE
    num_cached_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_start: float = 0.0
    token_ids: list[int] = field(default_factory=list)

    @property
    def max_tokens(self) -> int:
        """Tokens after which it ends, at the latest."""
        room = self.loaded.bundle.manifest.model.max_positions - len(self.request.token_ids)
        return min(self.options.max_new_tokens, room)


def decode(loaded: Loaded, request: Request, options: GenerationOptions) -> Generator[Token, None, None]:
    """Answer a request.

    Yields:
        A `Token` for each token; the last has a finish reason.
    Raises:
        ConfigError: the JSON schema cannot be used; raised at the call, not when the first token is asked for.
    """
    return tokens(prepare(loaded, request, options))


def prepare(loaded: Loaded, request: Request, options: GenerationOptions) -> Run:
    """Put together what answering a request needs.

    Raises:
        ConfigError: the JSON schema cannot be used, or `logit_bias` names a token that there is not.
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
        lengths=_draft_length(loaded, options) if request.plan.mode == "lossless" else None,
        path=(_step(loaded, cluster, first_token=1, distance=request.distance),),
    )


def _grammar(loaded: Loaded, options: GenerationOptions) -> JsonGrammar | None:
    if options.must_call and options.tools:
        prompts = loaded.prompts
        return loaded.grammars.calls(
            call_grammar(prompts.tool_format, options.tools, options.tool_choice, prompts.tokenizer)
        )
    return None if options.json_schema is None else loaded.grammars.grammar(options.json_schema)


def _draft_length(loaded: Loaded, options: GenerationOptions) -> DraftLength:
    # With a seed the text must not depend on the clock, nor on what ran before. Greedy text does not anyhow.
    return DraftLength(loaded.draft_costs if options.seed is None or options.temperature == 0 else None)


def tokens(run: Run) -> Generator[Token, None, None]:
    """Run a generation alone, on the decoder's selected sequence."""
    try:
        first = read_prompt(run)
        with closing(_rows(run, first)) as rows:
            row = next(rows)
            while True:
                token = next_token(run, row)
                if run.options.on_token:
                    run.options.on_token(token)
                yield token
                if token.finish_reason:
                    return
                follow_drift(run)
                row = rows.send(token.token_id)
    except GeneratorExit:
        raise
    except BaseException:
        # A call that failed may have left some layers' caches longer than others.
        run.loaded.decoder.truncate(0)
        raise


def _rows(run: Run, first: Logits) -> Generator[Row, int, None]:
    """Give the logits for one token after another; what was chosen is to be sent."""
    if run.lengths is None:
        return _plain_rows(run, first)
    return lossless_rows(
        run.loaded.decoder,
        first,
        pack=lambda: run.choice,
        propose=run.chooser.propose,
        lengths=run.lengths,
        num_tokens=run.max_tokens,
        greedy=run.chooser.greedy,
    )


def _plain_rows(run: Run, first: Logits) -> Generator[Row, int, None]:
    decoder, in_use = run.loaded.decoder, run.choice
    token_id = yield Row(logits=first)
    while True:
        if run.choice is not in_use:
            in_use = run.choice
            decoder.use(in_use)
        token_id = yield Row(logits=decoder.forward([token_id], greedy=run.chooser.greedy)[-1])


def read_prompt(run: Run) -> Logits:
    """Read what of the prompt is not cached, dense where the bundle can, and put the decoding weights in place.

    Returns:
        (vocab,) logits for the first token.
    """
    decoder, bundle, request = run.loaded.decoder, run.loaded.bundle, run.request
    reader = DENSE if bundle.dense else FfnChoice(cluster=run.drift.cluster)
    run.num_cached_tokens = _num_kept(run, reader)
    decoder.truncate(run.num_cached_tokens)
    decoder.use(reader)
    # The pack comes while the prompt is read; it may take the place of the last generation's, now out of use.
    if request.plan.uses_pack:
        decoder.prepare(FfnChoice(cluster=run.drift.cluster))
    new_ids, statistic = request.token_ids[run.num_cached_tokens :], None
    if request.plan.needs_statistic:
        selection = bundle.manifest.plan.selection
        logits, statistics = decoder.prompt_statistics(new_ids, (selection,))
        statistic = statistics[selection]
    else:
        logits = _read_blocks(run)
    run.choice = decode_choice(request.plan, request.route, bundle, statistic, len(new_ids))
    decoder.use(run.choice)
    run.decode_start = time.perf_counter()
    run.prefill_seconds = run.decode_start - request.start_seconds
    last: Logits = logits[-1]
    return last


def _num_kept(run: Run, reader: FfnChoice) -> int:
    cached, request = run.loaded.decoder.cached, run.request
    if request.keeps_decoded:
        return cached.num_common(request.token_ids)
    if request.plan.needs_statistic:
        # The prompt's own neurons are chosen by all of its tokens.
        return 0
    decoder = run.loaded.decoder
    return cached.num_exact(request.token_ids, reader, decoder.block_tokens, alike=decoder.calls_alike)


def _read_blocks(run: Run) -> Logits:
    decoder, token_ids = run.loaded.decoder, run.request.token_ids
    logits: Logits = np.empty((0, 0), dtype=np.float32)
    for start, end in blocks(run.num_cached_tokens, len(token_ids), decoder.block_tokens):
        # Of all blocks but the last the logits are thrown away.
        greedy = run.chooser.greedy or end < len(token_ids)
        logits = decoder.forward(token_ids[start:end], greedy=greedy)
    return logits


def next_token(run: Run, row: Row) -> Token:
    """Choose a token, and say what became of the text with it."""
    chosen = run.chooser.choose(row.logits, row.draft)
    if run.lengths and row.draft:
        run.lengths.note_choice(accepted=chosen.token_id == row.draft.token_id)
    run.token_ids.append(chosen.token_id)
    piece, reason = _advance(run, chosen.token_id, is_last=len(run.token_ids) == run.max_tokens)
    if reason is None and run.options.cancel is not None and run.options.cancel.is_set():
        piece, reason = piece + run.text.flush(), "cancelled"
    return _token(run, chosen, piece, reason)


def _advance(run: Run, token_id: int, *, is_last: bool) -> tuple[str, FinishReason | None]:
    """Turn a token into text, and say whether the generation ends with it."""
    text = run.text
    if token_id in run.loaded.prompts.eos_token_ids:
        if len(run.token_ids) == 1:
            _log.warning(
                "the answer is empty: its first token is %r, which ends it",
                run.loaded.prompts.tokenizer.id_to_token(token_id),
            )
        return text.flush(), "stop"
    piece = text.push(token_id)
    if is_last and not text.stopped:
        # What was held back may complete a stop string.
        piece += text.flush()
        return piece, "stop" if text.stopped else "length"
    return piece, "stop" if text.stopped else None


def follow_drift(run: Run) -> None:
    """Route the last stretch of text again where one ends, and swap packs where the text has moved on for good."""
    stretch = run.drift.stretch(run.token_ids)
    if not stretch:
        return
    distances = run.loaded.router.distances(run.loaded.prompts.decode(stretch))
    if run.drift.swaps(distances):
        cluster = run.drift.cluster
        step = _step(run.loaded, cluster, first_token=len(run.token_ids) + 1, distance=float(distances[cluster]))
        run.path = (*run.path, step)
        run.choice = FfnChoice(cluster=cluster)


def _step(loaded: Loaded, cluster: int, *, first_token: int, distance: float) -> PathStep:
    label = loaded.bundle.manifest.clusters[cluster].label
    return PathStep(first_token=first_token, cluster=cluster, label=label, distance=distance)


def _token(run: Run, chosen: Chosen, piece: str, reason: FinishReason | None) -> Token:
    request, serving = run.request, run.path[-1]
    return Token(
        token_id=chosen.token_id,
        text=piece,
        cluster=serving.cluster,
        cluster_label=serving.label,
        distance=request.route.distance,
        familiar=request.route.familiar,
        fallback=request.plan.fallback,
        path=run.path,
        mode=request.plan.mode,
        num_prompt_tokens=len(request.token_ids),
        num_cached_tokens=run.num_cached_tokens,
        num_tokens=len(run.token_ids),
        prefill_seconds=run.prefill_seconds,
        decode_seconds=time.perf_counter() - run.decode_start,
        logprob=chosen.logprob,
        top_logprobs=chosen.top_logprobs,
        drafting=run.lengths.report() if run.lengths else None,
        finish_reason=reason,
    )
