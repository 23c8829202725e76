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
        # A round gives at least one token and at most one more than were drafted.
        length = lengths.next(num_left - 1)
        if length < 1:
            token_id = yield _plain(decoder, token_id, lengths, greedy=greedy)
            num_left -= 1
            continue
        start = decoder.num_cached
        drafts, draft_seconds = _draft(decoder, token_id, length, pack(), propose)
        rows, verify_seconds = _verify(decoder, start, [token_id, *(draft.token_id for draft in drafts)])
        lengths.note_round(length, draft_seconds, verify_seconds)
        num_sent = yield from _offer(rows, drafts, lengths)
        token_id = num_sent[-1]
        num_left -= len(num_sent)
        decoder.truncate(start + len(num_sent))
