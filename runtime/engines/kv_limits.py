"""How many pages the KV cache of a decoder has: under a limit, or with free memory."""

import os
from contextlib import suppress
from pathlib import Path

from coreinfer.bundles import ConfigError

__all__ = ["PAGE_TOKENS", "count_pages", "free_memory_bytes", "pages_of"]

PAGE_TOKENS = 64
"""Tokens of a page, in every engine."""
_MOST_CONTEXTS, _MOST_SHORT_PAGES = 64, 1024
_MOST_PAGES = 2**24
"""A thousand million tokens: no limit asks for more."""
_MEMORY = Path("/proc/meminfo")
# Of the process's own group: what it may take, and what it has taken.
_GROUP_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def pages_of(num_tokens: int) -> int:
    """Number of pages that some tokens of a sequence take."""
    return -(-num_tokens // PAGE_TOKENS)


def count_pages(kv_cache_bytes: int | None, *, page_bytes: int, max_positions: int) -> int:
    """Count the pages of a KV cache.

    Args:
        kv_cache_bytes: the limit; None for half of the free memory, but no more than 64 whole contexts (or 1,024 pages
            where contexts are short) and no less than a page.
        page_bytes: keys and values of a page.
        max_positions: tokens of a whole context.
    Raises:
        ConfigError: the limit is smaller than a page.
    """
    if kv_cache_bytes is None:
        most = max(_MOST_CONTEXTS * pages_of(max_positions), _MOST_SHORT_PAGES)
        return max(1, min(most, free_memory_bytes() // 2 // page_bytes))
    if kv_cache_bytes < page_bytes:
        raise ConfigError(
            f"kv_cache_mb: expected at least {page_bytes / 1e6:.3g} MB, a page of {PAGE_TOKENS} tokens, got "
            f"{kv_cache_bytes / 1e6:.3g}; raise it"
        )
    return min(kv_cache_bytes // page_bytes, _MOST_PAGES)


def free_memory_bytes() -> int:
    """Bytes of memory that this process could still take: of the machine's, and of its group's where that is less."""
    free = [_machine_bytes()]
    for limit, taken in _GROUP_LIMITS:
        # "max" is no number: there is no limit.
        with suppress(OSError, ValueError):
            free.append(max(0, int(limit.read_text(encoding="ascii")) - int(taken.read_text(encoding="ascii"))))
    return min(free)


def _machine_bytes() -> int:
    with suppress(OSError):
        for line in _MEMORY.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
