"""The file of a batch's answers: one line each, whole, and read again where an interrupted batch goes on."""

import fcntl
import json
import os
import stat
from array import array
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from coreinfer.bundles.errors import ConfigError

from .batch_lines import Line, hashed, parse

__all__ = ["AnswerFile", "digest_of"]

Hashes = npt.NDArray[np.uint64]

_DIGEST_BYTES = 8
_ANOTHER = "give another file with -o"


def digest_of(salt: str, line: Line) -> str:
    """What stands for a line, the options that it gets and the bundle: the same where the answer would be.

    Args:
        salt: says by whom and how lines are answered.
    """
    salt_bytes = blake2b(salt.encode(), digest_size=16).digest()
    return blake2b(line.text, digest_size=_DIGEST_BYTES, salt=salt_bytes).hexdigest()


class AnswerFile:
    """What was answered and what is answered now. Memory: 16 bytes for each answer that is there already.

    Attributes:
        num_failed: lines with an error, those of earlier times too.
    """

    def __init__(self, path: Path, salt: str) -> None:
        """Open the file, or make it, and read what is there.

        Args:
            salt: says by whom and how lines are answered.
        Raises:
            ConfigError: it cannot be used, holds something else than answers, or another process writes it.
        """
        self._path, self._salt = path, salt
        self.num_failed = 0
        self._file = _open(path)
        try:
            self._keys, self._digests = self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def digest(self, line: Line) -> str:
        """See `digest_of`."""
        return digest_of(self._salt, line)

    def has(self, line: Line) -> bool:
        """Whether a line was answered before.

        Raises:
            ConfigError: one with its id was, which asked for something else.
        """
        key = np.uint64(hashed(line.id))
        place = int(np.searchsorted(self._keys, key))
        if place == len(self._keys) or self._keys[place] != key:
            return False
        if int(self._digests[place]) != int(self.digest(line), 16):
            raise ConfigError(
                f"-o {self._path}: it has an answer for id {line.id!r}, to which {line.where} of the batch, the "
                f"options or the bundle were different; take that line out of it to have it answered again, or "
                f"{_ANOTHER}"
            )
        return True

    def write(self, result: Mapping[str, Any], *, failed: bool) -> None:
        """Add a line and hand it to the system at once."""
        self._file.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.num_failed += failed

    @property
    def num_before(self) -> int:
        """Answers that were there when it was opened."""
        return len(self._keys)

    def _read(self) -> tuple[Hashes, Hashes]:
        """Give keys in order, and the digests that go with them; drop a last line that was cut."""
        keys, digests = array("Q"), array("Q")
        end = 0
        for number, text in enumerate(self._file, start=1):
            if not text.endswith(b"\n"):
                self._check_cut(number, text)
                break
            key, digest, failed = self._parsed(number, text)
            keys.append(key)
            digests.append(digest)
            self.num_failed += failed
            end += len(text)
        self._file.seek(end)
        self._file.truncate()
        order = np.argsort(np.frombuffer(keys, dtype=np.uint64), kind="stable")
        return np.frombuffer(keys, dtype=np.uint64)[order], np.frombuffer(digests, dtype=np.uint64)[order]

    def _parsed(self, number: int, text: bytes) -> tuple[int, int, bool]:
        try:
            value = parse(text)
            is_openai = "custom_id" in value
            digest = value["id"].removeprefix("batch_req_") if is_openai else value["request"]
            if len(digest) != 2 * _DIGEST_BYTES:
                raise ValueError("no digest")
            return hashed(value["custom_id" if is_openai else "id"]), int(digest, 16), bool(value.get("error"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._refusal(number, text) from error

    def _check_cut(self, number: int, text: bytes) -> None:
        """Of what is no cut answer not a byte is thrown away: all answers begin alike, and these are not whole."""
        start = b'{"id": '
        if not (text.startswith(start) or start.startswith(text)):
            raise self._refusal(number, text)
        try:
            parse(text)
        except ValueError:
            return
        self._parsed(number, text)

    def _refusal(self, number: int, text: bytes) -> ConfigError:
        shown = text[:40].decode(errors="replace")
        return ConfigError(f"-o {self._path}: line {number}: expected an answer of --batch, got {shown!r}; {_ANOTHER}")


def _open(path: Path) -> BinaryIO:
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    except (OSError, ValueError) as error:
        raise ConfigError(f"-o {path}: cannot be written ({error}); {_ANOTHER}") from error
    try:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ConfigError(f"-o {path}: expected a file, which an interrupted batch reads again; {_ANOTHER}")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConfigError(f"-o {path}: another process is writing it ({error}); wait for it, or {_ANOTHER}") from error
    except BaseException:
        file.close()
        raise
    return file
