"""Reading a prompt, block by block; after an interruption also what was decoded before it."""

import time

from coreinfer.runtime.engines.cached import CachedTokens, blocks
from coreinfer.runtime.engines.protocol import DENSE, Decoder, FfnChoice
from coreinfer.runtime.routing.modes import decode_choice

from .ffn_switch import FfnSwitch
from .kv_pool import KvPool
from .run import Logits, Run

__all__ = ["begin", "read_block"]

# Each row has logits of the whole vocabulary.
_ROWS_AT_ONCE = 16


def begin(run: Run, decoder: Decoder, pool: KvPool) -> bool:
    """Take a sequence for a run, with the part of its prompt that it already holds; False if the rest has no room."""
    number, kept = pool.take(lambda cached: _num_kept(run, cached, decoder))
    num_more = len(run.request.token_ids) + len(run.decoded_in_cache) + 1 - kept
    if not pool.make_room(kept, num_more) and pool.num_taken > 1:
        pool.leave(number, kept)
        return False
    run.sequence, run.num_read, run.statistic = number, kept, None
    if run.read_start is None:
        run.read_start, run.reads_before = time.perf_counter(), decoder.disk_reads
    if not run.token_ids:
        run.num_cached_tokens = kept
    return True


def read_block(run: Run, decoder: Decoder, switch: FfnSwitch, limit: int | None = None) -> Logits | None:
    """Read one block of the prompt of a run that has begun, dense where the bundle can.

    Args:
        limit: read about this many tokens at most, where that changes no result; None for a whole block.
    Returns:
        None as long as some of the prompt is left; then (vocab,) logits for the first token. None too for a run that
        had decoded before it gave way: it is where it was.
    """
    assert run.sequence is not None
    decoder.select(run.sequence)
    if not run.num_left:
        # All but some of what was decoded is there: it had to wait for room.
        _read_decoded_again(run, decoder, switch)
        return None
    switch.use(_reader(run), anew=True)
    if run.num_read == run.num_cached_tokens and run.request.plan.uses_pack:
        # The pack comes while the prompt is read; it may take the place of another generation's.
        decoder.prepare(FfnChoice(cluster=run.drift.cluster))
    logits = _read(run, decoder, limit)
    if run.num_left:
        return None
    if run.token_ids:
        _read_decoded_again(run, decoder, switch)
        return None
    _end(run)
    last: Logits = logits[-1]
    return last


def _reader(run: Run) -> FfnChoice:
    return DENSE if run.loaded.bundle.dense else FfnChoice(cluster=run.path[0].cluster)


def _num_kept(run: Run, cached: CachedTokens, decoder: Decoder) -> int:
    request = run.request
    if request.keeps_decoded:
        return cached.num_common(request.token_ids)
    if request.plan.needs_statistic:
        # The prompt's own neurons are chosen by all of its tokens.
        return 0
    return cached.num_exact(request.token_ids, _reader(run), decoder.block_tokens, alike=decoder.calls_alike)


def _read(run: Run, decoder: Decoder, limit: int | None) -> Logits:
    token_ids = run.request.token_ids
    start, end = run.num_read, next(blocks(run.num_read, len(token_ids), decoder.block_tokens))[1]
    if run.request.plan.needs_statistic:
        # Other engines sum over all tokens of one call.
        end = end if decoder.calls_alike else len(token_ids)
        logits = _read_with_statistic(run, decoder, end)
    else:
        end = _cut(start, end, limit) if decoder.calls_alike and limit is not None else end
        # Of all blocks but the last the logits are thrown away.
        logits = decoder.forward(token_ids[start:end], greedy=run.chooser.greedy or end < len(token_ids))
    run.num_read = end
    return logits


def _cut(start: int, end: int, limit: int) -> int:
    """End a block early, but so that no token is read alone which is not alone in the whole block."""
    return end if end - start <= limit + 1 else start + max(limit, 2)


def _read_with_statistic(run: Run, decoder: Decoder, end: int) -> Logits:
    selection = run.loaded.bundle.manifest.plan.selection
    logits, statistics = decoder.prompt_statistics(run.request.token_ids[run.num_read : end], (selection,))
    block = statistics[selection]
    run.statistic = block if run.statistic is None else run.statistic + block
    return logits


def _end(run: Run) -> None:
    """Choose the weights that decode, now that all of the prompt is known."""
    request, num_new_tokens = run.request, len(run.request.token_ids) - run.num_cached_tokens
    run.choice = decode_choice(request.plan, request.route, run.loaded.bundle, run.statistic, num_new_tokens)
    run.statistic = None
    assert run.read_start is not None
    run.decode_start = time.perf_counter()
    run.prefill_seconds = request.routing_seconds + run.decode_start - run.read_start


def _read_decoded_again(run: Run, decoder: Decoder, switch: FfnSwitch) -> None:
    """Read tokens again with the weights that each was decoded with: bit-identical where rows are."""
    assert run.sequence is not None
    token_ids = run.decoded_in_cache
    start = decoder.num_cached - len(run.request.token_ids)
    while start < len(token_ids):
        choice, end = _decoded_with(run, start, len(token_ids))
        end = min(end, start + _ROWS_AT_ONCE)
        switch.use(choice)
        decoder.forward_rows([run.sequence] * (end - start), token_ids[start:end])
        start = end


def _decoded_with(run: Run, start: int, end: int) -> tuple[FfnChoice, int]:
    """Return the weights that the decoded token at `start` went through, and where others begin."""
    if run.lengths is not None:
        return DENSE, end
    if len(run.path) == 1:
        return run.choice, end
    # A step's first token was chosen from what the token before it gave.
    begins = [max(step.first_token - 2, 0) for step in run.path] + [end]
    number = max(index for index, begin in enumerate(begins[:-1]) if begin <= start)
    return FfnChoice(cluster=run.path[number].cluster), min(begins[number + 1], end)
