"""Read text and JSON records as people save them: with or without a byte order mark, by line or as one array."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["check_text", "decode_text", "parse_records", "read_records", "read_text"]

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"(\xb5/\xfd": "zstandard",
    b"PK\x03\x04": "zip",
}


def read_text(path: Path) -> str:
    """Read a file of text; see `decode_text`.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else.
    """
    return decode_text(path.read_bytes())


def decode_text(data: bytes) -> str:
    """Decode UTF-8, or UTF-16 that begins with its mark; line ends become one character.

    Raises:
        ValueError: it is something else; the message says what, and what to do.
    """
    for start, kind in _COMPRESSED.items():
        if data.startswith(start):
            raise ValueError(f"is compressed ({kind}); unpack it first")
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line}: expected UTF-8, got other bytes ({error.reason}); save it as UTF-8") from error
    if (place := text.find("\0")) >= 0:
        raise ValueError(f"line {text[:place].count(chr(10)) + 1}: expected text, got a NUL byte; take it out")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Read a file of JSON values; see `parse_records`.

    Raises:
        OSError: the file cannot be read.
    """
    yield from parse_records(read_text(path))


def parse_records(text: str) -> Iterator[tuple[str, Any]]:
    """Parse the values of JSON Lines, or of one JSON array.

    Yields:
        Where a value stands, such as "line 3", and the value; blank lines are left out.
    Raises:
        ValueError: it is no such text; the message says where, and what to do.
    """
    if text.lstrip().startswith("["):
        values = _parsed(text, "")
        yield from ((f"item {number}", value) for number, value in enumerate(values, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"line {number}", _parsed(line, f"line {number}: ")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}no JSON ({error})") from error


def check_text(text: str) -> None:
    """Refuse text that no tokenizer takes.

    Raises:
        ValueError: it has half a character, as JSON can spell it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(
            f"expected whole characters, got half of one ({half}) at character {error.start + 1}; take it out"
        ) from error
