"""Texts that are given, as documents; what lies at addresses is read and tokenized by the team, shard by shard.

Files of this machine and data sets of the Hub, which other machines may lack, are read here.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing

from coreinfer.compiler.config import BUILTIN, CompileConfig
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.team.team import Team

from .corpus import Document, Found, read_documents
from .reading import Shard, is_elsewhere, no_text, read_order, shards_of, text_sources

__all__ = ["given_documents"]

_STAGE = "corpus"
_POOL_SIZE = 4
"""Times the calibration tokens, of which these are drawn."""
_LEAST_SHARDS = 16
"""Neighbours are alike: one file with enough text is not enough."""


def given_documents(config: CompileConfig, team: Team, progress: Progress) -> list[Document]:
    """Read and tokenize all sources but the builtin corpus, in their order, whoever reads them.

    Of many files at addresses no more are read than give enough text to draw from: files in an order that the seed
    draws, and each with all its shards, until there are `_POOL_SIZE` times the calibration tokens. Healing reads all.

    Raises:
        CalibrationError: a source is missing, cannot be parsed, or holds no text.
    """
    sources = text_sources([source for source in config.calibration if source != BUILTIN])
    if not sources:
        return []
    found, num_texts = list[Found](), Counter[str]()
    with progress.stage(_STAGE, len(sources)) as advance:
        for one in _read(config, team, sources):
            found.append(one)
            if one.shard.source not in num_texts:
                advance()
            num_texts[one.shard.source] += one.num_texts
    for source, count in num_texts.items():
        if not count:
            raise no_text(source)
    places = {source: place for place, source in enumerate(sources)}
    found.sort(key=lambda one: (places[one.shard.source], one.shard.row_group or 0))
    return [document for one in found for document in one.documents]


def _read(config: CompileConfig, team: Team, sources: Sequence[str]) -> Iterator[Found]:
    """Read the sources of this machine, and of the others enough."""
    how = (team.loaded.tokenizer.backend_tokenizer, config.text_field, config.document_tokens)
    for source in sources:
        if not is_elsewhere(source):
            yield read_documents(Shard(source=source), *how)
    files = read_order(sources, config.seed)
    shards = (shard for source in files for shard in shards_of(source, config.text_field))
    num_wanted, num_tokens = config.calibration_tokens * _POOL_SIZE, 0
    with closing(team.stream(read_documents, shards, *how)) as stream:
        for number, one in enumerate(stream, start=1):
            yield one
            num_tokens += sum(len(document.token_ids) for document in one.documents)
            # The last one has text, so that of no file too little was read to say that it has none.
            is_enough = number >= _LEAST_SHARDS and num_tokens >= num_wanted and one.documents
            if is_enough and not config.heals:
                return
