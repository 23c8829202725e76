"""What all commands share: one line for an expected error, exit codes, logging."""

import errno
import functools
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, ParamSpec

import click
from coreinfer.bundles.errors import CoreInferError

from .exhaustion import is_out_of_memory, led_to
from .starting import EXIT_INTERRUPTED, INTERRUPTED, leave

__all__ = ["EXIT_ERROR", "EXIT_INTERRUPTED", "command_errors", "errors_on_one_line", "fail", "start_logging"]

EXIT_ERROR = 2
# Of files that were opened already, such as stdout: errors of opening name their file.
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)

P = ParamSpec("P")


def command_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Wrap a command: expected errors become one line on stderr and exit code 2, Ctrl-C and SIGTERM exit code 130."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        signal.signal(signal.SIGTERM, _interrupt)
        if signal.getsignal(signal.SIGINT) is leave:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with errors_on_one_line():
            command(*args, **kwargs)

    return wrapped


@contextmanager
def errors_on_one_line() -> Iterator[None]:
    """End the process with one line if the block raises an expected error, or its output cannot be written."""
    try:
        try:
            yield
        finally:
            # Here, because at the interpreter's end nobody could tell of it.
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        fail(INTERRUPTED, EXIT_INTERRUPTED)
    except Exception as error:
        if any(isinstance(each, KeyboardInterrupt) for each in led_to(error)):
            # Imports make other errors of it.
            fail(INTERRUPTED, EXIT_INTERRUPTED)
        if isinstance(error, OSError) and error.filename is None and error.errno in _WRITE_ERRORS:
            _drop_output()
            # The reader of stdout went away (`coreinfer-run ... | head`): nothing to report.
            sys.exit(EXIT_ERROR) if isinstance(error, BrokenPipeError) else fail(_unwritten(error), EXIT_ERROR)
        if is_out_of_memory(error):
            fail(_exhausted(error), EXIT_ERROR)
        if isinstance(error, CoreInferError):
            fail(str(error), EXIT_ERROR)
        raise


def fail(message: str, code: int) -> NoReturn:
    """Print one line on stderr and exit."""
    with suppress(OSError):
        click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(code)


def _drop_output() -> None:
    """Let what is still to be written go nowhere, for the interpreter's end to be quiet."""
    with suppress(OSError, io.UnsupportedOperation):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _unwritten(error: OSError) -> str:
    return f"output cannot be written ({error.strerror}); make room for it, or write it elsewhere"


def _exhausted(error: BaseException) -> str:
    return f"memory ran out ({str(error) or type(error).__name__}); free some, raise its limit or take a smaller model"


def start_logging(*, verbose: bool) -> None:
    """Send the library's log to stderr: warnings always, progress remarks with `verbose`."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("coreinfer").setLevel(logging.INFO if verbose else logging.WARNING)
    if not verbose:
        # Each failed try to reach the Hub is two lines here; what came of them is one line of ours.
        logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)


def _interrupt(signum: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt
