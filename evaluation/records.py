"""Read evaluation data: JSON Lines whose file name says what they are for."""

import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from coreinfer.bundles.errors import ConfigError, join_problems
from coreinfer.bundles.shared.text_files import check_text, read_records

__all__ = ["Dataset", "Item", "Kind", "read_datasets"]

Kind = Literal["text", "completion", "entities", "choice", "summarization", "translation", "prompt"]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing to score.

    Attributes:
        context: what the model is given; for texts, the text.
        answers: all right answers; of choices, the continuations to choose from.
        contexts: of choices, the context of each continuation.
        gold: of choices, the number of the right one.
    """

    context: str
    answers: tuple[str, ...] = ()
    contexts: tuple[str, ...] = ()
    gold: int = 0


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A file's items, all of one kind."""

    name: str
    kind: Kind
    items: tuple[Item, ...]


Reader = Callable[[Mapping[str, Any]], Item]


def _text(record: Mapping[str, Any]) -> Item:
    return Item(context=record["text"])


def _joined(record: Mapping[str, Any]) -> Item:
    """Any record that continues a context, as one text."""
    if "text" in record:
        return _text(record)
    return Item(context=f"{record['context']}{_gap(record)}{record['continuation']}")


def _gap(record: Mapping[str, Any]) -> str:
    """Programs continue where the context ends; other continuations are joined with a space."""
    return "" if "entry_point" in record else " "


def _completion(record: Mapping[str, Any]) -> Item:
    answers = [record["continuation"], *record.get("aliases", ())]
    return Item(context=record["context"], answers=tuple(dict.fromkeys(str(answer) for answer in answers)))


def _choice(record: Mapping[str, Any]) -> Item:
    if "context_options" in record:
        contexts = tuple(record["context_options"])
        answers = (f" {record['continuation']}",) * len(contexts)
    else:
        answers = tuple(f" {choice}" for choice in record["choices"])
        contexts = (record["query"],) * len(answers)
    gold = int(record["gold"])
    if not 0 <= gold < len(answers):
        raise ValueError(f"gold: expected 0 to {len(answers) - 1}, got {gold}")
    return Item(context=contexts[0], contexts=contexts, answers=answers, gold=gold)


def _summary(record: Mapping[str, Any]) -> Item:
    return Item(context=record["context"], answers=(record["summary"],))


def _prompt(record: Mapping[str, Any]) -> Item:
    return Item(context=record["prompt"])


# File name prefix -> kind and reader. Generated programs are not run, so those of code_* are scored as texts.
_READERS: dict[str, tuple[Kind, Reader]] = {
    "lm": ("text", _text),
    "code": ("text", _joined),
    "completion": ("completion", _completion),
    "ie": ("entities", _completion),
    "mc": ("choice", _choice),
    "summarization": ("summarization", _summary),
    "translation": ("translation", _completion),
    "prompts": ("prompt", _prompt),
}


def read_datasets(paths: Sequence[str], *, limit: int | None = None, as_text: bool = False) -> list[Dataset]:
    """Read files, folders of `.jsonl` files, and patterns.

    Args:
        limit: maximum number of items per file, evenly spread; None for all.
        as_text: score records with a context and a continuation as one text each; files without them are refused.
    Raises:
        ConfigError: a path matches nothing, a file's name or a line of it is not of a known kind. All are named.
    """
    datasets: list[Dataset] = []
    problems: list[str] = []
    for path in _files(paths, problems):
        try:
            datasets.append(_read(path, limit, as_text=as_text))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(join_problems(problems))
    return datasets


def _files(paths: Sequence[str], problems: list[str]) -> list[Path]:
    found: dict[Path, None] = {}
    for given in paths:
        folder = Path(given)
        if folder.is_dir():
            matches = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".jsonl")
        else:
            matches = [Path(name) for name in sorted(glob.glob(given))]
        if not matches:
            problems.append(f"--data {given}: expected a .jsonl file, a folder of them or a pattern, found nothing")
        found |= dict.fromkeys(matches)
    return list(found)


def _read(path: Path, limit: int | None, *, as_text: bool) -> Dataset:
    prefix = path.stem.split("_")[0]
    if prefix not in _READERS:
        known = ", ".join(f"{name}_" for name in _READERS)
        raise ConfigError(f"{path.name}: expected a name that begins with {known} to tell its task")
    kind, reader = ("text", _joined) if as_text else _READERS[prefix]
    try:
        records = list(read_records(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ConfigError(f"{path.name}: {error}") from error
    if not records:
        raise ConfigError(f"{path.name}: expected at least one line, got an empty file")
    numbers = range(len(records)) if limit is None else _spread(len(records), limit)
    return Dataset(name=path.stem, kind=kind, items=tuple(_item(path, *records[number], reader) for number in numbers))


def _spread(count: int, limit: int) -> list[int]:
    return [int(number) for number in np.linspace(0, count - 1, min(limit, count)).round()]


def _item(path: Path, where: str, record: Any, reader: Reader) -> Item:
    try:
        item = reader(record)
        for text in (item.context, *item.answers, *item.contexts):
            if not isinstance(text, str):
                raise ValueError("expected texts, got other values")
            check_text(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"{path.name} {where}: not a record of its kind ({reason})") from error
    return item
