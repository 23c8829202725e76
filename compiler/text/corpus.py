"""Calibration text: from files, from the Hub, or written by the model itself."""

import hashlib
import json
import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from coreinfer.bundles.errors import CalibrationError, ConfigError
from coreinfer.bundles.shared.beginnings import text_spans
from coreinfer.bundles.shared.text_files import check_text, read_records, read_text
from coreinfer.compiler.cache import Cache, stage_key
from coreinfer.compiler.config import BUILTIN, CompileConfig
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.progress import Progress

from .builtin import continue_seeds, load_seeds

__all__ = [
    "SAMPLING",
    "Corpus",
    "Document",
    "build_corpus",
    "first_documents",
    "read_texts",
    "split_into_documents",
    "split_point",
    "spread_sample",
    "text_sources",
]

SAMPLING = 2
"""Part of the keys of stages that run a sample; one more as soon as `spread_sample` takes other documents."""
_log = logging.getLogger(__name__)
_MIN_DOCUMENT_TOKENS = 8
_HELD_OUT_EVERY = 10
_MIN_TEXTS = 5
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_SUFFIXES = (*_JSON_SUFFIXES, ".parquet", ".txt", ".md")
"""Of the files that a folder is read for."""


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
    config: CompileConfig, loaded: LoadedModel, cache: Cache, model_key: str, progress: Progress
) -> Corpus:
    """Gather the documents, at most `calibration_tokens` tokens of them, and split them.

    Raises:
        CalibrationError: a source cannot be read, or there is too little text.
        ConfigError: documents are longer than the model reads.
    """
    if config.document_tokens > loaded.record.max_positions:
        raise ConfigError(
            f"--document-tokens {config.document_tokens}: the model reads {loaded.record.max_positions} at most; "
            "give fewer"
        )
    documents: list[Document] = []
    files = [source for source in config.calibration if source != BUILTIN]
    if files:
        texts = read_texts(files, config.text_field)
        with progress.stage("corpus", len(texts)) as advance:
            for text in texts:
                documents += split_into_documents([text], loaded.tokenizer, config.document_tokens)
                advance()
    if BUILTIN in config.calibration:
        documents += _builtin(config, loaded, cache, model_key, progress)
    taken, left = _take(documents, config)
    corpus = _split(taken, config.seed)
    _check_size(corpus, config)
    if not config.heals:
        return corpus
    used = {document.text for document in taken}
    return replace(corpus, spare=tuple(document for document in left if document.text not in used))


def _builtin(
    config: CompileConfig, loaded: LoadedModel, cache: Cache, model_key: str, progress: Progress
) -> list[Document]:
    """Let the model continue the seed prompts; the slowest part of a small compile, so it is cached."""
    key = stage_key(
        "builtin",
        model=model_key,
        tokens=config.calibration_tokens,
        longest=config.document_tokens,
        seed=config.seed,
        dtype=str(loaded.dtype),
        # The same file, read as another model than before, gives other results.
        config=loaded.record.config,
        device=str(loaded.device),
        prompts=[seed.prompt for seed in load_seeds()],
    )

    def compute() -> list[dict[str, Any]]:
        return [
            {"text": text, "routing_text": prompt, "token_ids": list(token_ids), "has_prompt": True}
            for prompt, text, token_ids in continue_seeds(config, loaded, progress)
        ]

    return [Document(**{**item, "token_ids": tuple(item["token_ids"])}) for item in cache.json(key, compute)]


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


def split_into_documents(texts: Iterable[str], tokenizer: Any, num_tokens: int) -> list[Document]:
    """Tokenize texts and cut them into documents of at most `num_tokens` tokens; tiny ones are left out."""
    documents = []
    for text in texts:
        all_ids, spans = text_spans(tokenizer.backend_tokenizer, text)
        for start in range(0, len(all_ids), num_tokens):
            ids = tuple(all_ids[start : start + num_tokens])
            offsets = [span for span in spans[start : start + num_tokens] if span[1] > span[0]]
            if len(ids) < _MIN_DOCUMENT_TOKENS or not offsets:
                continue
            piece = text[offsets[0][0] : offsets[-1][1]]
            documents.append(Document(text=piece, routing_text=piece, token_ids=ids))
    return documents


def read_texts(sources: Sequence[str], text_field: str) -> list[str]:
    """Read the texts of files and Hub data sets; blank ones are left out.

    Args:
        sources: paths of .jsonl/.json, .parquet or text files (blank lines part texts), of folders that hold some, or
            hf:NAME[:split[:field]].
        text_field: field that holds the text.
    Raises:
        CalibrationError: a source is missing, cannot be parsed, or holds no text.
    """
    texts: list[str] = []
    for source in text_sources(sources):
        found = [text.strip() for text in _read_source(source, text_field) if text.strip()]
        if not found:
            raise CalibrationError(f"--calibration {source}: holds no text; give a file with text")
        texts += found
    return texts


def text_sources(sources: Sequence[str]) -> list[str]:
    """Put the files of text that a folder holds, by name, in the place of the folder.

    Raises:
        CalibrationError: a path is missing, or a folder holds no such file.
    """
    return [found for source in sources for found in _files_of(source)]


def _files_of(source: str) -> list[str]:
    path = Path(source).expanduser()
    if source == BUILTIN or source.startswith("hf:") or path.is_file():
        return [source]
    if not path.is_dir():
        raise CalibrationError(
            f"--calibration {source}: no such file; give builtin, a file, a folder or hf:NAME[:split[:field]]"
        )
    files = sorted(str(file) for file in path.iterdir() if file.suffix.lower() in _SUFFIXES and file.is_file())
    if not files:
        raise CalibrationError(f"--calibration {source}: expected files of {', '.join(_SUFFIXES)} in it, found none")
    return files


def _read_source(source: str, text_field: str) -> Iterable[str]:
    if source.startswith("hf:"):
        return _read_hub(source, text_field)
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    try:
        if suffix in _JSON_SUFFIXES:
            return [_text_of(value, where, text_field) for where, value in read_records(path)]
        if suffix == ".parquet":
            return _read_parquet(path, text_field)
        return read_text(path).split("\n\n")
    except OSError as error:
        raise CalibrationError(f"--calibration {source}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise CalibrationError(f"--calibration {source}: {error}") from error


def _text_of(record: Any, where: str, text_field: str) -> str:
    """Take the text out of a record.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(record, dict) or text_field not in record:
        got = f"fields {', '.join(record)}" if isinstance(record, dict) else _kind(record)
        raise ValueError(f"{where}: expected text in field {text_field!r}, got {got}; name the field with --text-field")
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: expected text in field {text_field!r}, got {_kind(text)}; take the record out")
    try:
        check_text(text)
    except ValueError as error:
        raise ValueError(f"{where}: field {text_field!r}: {error}") from error
    return text


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names: dict[type, str] = {dict: "an object", list: "an array", str: "text"}
    return names.get(type(value), "a number")


def _read_parquet(path: Path, text_field: str) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise CalibrationError(
                    f"--calibration {path}: has no column {text_field!r}, only {', '.join(names)}; "
                    "name it with --text-field"
                )
            table = file.read(columns=[text_field])
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CalibrationError(f"--calibration {path}: cannot be read as Parquet ({reason})") from error
    return [text for text in table.column(text_field).to_pylist() if isinstance(text, str)]


def _read_hub(source: str, text_field: str) -> list[str]:
    name, _, rest = source.removeprefix("hf:").partition(":")
    split, _, field = rest.partition(":")
    try:
        import datasets

        rows = datasets.load_dataset(name, split=split or "train")
        return [text for text in rows[field or text_field] if isinstance(text, str)]
    except ImportError as error:
        raise CalibrationError(f"--calibration {source}: needs the package datasets; pip install datasets") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CalibrationError(f"--calibration {source}: the data set cannot be loaded ({reason})") from error
