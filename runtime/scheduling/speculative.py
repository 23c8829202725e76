"""Lossless decoding: a pack drafts, the dense FFN verifies several tokens in one pass over its weights."""

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from coreinfer.runtime.decoding.drafting import DraftLength
from coreinfer.runtime.decoding.sampling import Draft
from coreinfer.runtime.engines.protocol import DENSE, Decoder, FfnChoice

from .ffn_switch import FfnSwitch
from .run import Row

__all__ = ["draft_round"]

Logits = npt.NDArray[np.float32]
Propose = Callable[[Logits, list[int]], Draft]


def draft_round(
    decoder: Decoder,
    switch: FfnSwitch,
    token_id: int,
    *,
    length: int,
    pack: FfnChoice,
    propose: Propose,
    lengths: DraftLength,
    greedy: bool,
) -> list[Row]:
    """Draft tokens after one that was chosen, and verify them, on the selected sequence.

    All keys and values that are left in the KV cache are the dense model's: those of drafts are overwritten by the
    verification. A caller that chooses another token than a draft must drop what follows it.

    Args:
        token_id: the last token, which is not in the KV cache yet.
        length: tokens to draft.
        pack: the weights that draft.
        propose: (logits, tokens drafted before) -> a draft.
        lengths: records how long it took.
        greedy: only the likeliest token matters, so that logits of others may be approximate.
    Returns:
        A row for each draft, and one more.
    """
    start, begin = decoder.num_cached, time.perf_counter()
    switch.use(pack)
    drafts = _draft(decoder, token_id, length, propose, greedy=greedy)
    drafted = time.perf_counter()
    switch.use(DENSE)
    decoder.truncate(start)
    token_ids = [token_id, *(draft.token_id for draft in drafts)]
    logits = decoder.forward_rows([decoder.sequence] * len(token_ids), token_ids, greedy=greedy)
    lengths.note_round(length, drafted - begin, time.perf_counter() - drafted)
    return [Row(logits=row, draft=draft) for row, draft in zip(logits, [*drafts, None], strict=True)]


def _draft(decoder: Decoder, token_id: int, length: int, propose: Propose, *, greedy: bool) -> list[Draft]:
    """Let the pack decode ahead; what it puts into the KV cache is scratch."""
    drafts: list[Draft] = []
    for _ in range(length):
        logits = decoder.forward([token_id], greedy=greedy)
        drafts.append(propose(logits[-1], [draft.token_id for draft in drafts]))
        token_id = drafts[-1].token_id
    return drafts
