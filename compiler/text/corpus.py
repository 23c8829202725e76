"""Calibration text: from files, from the Hub, or written by the model itself.

Needs neither torch nor a model: readers are processes of their own.
"""

import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from coreinfer.bundles.errors import CalibrationError
from coreinfer.bundles.shared.beginnings import text_spans
from coreinfer.compiler.checks import check_document_tokens
from coreinfer.compiler.config import BUILTIN, CompileConfig

from .reading import Shard, read_shard

__all__ = [
    "SAMPLING",
    "Corpus",
    "Document",
    "Found",
    "build_corpus",
    "first_documents",
    "read_documents",
    "split_into_documents",
    "split_point",
    "spread_sample",
]

SAMPLING = 3
"""Part of the keys of stages that run a sample; one more as soon as samples are other documents, or as many others."""
_log = logging.getLogger(__name__)
_MIN_DOCUMENT_TOKENS = 8
_HELD_OUT_EVERY = 10
_MIN_TEXTS = 5


@dataclass(frozen=True, kw_only=True)
class Document:
    """One piece of calibration text.

    Attributes:
        text: what its tokens say.
        routing_text: what the router would be given: the prompt where there is one, else the text.
        token_ids: as the model reads them.
        has_prompt: whether `routing_text` is a prompt rather than the text.
    """

    text: str
    routing_text: str
    token_ids: tuple[int, ...]
    has_prompt: bool = False


def split_point(num_tokens: int) -> int:
    """Tokens of a text that are read dense; the others are decoded narrow, in fitting as in measuring."""
    return num_tokens // 2


def spread_sample(documents: Sequence[Document], num_tokens: int) -> list[Document]:
    """Take evenly spread documents of about this many tokens together; all documents if there are fewer."""
    total = sum(len(document.token_ids) for document in documents)
    if total <= num_tokens:
        return list(documents)
    count = max(1, round(len(documents) * num_tokens / total))
    return [documents[index * len(documents) // count] for index in range(count)]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents in disjoint parts.

    Attributes:
        calibration: what moments and Gram matrices are made of.
        validation: what the ridge is chosen on; 10% of the documents.
        held_out: what quality is measured on, and nothing else; 10% of the documents.
        sha256: hash of all tokens and texts of these three.
        spare: what lies beyond the calibration tokens, shuffled; empty unless the options ask for healing.
    """

    calibration: tuple[Document, ...]
    validation: tuple[Document, ...]
    held_out: tuple[Document, ...]
    sha256: str
    spare: tuple[Document, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of the first three parts."""
        return sum(len(d.token_ids) for part in (self.calibration, self.validation, self.held_out) for d in part)


def build_corpus(
    config: CompileConfig,
    max_positions: int,
    read_given: Callable[[], list[Document]],
    write_builtin: Callable[[], list[Document]],
) -> Corpus:
    """Gather the documents, at most `calibration_tokens` tokens of them, and split them.

    Args:
        max_positions: that the model reads.
        read_given: returns the documents of all other sources; see `given_documents`.
        write_builtin: returns the documents of the builtin corpus; see `builtin_documents`.
    Raises:
        CalibrationError: a source cannot be read, or there is too little text.
        ConfigError: documents are longer than the model reads.
    """
    check_document_tokens(config, max_positions)
    documents = read_given()
    if BUILTIN in config.calibration:
        documents += write_builtin()
    taken, left = _take(documents, config)
    corpus = _split(taken, config.seed)
    _check_size(corpus, config)
    if not config.heals:
        return corpus
    used = {document.text for document in taken}
    return replace(corpus, spare=tuple(document for document in left if document.text not in used))


def _take(documents: Sequence[Document], config: CompileConfig) -> tuple[list[Document], list[Document]]:
    """Shuffle, and take documents until the token budget is spent; those taken, and what is left."""
    shuffled = list(documents)
    random.Random(config.seed).shuffle(shuffled)
    num_taken = len(first_documents(shuffled, config.calibration_tokens))
    return shuffled[:num_taken], shuffled[num_taken:]


def first_documents(documents: Sequence[Document], num_tokens: int) -> list[Document]:
    """Take documents from the front as long as they have no more than this many tokens together."""
    totals = accumulate(len(document.token_ids) for document in documents)
    return [document for document, total in zip(documents, totals, strict=True) if total <= num_tokens]


def _check_size(corpus: Corpus, config: CompileConfig) -> None:
    """Refuse a corpus that is too small to be clustered; texts that say the same count once."""
    documents = [*corpus.calibration, *corpus.validation, *corpus.held_out]
    num_texts = len({document.text for document in documents})
    if num_texts < _MIN_TEXTS:
        raise CalibrationError(
            f"--calibration {', '.join(config.calibration)}: {num_texts} different usable texts within "
            f"--calibration-tokens {config.calibration_tokens}, expected at least {_MIN_TEXTS}; give more text"
        )
    num_calibrated = len(corpus.calibration)
    if isinstance(config.clusters, int) and config.clusters > num_calibrated:
        raise CalibrationError(
            f"--clusters {config.clusters}: more than the {num_calibrated} texts that are calibrated on "
            f"({len(documents)} in all); ask for fewer clusters or give more text"
        )


def _split(documents: Sequence[Document], seed: int) -> Corpus:
    """Split shuffled documents 8 : 1 : 1; equal texts always fall into the same part."""
    parts: tuple[list[Document], list[Document], list[Document]] = ([], [], [])
    part_of_text: dict[str, int] = {}
    for index, document in enumerate(documents):
        # 0: calibration, 1: validation, 2: held out
        by_position = {0: 2, 5: 1}.get(index % _HELD_OUT_EVERY, 0)
        parts[part_of_text.setdefault(document.text, by_position)].append(document)
    digest = hashlib.sha256(json.dumps(seed).encode())
    for part in parts:
        for document in part:
            digest.update(json.dumps([document.text, document.routing_text, document.token_ids]).encode())
    calibration, validation, held_out = (tuple(part) for part in parts)
    return Corpus(calibration=calibration, validation=validation, held_out=held_out, sha256=digest.hexdigest())


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a shard holds.

    Attributes:
        num_texts: of which tiny ones make no document.
    """

    shard: Shard
    num_texts: int
    documents: tuple[Document, ...]


def read_documents(shard: Shard, tokenizer: Any, text_field: str, num_tokens: int) -> Found:
    """Read and tokenize a shard; see `read_texts` and `split_into_documents`.

    Raises:
        CalibrationError: it cannot be read.
    """
    texts = read_shard(shard, text_field)
    documents = split_into_documents(texts, tokenizer, num_tokens)
    return Found(shard=shard, num_texts=len(texts), documents=tuple(documents))


def split_into_documents(texts: Iterable[str], tokenizer: Any, num_tokens: int) -> list[Document]:
    """Tokenize texts and cut them into documents of at most `num_tokens` tokens; tiny ones are left out.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
    """
    documents = []
    for text in texts:
        all_ids, spans = text_spans(tokenizer, text)
        for start in range(0, len(all_ids), num_tokens):
            ids = tuple(all_ids[start : start + num_tokens])
            offsets = [span for span in spans[start : start + num_tokens] if span[1] > span[0]]
            if len(ids) < _MIN_DOCUMENT_TOKENS or not offsets:
                continue
            piece = text[offsets[0][0] : offsets[-1][1]]
            documents.append(Document(text=piece, routing_text=piece, token_ids=ids))
    return documents
