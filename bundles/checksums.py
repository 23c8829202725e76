"""SHA-256 of files."""

import hashlib
from pathlib import Path

from .pages import forget_pages, map_file, populate

__all__ = ["file_sha256", "mapped_sha256", "passing_sha256"]

_CHUNK_BYTES = 1 << 22
# Several files are hashed at once.
_PASSING_BYTES = 1 << 20


def file_sha256(path: Path) -> str:
    """Hash a file's bytes, as hex.

    Raises:
        OSError: it is missing or cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def passing_sha256(path: Path) -> str:
    """Hash a file of which no page is to stay in memory.

    Raises:
        OSError: it is missing or cannot be read.
    """
    digest, start = hashlib.sha256(), 0
    chunk = memoryview(bytearray(_PASSING_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(chunk):
            digest.update(chunk[:count])
            forget_pages(file.fileno(), start=start, num_bytes=count)
            start += count
        forget_pages(file.fileno())
    return digest.hexdigest()


def mapped_sha256(path: Path) -> str:
    """Hash a file where its pages lie, in the form in which they will be mapped; see pages.py.

    All in one call, which does not hold Python's lock: between two chunks it would wait for other threads.

    Raises:
        OSError: it is missing or cannot be read.
    """
    try:
        with map_file(path) as mapped:
            populate(mapped)
            return hashlib.sha256(mapped).hexdigest()
    except (OSError, ValueError):
        # A read says what is wrong, where the access to a page that is not to be had ends the process.
        return file_sha256(path)
