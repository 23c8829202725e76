"""Read a prompt, then decode token by token: the loop that every generation runs."""

import time
from collections.abc import Generator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .cached import blocks
from .choosing import Chosen, TokenChooser
from .decoder import DENSE, FfnChoice
from .drift import DriftWatch
from .generation import FinishReason, PathStep, Token
from .options import GenerationOptions
from .planning import decode_choice, serving_cluster
from .requests import Loaded, Request
from .text import TextStream

__all__ = ["decode"]

Logits = npt.NDArray[np.float32]


@dataclass(kw_only=True)
class _Run:
    """One generation under way.

    Attributes:
        num_cached_tokens: of the prompt, those that were not read again.
        token_ids: that were decoded.
    """

    loaded: Loaded
    request: Request
    options: GenerationOptions
    chooser: TokenChooser
    text: TextStream
    drift: DriftWatch
    path: tuple[PathStep, ...]
    num_cached_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_start: float = 0.0
    token_ids: list[int] = field(default_factory=list)


def decode(loaded: Loaded, request: Request, options: GenerationOptions) -> Generator[Token, None, None]:
    """Answer a request.

    Yields:
        A `Token` for each token; the last has a finish reason.
    Raises:
        ConfigError: the JSON schema cannot be used; raised at the call, not when the first token is asked for.
    """
    grammar = None if options.json_schema is None else loaded.grammars.grammar(options.json_schema)
    tokenizer = loaded.prompts.tokenizer
    cluster = serving_cluster(request.plan, request.route)
    run = _Run(
        loaded=loaded,
        request=request,
        options=options,
        chooser=TokenChooser(options, request.token_ids, tokenizer, grammar),
        text=TextStream(tokenizer, options.stop),
        drift=DriftWatch(cluster, stretch_tokens=options.drift_tokens if request.plan.uses_pack else 0),
        path=(_step(loaded, cluster, first_token=1, distance=request.distance),),
    )
    return _tokens(run)


def _tokens(run: _Run) -> Generator[Token, None, None]:
    decoder = run.loaded.decoder
    try:
        logits = _read_prompt(run)
        run.prefill_seconds = time.perf_counter() - run.request.start_seconds
        run.decode_start = time.perf_counter()
        room = run.loaded.bundle.manifest.model.max_positions - len(run.request.token_ids)
        last = min(run.options.max_new_tokens, room)
        for number in range(1, last + 1):
            token = _next_token(run, logits[-1], is_last=number == last)
            if run.options.on_token:
                run.options.on_token(token)
            yield token
            if token.finish_reason:
                return
            _follow_drift(run)
            logits = decoder.forward([token.token_id], greedy=run.chooser.greedy)
    except GeneratorExit:
        raise
    except BaseException:
        # A call that failed may have left some layers' caches longer than others.
        decoder.truncate(0)
        raise


def _read_prompt(run: _Run) -> Logits:
    """Read what of the prompt is not cached, dense where the bundle can, and put the decoding weights in place."""
    decoder, bundle, request = run.loaded.decoder, run.loaded.bundle, run.request
    if request.plan.uses_pack:
        bundle.packs[run.drift.cluster].prefetch()
    reader = DENSE if bundle.dense else FfnChoice(cluster=run.drift.cluster)
    run.num_cached_tokens = _num_kept(run, reader)
    decoder.truncate(run.num_cached_tokens)
    decoder.use(reader)
    new_ids, statistic = request.token_ids[run.num_cached_tokens :], None
    if request.plan.needs_statistic:
        selection = bundle.manifest.plan.selection
        logits, statistics = decoder.prompt_statistics(new_ids, (selection,))
        statistic = statistics[selection]
    else:
        logits = _read_blocks(run)
    decoder.use(decode_choice(request.plan, request.route, bundle, statistic, len(new_ids)))
    return logits


def _num_kept(run: _Run, reader: FfnChoice) -> int:
    cached, request = run.loaded.decoder.cached, run.request
    if request.keeps_decoded:
        return cached.num_common(request.token_ids)
    if request.plan.needs_statistic:
        # The prompt's own neurons are chosen by all of its tokens.
        return 0
    return cached.num_exact(request.token_ids, reader, run.loaded.decoder.block_tokens)


def _read_blocks(run: _Run) -> Logits:
    decoder, token_ids = run.loaded.decoder, run.request.token_ids
    logits: Logits = np.empty((0, 0), dtype=np.float32)
    for start, end in blocks(run.num_cached_tokens, len(token_ids), decoder.block_tokens):
        # Of all blocks but the last the logits are thrown away.
        greedy = run.chooser.greedy or end < len(token_ids)
        logits = decoder.forward(token_ids[start:end], greedy=greedy)
    return logits


def _next_token(run: _Run, logits: Logits, *, is_last: bool) -> Token:
    chosen = run.chooser.choose(logits)
    run.token_ids.append(chosen.token_id)
    piece, reason = _advance(run, chosen.token_id, is_last=is_last)
    if reason is None and run.options.cancel is not None and run.options.cancel.is_set():
        piece, reason = piece + run.text.flush(), "cancelled"
    return _token(run, chosen, piece, reason)


def _advance(run: _Run, token_id: int, *, is_last: bool) -> tuple[str, FinishReason | None]:
    """Turn a token into text, and say whether the generation ends with it."""
    text = run.text
    if token_id in run.loaded.prompts.eos_token_ids:
        return text.flush(), "stop"
    piece = text.push(token_id)
    if is_last and not text.stopped:
        # What was held back may complete a stop string.
        piece += text.flush()
        return piece, "stop" if text.stopped else "length"
    return piece, "stop" if text.stopped else None


def _follow_drift(run: _Run) -> None:
    """Route the last stretch of text again where one ends, and swap packs where the text has moved on for good."""
    stretch = run.drift.stretch(run.token_ids)
    if not stretch:
        return
    distances = run.loaded.router.distances(run.loaded.prompts.decode(stretch))
    if run.drift.swaps(distances):
        cluster = run.drift.cluster
        step = _step(run.loaded, cluster, first_token=len(run.token_ids) + 1, distance=float(distances[cluster]))
        run.path = (*run.path, step)
        run.loaded.decoder.use(FfnChoice(cluster=cluster))


def _step(loaded: Loaded, cluster: int, *, first_token: int, distance: float) -> PathStep:
    label = loaded.bundle.manifest.clusters[cluster].label
    return PathStep(first_token=first_token, cluster=cluster, label=label, distance=distance)


def _token(run: _Run, chosen: Chosen, piece: str, reason: FinishReason | None) -> Token:
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
        finish_reason=reason,
    )
