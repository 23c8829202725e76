"""Calibration text that is read: files, folders of them, here or elsewhere, and data sets of the Hub.

Needs neither torch nor a model.
"""

import glob
import json
import random
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coreinfer.bundles.errors import CalibrationError
from coreinfer.bundles.shared.text_files import check_text, decode_text, parse_records
from coreinfer.compiler.config import BUILTIN
from coreinfer.compiler.storage import address_of, find_storage, storage_errors

__all__ = [
    "Shard",
    "check_elsewhere",
    "is_elsewhere",
    "is_local",
    "no_text",
    "read_order",
    "read_shard",
    "read_texts",
    "shards_of",
    "text_sources",
]

_OPTION = "--calibration"
_HUB = "hf:"
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_SUFFIXES = (*_JSON_SUFFIXES, ".parquet", ".txt", ".md")
"""Of the files that a folder is read for."""
_MAGIC = frozenset("*?[")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Part of a source.

    Attributes:
        source: as `text_sources` returns it.
        row_group: of a Parquet file; None for the whole source.
    """

    source: str
    row_group: int | None = None


def read_texts(sources: Sequence[str], text_field: str) -> list[str]:
    """Read the texts of files and Hub data sets; blank ones are left out.

    Args:
        sources: paths of .jsonl/.json, .parquet or text files (blank lines part texts), of folders that hold some,
            patterns of paths, addresses of all these that fsspec reads, or hf:NAME[:split[:field]].
        text_field: field that holds the text.
    Raises:
        CalibrationError: a source is missing, cannot be parsed, or holds no text.
        ConfigError: a package that reads an address is not installed.
    """
    texts: list[str] = []
    for source in text_sources(sources):
        found = read_shard(Shard(source=source), text_field)
        if not found:
            raise no_text(source)
        texts += found
    return texts


def no_text(source: str) -> CalibrationError:
    """What a source is refused with where nothing was found in it."""
    return CalibrationError(f"{_OPTION} {source}: holds no text; give a file with text")


def read_shard(shard: Shard, text_field: str) -> list[str]:
    """Read the texts of a shard that are not blank; see `read_texts`."""
    return [text.strip() for text in _read(shard, text_field) if text.strip()]


def text_sources(sources: Sequence[str]) -> list[str]:
    """Put the files of text that a folder holds, or that a pattern finds, by name, in its place.

    Raises:
        CalibrationError: a path is missing, or a folder holds no such file.
    """
    return [found for source in sources for found in _files_of(source)]


def is_local(source: str) -> bool:
    """Whether a source is a file of this machine: not the builtin corpus, a data set of the Hub, or elsewhere."""
    return source != BUILTIN and not source.startswith(_HUB) and address_of(source) is None


def is_elsewhere(source: str) -> bool:
    """Whether a source is a file at an address."""
    return not source.startswith(_HUB) and address_of(source) is not None


def read_order(sources: Sequence[str], seed: int) -> list[str]:
    """Draw the order in which files at addresses are read: as far as enough text takes, which may not be to the end."""
    files = [source for source in sources if is_elsewhere(source)]
    random.Random(seed).shuffle(files)
    return files


def shards_of(source: str, text_field: str) -> list[Shard]:
    """Part a file at an address: Parquet by its row groups.

    Raises:
        CalibrationError: it cannot be read, or lacks the field.
    """
    if not source.lower().endswith(".parquet"):
        return [Shard(source=source)]
    with ExitStack() as stack:
        num_groups = _open_parquet(source, text_field, stack).num_row_groups
    return [Shard(source=source, row_group=group) for group in range(num_groups)]


def check_elsewhere(source: str, text_field: str) -> None:
    """Check what can be known of a file at an address without reading all of it: of Parquet, its columns.

    Raises:
        CalibrationError: it cannot be read, or lacks the field.
    """
    shards_of(source, text_field)


def _files_of(source: str) -> list[str]:
    if is_elsewhere(source):
        return _files_elsewhere(source)
    path = Path(source).expanduser()
    if not is_local(source) or path.is_file():
        return [source]
    if path.is_dir():
        return _some_files(source, sorted(str(file) for file in path.iterdir() if file.is_file()))
    if _MAGIC & {*source}:
        return _some_files(source, sorted(file for file in glob.glob(str(path)) if Path(file).is_file()))
    raise CalibrationError(
        f"{_OPTION} {source}: no such file; give builtin, a file, a folder or hf:NAME[:split[:field]]"
    )


def _files_elsewhere(source: str) -> list[str]:
    address = address_of(source)
    assert address is not None
    files, path = find_storage(_OPTION, address)
    with storage_errors(lambda reason: _unreadable(source, reason)):
        if _MAGIC & {*path}:
            found = files.glob(path)
        elif files.isfile(path):
            return [str(files.unstrip_protocol(path))]
        else:
            found = [item["name"] for item in files.ls(path, detail=True) if item["type"] == "file"]
    return _some_files(source, sorted(str(files.unstrip_protocol(name)) for name in found))


def _some_files(source: str, found: Sequence[str]) -> list[str]:
    """Of the files in a folder those that hold text."""
    texts = [name for name in found if name.lower().endswith(_SUFFIXES)]
    if not texts:
        raise CalibrationError(f"{_OPTION} {source}: expected files of {', '.join(_SUFFIXES)} in it, found none")
    return texts


def _unreadable(source: str, reason: str) -> CalibrationError:
    return CalibrationError(f"{_OPTION} {source}: cannot be read ({reason})")


def _read(shard: Shard, text_field: str) -> Iterable[str]:
    source = shard.source
    if source.startswith(_HUB):
        return _read_hub(source, text_field)
    if source.lower().endswith(".parquet"):
        return _read_parquet(shard, text_field)
    data = _bytes_of(source)
    try:
        text = decode_text(data)
        if source.lower().endswith(_JSON_SUFFIXES):
            return [_text_of(value, where, text_field) for where, value in parse_records(text)]
        return text.split("\n\n")
    except ValueError as error:
        raise CalibrationError(f"{_OPTION} {source}: {error}") from error


def _bytes_of(source: str) -> bytes:
    if (address := address_of(source)) is not None:
        files, path = find_storage(_OPTION, address)
        with storage_errors(lambda reason: _unreadable(source, reason)):
            return bytes(files.cat_file(path))
    try:
        return Path(source).expanduser().read_bytes()
    except OSError as error:
        raise _unreadable(source, error.strerror or str(error)) from error


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


def _read_parquet(shard: Shard, text_field: str) -> list[str]:
    import pyarrow

    with ExitStack() as stack:
        file = _open_parquet(shard.source, text_field, stack)
        try:
            if shard.row_group is None:
                table = file.read(columns=[text_field])
            else:
                table = file.read_row_group(shard.row_group, columns=[text_field])
        except (pyarrow.ArrowException, OSError) as error:
            raise _no_parquet(shard.source, error) from error
    return [text for text in table.column(text_field).to_pylist() if isinstance(text, str)]


def _open_parquet(source: str, text_field: str, stack: ExitStack) -> Any:
    """Open a Parquet file, of which only what is asked for is read, until the stack ends."""
    import pyarrow
    import pyarrow.parquet

    try:
        if (address := address_of(source)) is None:
            place: Any = Path(source).expanduser()
        else:
            files, path = find_storage(_OPTION, address)
            with storage_errors(lambda reason: _unreadable(source, reason)):
                place = stack.enter_context(files.open(path, "rb"))
        file = stack.enter_context(pyarrow.parquet.ParquetFile(place))
    except (pyarrow.ArrowException, OSError) as error:
        raise _no_parquet(source, error) from error
    names = file.schema_arrow.names
    if text_field not in names:
        raise CalibrationError(
            f"{_OPTION} {source}: has no column {text_field!r}, only {', '.join(names)}; name it with --text-field"
        )
    return file


def _no_parquet(source: str, error: Exception) -> CalibrationError:
    reason = str(error).strip().split("\n")[0]
    return CalibrationError(f"{_OPTION} {source}: cannot be read as Parquet ({reason})")


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
