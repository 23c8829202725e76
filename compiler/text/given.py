"""Texts that are given, as documents; what lies at addresses is read and tokenized by the team, shard by shard.

Files of this machine and data sets of the Hub, which other machines may lack, are read here.
"""

from coreinfer.compiler.config import BUILTIN, CompileConfig
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.team.alone import Alone
from coreinfer.compiler.team.dealing import home, in_turn
from coreinfer.compiler.team.team import Pending, Team, Worker

from .corpus import Document, split_into_documents
from .reading import Shard, is_elsewhere, no_text, read_shard, shards_of, text_sources

__all__ = ["given_documents"]

_STAGE = "corpus"
_Found = tuple[int, list[Document]]
"""How many texts a shard has, and their documents."""


def given_documents(config: CompileConfig, team: Team, progress: Progress) -> list[Document]:
    """Read and tokenize all sources but the builtin corpus, in their order, whoever reads them.

    Raises:
        CalibrationError: a source is missing, cannot be parsed, or holds no text.
    """
    sources = text_sources([source for source in config.calibration if source != BUILTIN])
    shards = [shard for source in sources for shard in _shards(source, config.text_field)]
    num_texts, documents = dict.fromkeys(sources, 0), list[Document]()
    if not shards:
        return documents
    here = Alone(team.loaded)

    def ask(numbered: tuple[int, Shard]) -> Pending[_Found]:
        number, shard = numbered
        who: tuple[Team, int] = (team, home(team, number)) if is_elsewhere(shard.source) else (here, 0)
        return who[0].call(who[1], _STAGE, _read_documents, shard, config.text_field, config.document_tokens)

    with progress.stage(_STAGE, len(shards)) as advance:
        for (_, shard), asked in in_turn(team, enumerate(shards), ask):
            count, found = asked.result()
            num_texts[shard.source] += count
            documents += found
            advance()
    for source, count in num_texts.items():
        if not count:
            raise no_text(source)
    return documents


def _shards(source: str, text_field: str) -> list[Shard]:
    return shards_of(source, text_field) if is_elsewhere(source) else [Shard(source=source)]


def _read_documents(worker: Worker, shard: Shard, text_field: str, num_tokens: int) -> _Found:
    texts = read_shard(shard, text_field)
    return len(texts), split_into_documents(texts, worker.loaded.tokenizer, num_tokens)
