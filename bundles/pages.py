"""Memory-mapped files, in huge pages where the system can.

Decoding reads every weight once a token: in pages of 4 KiB, looking up addresses takes a share of that time (figures in
docs/dev/log.md). Linux keeps file pages in huge ones where the file system has large folios (ext4 since 6.16, XFS,
Btrfs), transparent huge pages are "madvise" or "always", and the pages were not in memory in another form before.
"""

import mmap
import os
from contextlib import suppress
from pathlib import Path

__all__ = ["forget_mapped", "forget_pages", "map_file", "populate", "touch"]

# Linux 5.14; Python has no name for it.
_MADV_POPULATE_READ = 22
_HUGE_BYTES = 2 << 20


def map_file(path: Path) -> mmap.mmap:
    """Map a file privately (copy on write), so that frameworks which want writable memory can wrap it.

    Raises:
        OSError, ValueError: it is missing, cannot be mapped, or is empty.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    _advise(mapped, "MADV_HUGEPAGE")
    return mapped


def populate(mapped: mmap.mmap) -> None:
    """Bring a mapping's pages into memory, before anything reads the file and they come in another form.

    Raises:
        OSError: a page cannot be read, or the system cannot do this.
    """
    mapped.madvise(_MADV_POPULATE_READ)


def touch(mapped: mmap.mmap) -> None:
    """Read a byte of each huge page: asking for pages with MADV_WILLNEED would bring small ones."""
    for position in range(0, len(mapped), _HUGE_BYTES):
        mapped[position]


def forget_pages(descriptor: int, *, start: int = 0, num_bytes: int = 0) -> None:
    """Drop the cached pages of a file, from `start` on `num_bytes` or all: when read again, they can be huge pages."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, num_bytes, os.POSIX_FADV_DONTNEED)


def forget_mapped(mapped: mmap.mmap, path: Path) -> None:
    """Take a mapping's pages out of memory; of those that another process has mapped, out of this one's."""
    _advise(mapped, "MADV_DONTNEED")
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            forget_pages(descriptor)
        finally:
            os.close(descriptor)


def _advise(mapped: mmap.mmap, name: str) -> None:
    # A hint: systems without huge pages refuse it, and nothing is lost but speed.
    if hasattr(mmap, name):
        with suppress(OSError):
            mapped.madvise(getattr(mmap, name))
