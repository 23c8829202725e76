"""What an error and those that led to it say, such as that memory ran out."""

import errno
from collections.abc import Iterator

from coreinfer.bundles.errors import CoreInferError

__all__ = ["is_out_of_memory", "led_to"]

_WORDS = (
    # Of torch's allocators, C++, the system, the loader of libraries, and threads that get no stack.
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "cannot allocate memory",
    "failed to map segment",
    "can't start new thread",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that led to it, says that memory ran out."""
    return any(_says_so(each) for each in led_to(error))


def led_to(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, the one that it was raised for, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def _says_so(error: BaseException) -> bool:
    if isinstance(error, CoreInferError):
        # What we say on purpose of memory, such as of a limit that was asked for, is said already.
        return False
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return any(words in str(error).lower() for words in _WORDS)
