"""From logits to a token that is handed to the waiting thread."""

import logging
import time

import numpy as np
from coreinfer.runtime.decoding.choosing import Chosen
from coreinfer.runtime.engines.protocol import FfnChoice
from coreinfer.runtime.generation import BytesRead, DiskReads, FinishReason, Token

from .run import Row, Run, decoding, path_step

__all__ = ["post_token"]

_log = logging.getLogger(__name__)


def post_token(run: Run, row: Row) -> int:
    """Choose a token, hand it over, and check for drift; returns its id."""
    chosen = run.chooser.choose(row.logits, row.draft)
    if run.lengths and row.draft:
        run.lengths.note_choice(accepted=chosen.token_id == row.draft.token_id)
    run.token_ids.append(chosen.token_id)
    piece, reason = _advance(run, chosen.token_id, is_last=len(run.token_ids) == run.max_tokens)
    if reason is None and run.options.cancel is not None and run.options.cancel.is_set():
        piece, reason = piece + run.text.flush(), "cancelled"
    token = _token(run, chosen, piece, reason)
    run.give(token)
    if reason is None:
        _follow_drift(run)
    return chosen.token_id


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


def _follow_drift(run: Run) -> None:
    """Route the last stretch of text again where one ends, and swap packs where the text has moved on for good."""
    stretch = run.drift.stretch(run.token_ids)
    if not stretch:
        return
    distances = run.loaded.router.distances(run.loaded.prompts.decode(stretch))
    if run.drift.swaps(distances):
        cluster = run.drift.cluster
        step = path_step(run.loaded, cluster, first_token=len(run.token_ids) + 1, distance=float(distances[cluster]))
        run.path = (*run.path, step)
        run.choice = decoding(run, FfnChoice(cluster=cluster))
    elif run.drift.candidate is not None:
        # Its pack comes while the one in use decodes, in case that the next stretch swaps to it.
        run.loaded.decoder.prepare(FfnChoice(cluster=run.drift.candidate))


def _disk_reads(run: Run) -> DiskReads | None:
    if run.reads_before is None:
        return None
    reads = run.loaded.decoder.disk_reads
    return None if reads is None else reads.since(run.reads_before)


def _bytes_read(run: Run) -> BytesRead | None:
    if not run.weight_bytes:
        return None
    found = np.array(run.weight_bytes)
    return BytesRead(
        mean=round(float(found.mean())), p95=int(np.percentile(found, 95, method="higher")), num_tokens=len(found)
    )


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
        decode_seconds=0.0 if run.decode_start is None else time.perf_counter() - run.decode_start,
        logprob=chosen.logprob,
        top_logprobs=chosen.top_logprobs,
        drafting=run.lengths.report() if run.lengths else None,
        disk_reads=_disk_reads(run),
        token_share=run.choice.token_share,
        bytes_read=None if reason is None else _bytes_read(run),
        finish_reason=reason,
    )
