"""Calibration text that is read: files, folders of them, and data sets of the Hub. Needs neither torch nor a model."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from coreinfer.bundles.errors import CalibrationError
from coreinfer.bundles.shared.text_files import check_text, read_records, read_text
from coreinfer.compiler.config import BUILTIN

__all__ = ["is_local", "read_texts", "text_sources"]

_HUB = "hf:"
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_SUFFIXES = (*_JSON_SUFFIXES, ".parquet", ".txt", ".md")
"""Of the files that a folder is read for."""


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


def is_local(source: str) -> bool:
    """Whether a source is a file, rather than the builtin corpus or a data set of the Hub."""
    return source != BUILTIN and not source.startswith(_HUB)


def _files_of(source: str) -> list[str]:
    path = Path(source).expanduser()
    if not is_local(source) or path.is_file():
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
    if source.startswith(_HUB):
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
    name, _, rest = source.removeprefix(_HUB).partition(":")
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
