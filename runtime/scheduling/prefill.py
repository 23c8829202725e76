"""Reading a prompt, block by block; after an interruption also what was decoded before it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from coreinfer.runtime.engines.cached import CachedTokens, blocks
from coreinfer.runtime.engines.protocol import DENSE, Decoder, FfnChoice
from coreinfer.runtime.routing.modes import decode_choice, prompt_choice

from .ffn_switch import FfnSwitch
from .kv_pool import KvPool
from .run import Logits, Run, decoding

__all__ = ["Block", "begin", "block_beside", "read_beside", "read_block", "reader"]

# Each row has logits of the whole vocabulary.
_ROWS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Block:
    """The next tokens of a run's prompt, to be read in the pass that decodes others."""

    run: Run
    token_ids: Sequence[int]


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
    switch.use(reader(run), anew=True)
    _prepare_pack(run, decoder)
    logits = _read(run, decoder, limit)
    if run.num_left:
        return None
    if run.token_ids:
        _read_decoded_again(run, decoder, switch)
        return None
    _end(run)
    last: Logits = logits[-1]
    return last


def block_beside(run: Run, decoder: Decoder, limit: int) -> Block | None:
    """Return the next block of a prompt if decoding runs may share its pass, else None.

    Engines that do not compute a token alike in all calls read blocks as they would be read alone, and so is what
    needs statistics, a single token, and what is read again.
    """
    if not decoder.calls_alike or not run.num_left or run.token_ids or run.request.plan.needs_statistic:
        return None
    block_ids = run.request.token_ids[run.num_read : _cut(*_whole_block(run, decoder), limit)]
    return Block(run=run, token_ids=block_ids) if len(block_ids) > 1 else None


def read_beside(
    block: Block, decoder: Decoder, sequences: Sequence[int], token_ids: Sequence[int], *, greedy: bool
) -> tuple[Logits | None, Logits]:
    """Read a block by `block_beside` in the pass that decodes a token of each of other runs.

    The weights of `reader(block.run)` are in use.

    Args:
        greedy: of all these runs only the likeliest tokens matter.

    Returns:
        The logits for the prompt's first token, None as long as some of it is left; and (runs, vocab) those of others.
    """
    run = block.run
    assert run.sequence is not None
    decoder.select(run.sequence)
    _prepare_pack(run, decoder)
    is_last = len(block.token_ids) == run.num_left
    logits = decoder.forward_beside(block.token_ids, sequences, token_ids, last_logits=is_last, greedy=greedy)
    run.num_read += len(block.token_ids)
    if not is_last:
        return None, logits
    _end(run)
    first: Logits = logits[0]
    return first, logits[1:]


def reader(run: Run) -> FfnChoice:
    """The weights that read a run's prompt."""
    has_dense = run.loaded.bundle.dense is not None
    return prompt_choice(run.request.plan, run.path[0].cluster, run.options.prompt_ffn, has_dense=has_dense)


def _prepare_pack(run: Run, decoder: Decoder) -> None:
    if run.num_read == run.num_cached_tokens and run.request.plan.uses_pack:
        # The pack comes while the prompt is read; it may take the place of another generation's.
        decoder.prepare(FfnChoice(cluster=run.drift.cluster))


def _num_kept(run: Run, cached: CachedTokens, decoder: Decoder) -> int:
    request = run.request
    if request.keeps_decoded:
        return cached.num_common(request.token_ids)
    if request.plan.needs_statistic:
        # The prompt's own neurons are chosen by all of its tokens.
        return 0
    return cached.num_exact(request.token_ids, reader(run), decoder.block_tokens, alike=decoder.calls_alike)


def _read(run: Run, decoder: Decoder, limit: int | None) -> Logits:
    token_ids = run.request.token_ids
    start, end = _whole_block(run, decoder)
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


def _whole_block(run: Run, decoder: Decoder) -> tuple[int, int]:
    return next(blocks(run.num_read, len(run.request.token_ids), decoder.block_tokens))


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
    choice = decode_choice(request.plan, request.route, run.loaded.bundle, run.statistic, num_new_tokens)
    run.choice = decoding(run, choice)
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
        # Their logits are known already.
        decoder.forward_rows([run.sequence] * (end - start), token_ids[start:end], greedy=True)
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
    return decoding(run, FfnChoice(cluster=run.path[number].cluster)), min(begins[number + 1], end)
