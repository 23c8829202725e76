"""Lossless decoding: a pack drafts, the dense FFN verifies several tokens in one pass over its weights."""

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .decoder import DENSE, Decoder, FfnChoice
from .drafting import DraftLength
from .sampling import Draft

__all__ = ["Row", "lossless_rows"]

Logits = npt.NDArray[np.float32]
Propose = Callable[[Logits, list[int]], Draft]


@dataclass(frozen=True, kw_only=True)
class Row:
    """The dense model's logits where a token is to be chosen, and what the pack proposes there.

    Attributes:
        logits: (vocab,) float32.
        draft: None where nothing was drafted.
    """

    logits: Logits
    draft: Draft | None = None


def lossless_rows(
    decoder: Decoder,
    first: Logits,
    *,
    pack: Callable[[], FfnChoice],
    propose: Propose,
    lengths: DraftLength,
    num_tokens: int,
    greedy: bool,
) -> Generator[Row, int, None]:
    """Give the dense model's logits for one token after another.

    All keys and values that stay in the KV cache are the dense model's: those of drafts are overwritten by the
    verification, and what lies behind the last token that was sent is dropped.

    Args:
        decoder: the prompt was read, with the dense FFN.
        first: (vocab,) the prompt's logits.
        pack: the weights that draft, asked for before each draft.
        propose: (logits, tokens drafted before) -> a draft.
        num_tokens: no more will be asked for, and the KV cache has room for one less.
        greedy: only the likeliest token matters, so that logits of others may be approximate.
    Yields:
        A row; the token that was chosen there is to be sent.
    """
    decoder.use(DENSE)
    token_id = yield Row(logits=first)
    num_left = num_tokens - 1
    while True:
        # A round gives one token more than are accepted.
        length = lengths.next(num_left - 1)
        if length < 1:
            token_id = yield _decode_plainly(decoder, token_id, lengths, greedy=greedy)
            num_left -= 1
            continue
        start, begin = decoder.num_cached, time.perf_counter()
        drafts = _draft(decoder, token_id, length, pack(), propose, greedy=greedy)
        drafted = time.perf_counter()
        rows = _verify(decoder, start, [token_id, *(draft.token_id for draft in drafts)])
        lengths.note_round(length, drafted - begin, time.perf_counter() - drafted)
        sent = yield from _offer(decoder, start, rows, drafts)
        token_id = sent[-1]
        num_left -= len(sent)


def _decode_plainly(decoder: Decoder, token_id: int, lengths: DraftLength, *, greedy: bool) -> Row:
    begin = time.perf_counter()
    logits = decoder.forward([token_id], greedy=greedy)
    lengths.note_plain(time.perf_counter() - begin)
    return Row(logits=logits[-1])


def _draft(
    decoder: Decoder, token_id: int, length: int, pack: FfnChoice, propose: Propose, *, greedy: bool
) -> list[Draft]:
    """Let the pack decode ahead; what it puts into the KV cache is scratch."""
    decoder.use(pack)
    drafts: list[Draft] = []
    for _ in range(length):
        logits = decoder.forward([token_id], greedy=greedy)
        drafts.append(propose(logits[-1], [draft.token_id for draft in drafts]))
        token_id = drafts[-1].token_id
    decoder.use(DENSE)
    return drafts


def _verify(decoder: Decoder, start: int, token_ids: list[int]) -> Logits:
    """Read tokens again with the dense FFN: (tokens, vocab)."""
    decoder.truncate(start)
    return decoder.forward_rows([decoder.sequence] * len(token_ids), token_ids)


def _offer(decoder: Decoder, start: int, rows: Logits, drafts: list[Draft]) -> Generator[Row, int, list[int]]:
    """Give one row after another until another token than the draft is sent; returns what was sent."""
    sent: list[int] = []
    try:
        for logits, draft in zip(rows, [*drafts, None], strict=True):
            sent.append((yield Row(logits=logits, draft=draft)))
            if draft is None or sent[-1] != draft.token_id:
                # This one is not in the cache yet.
                return sent
        raise AssertionError("the last row has no draft")
    finally:
        num_accepted = sum(token == draft.token_id for token, draft in zip(sent, drafts, strict=False))
        decoder.truncate(start + 1 + num_accepted)
