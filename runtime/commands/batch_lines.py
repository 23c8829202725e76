"""Lines of a batch file: requests in JSON Lines, each with an id by which its answer is found again."""

import codecs
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.shared.text_files import check_text

__all__ = [
    "Line",
    "Place",
    "count_lines",
    "hashed",
    "id_of",
    "is_openai",
    "parse",
    "placed_lines",
    "read_lines",
    "read_piece",
]

LineId = str | int
Value = Mapping[str, Any]

Place = tuple[int, int]
"""The number of a line in its file, from 1, and its first byte, from 0."""

_OPENAI_KEYS = ("custom_id", "url", "body")


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line that is not blank.

    Attributes:
        number: its number in the file, from 1.
        text: as it stands there, without blanks around it.
        id: its own, or its number where it has none or cannot be read.
        value: what it says; None where `problem` says why not.
    """

    number: int
    text: bytes
    id: LineId
    value: Value | None = None
    problem: str | None = None

    @property
    def where(self) -> str:
        """Where it stands, for people."""
        return f"line {self.number}"


def read_lines(path: Path) -> Iterator[Line]:
    """Read one line after another."""
    return (line for _, line in placed_lines(path))


def placed_lines(path: Path) -> Iterator[tuple[Place, Line]]:
    """Read one line after another, each with its place."""
    with path.open("rb") as file:
        start = 0
        for number, text in enumerate(file, start=1):
            if line := _read(number, text):
                yield (number, start), line
            start += len(text)


def read_piece(path: Path, places: Iterable[Place]) -> Iterator[Line]:
    """Read the lines at some places of a file, which is the one that they were found in."""
    with path.open("rb") as file:
        for number, start in places:
            file.seek(start)
            line = _read(number, file.readline())
            assert line is not None, f"{path} was changed meanwhile"
            yield line


def count_lines(path: Path) -> int:
    """Count the lines of a batch file, with 16 bytes of memory for each.

    Raises:
        ConfigError: two have the same id, or there is no request at all.
    """
    keys, numbers, first_problem, num_requests = array("Q"), array("Q"), "there is no line", 0
    for line in read_lines(path):
        keys.append(hashed(line.id))
        numbers.append(line.number)
        num_requests += line.problem is None
        if len(keys) == 1 and line.problem is not None:
            first_problem = line.problem
    if not num_requests:
        raise ConfigError(f"--batch {path}: expected JSON Lines, one request a line, got none; {first_problem}")
    _check_unique(path, keys, numbers)
    return len(keys)


def hashed(line_id: LineId) -> int:
    """Give 64 bits that stand for an id; 7 and "7" are two."""
    return int.from_bytes(blake2b(json.dumps(line_id).encode(), digest_size=8).digest())


def is_openai(value: Value) -> bool:
    """Whether a line has OpenAI's batch form."""
    return any(key in value for key in _OPENAI_KEYS)


def id_of(value: Value) -> object:
    """The id of a line, of any type; None if it has none."""
    return value.get("custom_id") if is_openai(value) else value.get("id")


def parse(text: bytes) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: it is none; the message says what it is.
    """
    try:
        value = json.loads(text.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    if b"\\u" in text:
        check_text(json.dumps(value, ensure_ascii=False))
    return value


def _read(number: int, text: bytes) -> Line | None:
    """Read a line; None if it is blank."""
    # Editors of Windows begin a file with a mark.
    stripped = (text.removeprefix(codecs.BOM_UTF8) if number == 1 else text).strip()
    return _line(number, stripped) if stripped else None


def _line(number: int, text: bytes) -> Line:
    try:
        value = parse(text)
        line_id = _checked_id(value)
    except ValueError as error:
        return Line(number=number, text=text, id=number, problem=f"line {number}: {error}")
    return Line(number=number, text=text, id=number if line_id is None else line_id, value=value)


def _checked_id(value: Value) -> LineId | None:
    found = id_of(value)
    if is_openai(value):
        if not isinstance(found, str):
            raise ValueError(f"custom_id: expected a string, got {found!r}")
        return found
    if found is not None and (not isinstance(found, (str, int)) or isinstance(found, bool)):
        raise ValueError(f"id: expected a string or a whole number, got {found!r}")
    return found


def _check_unique(path: Path, keys: "array[int]", numbers: "array[int]") -> None:
    order = np.argsort(np.frombuffer(keys, dtype=np.uint64), kind="stable")
    in_order = np.frombuffer(keys, dtype=np.uint64)[order]
    if (same := np.flatnonzero(in_order[1:] == in_order[:-1])).size:
        # The earliest line that repeats an id.
        place = int(same[np.argmin(order[same + 1])])
        first, second = (numbers[int(order[at])] for at in (place, place + 1))
        line_id = next(line.id for line in read_lines(path) if line.number == first)
        raise ConfigError(
            f"--batch {path}: lines {first} and {second} have the same id {line_id!r}; give each one of its own "
            "(where a line has none, its number is its id)"
        )


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
