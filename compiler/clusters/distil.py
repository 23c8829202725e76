"""Stage `distil`: the sentence encoder as a table of token vectors, by what model2vec does.

Each token alone is embedded by the encoder; then principal components, and weights by how common the token is. Tokens
are embedded in batches that are the same whoever embeds them, so that the table is too.
"""

import copy
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.shared.machine import bf16_products_are_faster
from coreinfer.compiler.cache import Cache, stage_key
from coreinfer.compiler.models.quiet import quiet_transformers
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.team.team import Team, Worker
from model2vec.distill.inference import apply_pca, compute_weights, create_embeddings
from model2vec.tokenizer import clean_and_create_vocabulary, turn_tokens_into_ids
from sentence_transformers import SentenceTransformer
from skeletoken import TokenizerModel
from skeletoken.external.transformers import reshape_embeddings

from .embed import ENCODER, Encoder, StaticEncoder

__all__ = ["TOKENS", "distill_encoder"]

TOKENS = "tokens of the encoder"
"""Slot of a worker's encoder of single tokens."""

Floats = npt.NDArray[np.float32]
_STAGE = "distil"
_TABLE_DIMENSION = 256
_BATCH_TOKENS = 256
# As `distill_from_model` has them.
_LEFT_OUT = re.compile(r"\[unused\d+\]")
_SIF = 1e-4


def distill_encoder(team: Team, encoder: Encoder, key: str, cache: Cache, progress: Progress) -> StaticEncoder:
    """Distil the sentence encoder into a token table: each token's own embedding, PCA, SIF weights.

    Args:
        encoder: loads the encoder, where it is used and the cache lacks the result.
    """
    distilled: list[tuple[npt.NDArray[np.float16], str]] = []

    def compute() -> tuple[npt.NDArray[np.float16], str]:
        if not distilled:
            with progress.stage(_STAGE, 1) as advance:
                parts = [
                    team.call(place, _STAGE, _embed_tokens, encoder, key, place, team.size)
                    for place in range(team.size)
                ]
                distilled.append(team.call(0, _STAGE, _table, encoder, key, *parts).result())
                advance()
        return distilled[0]

    table_key = stage_key(
        "distil", encoder=key, bf16=bf16_products_are_faster(), batches=_BATCH_TOKENS, attention="eager"
    )
    table = cache.arrays(table_key, lambda: {"table": compute()[0]})["table"]
    tokenizer_json = cache.json(stage_key("distil-tokenizer", encoder=key), lambda: compute()[1])
    return StaticEncoder(table=table, tokenizer_json=tokenizer_json)


@dataclass(frozen=True, kw_only=True)
class _Tokens:
    """Single tokens, and what embeds them.

    Attributes:
        body: the encoder without its head; its own token ids.
        token_ids: of each row of the table, as the encoder reads it alone.
        order: (tokens,) rows of the table by the length of these, so that little of a batch is padding.
        tokenizer: whose ids are the rows.
    """

    body: Any
    device: str
    token_ids: Sequence[Sequence[int]]
    order: npt.NDArray[np.int64]
    pad_token_id: int
    tokenizer: TokenizerModel
    dimension: int

    def batches(self, first: int, step: int) -> Iterator[npt.NDArray[np.int64]]:
        """Rows of every n-th batch."""
        for start in range(first * _BATCH_TOKENS, len(self.order), step * _BATCH_TOKENS):
            yield self.order[start : start + _BATCH_TOKENS]


def _tokens_of(worker: Worker, encoder: Encoder, key: str) -> _Tokens:
    def make() -> _Tokens:
        model: Any = worker.recall(ENCODER, key, encoder)
        original = TokenizerModel.from_transformers_tokenizer(model.tokenizer).prune_added_tokens()
        tokenizer = original.deep_copy()
        if tokenizer.adds_prefix_space is not None:
            tokenizer.adds_prefix_space = True
        tokenizer = clean_and_create_vocabulary(tokenizer, [], token_remove_regex=_LEFT_OUT)
        token_ids = turn_tokens_into_ids(tokenizer.sorted_vocabulary, original)
        return _Tokens(
            body=reshape_embeddings(_quick(model), original),
            device=str(model.device),
            token_ids=token_ids,
            order=np.argsort([len(ids) for ids in token_ids], kind="stable"),
            pad_token_id=original.pad_token_id or 0,
            tokenizer=tokenizer,
            dimension=min(_TABLE_DIMENSION, int(model.encode(["dimension"], show_progress_bar=False).shape[1])),
        )

    return worker.recall(TOKENS, key, make)


def _embed_tokens(worker: Worker, encoder: Encoder, key: str, first: int, step: int) -> list[Floats]:
    """Embed every n-th batch of tokens: (tokens, width of the encoder) each."""
    with _quiet_bars():
        own = _tokens_of(worker, encoder, key)
        return [
            create_embeddings(own.body, [list(own.token_ids[row]) for row in rows], own.device, own.pad_token_id)
            for rows in own.batches(first, step)
        ]


def _table(worker: Worker, encoder: Encoder, key: str, *parts: Sequence[Floats]) -> tuple[npt.NDArray[np.float16], str]:
    """The table, and the tokenizer whose ids are its rows.

    Args:
        parts: of each place, its batches.
    """
    with _quiet_bars():
        own = _tokens_of(worker, encoder, key)
        embeddings = np.empty((len(own.order), parts[0][0].shape[1]), dtype=np.float32)
        for first, part in enumerate(parts):
            for rows, batch in zip(own.batches(first, len(parts)), part, strict=True):
                embeddings[rows] = batch
        weighted = apply_pca(embeddings, own.dimension) * compute_weights(len(embeddings), _SIF)[:, None]
        tokenizer = own.tokenizer.to_tokenizer()
    # What is embedded is cut by characters only, see `routing_excerpt`, and never padded.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return weighted.astype(np.float16), str(tokenizer.to_str())


def _quick(model: SentenceTransformer) -> Any:
    """Copy the encoder's body, in bfloat16 where that is faster: the table is rounded to float16 anyway.

    Of three tokens, plain products are what is fastest for attention.
    """
    body = copy.deepcopy(model[0].auto_model)
    body.set_attn_implementation("eager")
    return body.to(torch.bfloat16) if model.device.type == "cpu" and bf16_products_are_faster() else body


@contextmanager
def _quiet_bars() -> Iterator[None]:
    """Drop what model2vec draws on stderr; tqdm takes the stream that is there when a bar starts."""
    with quiet_transformers(), redirect_stderr(io.StringIO()):
        yield
