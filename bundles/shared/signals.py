"""Signals that wait."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["signals_held"]


@contextmanager
def signals_held() -> Iterator[None]:
    """Have Ctrl-C and SIGTERM wait for the end of the block.

    For imports of C++ modules such as torch's: an exception in the middle of one that calls Python ends the process
    by `terminate`, without a word that anybody understands.
    """
    if threading.current_thread() is not threading.main_thread():
        # Signals are handled in the main thread, whatever this one does.
        yield
        return
    caught: list[int] = []
    # What is ignored, or handled by C code, stays so.
    handlers = {
        signum: handler for signum in (signal.SIGINT, signal.SIGTERM) if callable(handler := signal.getsignal(signum))
    }
    for signum in handlers:
        signal.signal(signum, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        for number in caught:
            signal.raise_signal(number)
