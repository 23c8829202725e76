"""What all commands share: one line for an expected error, exit codes, logging."""

import functools
import logging
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn, ParamSpec

import click

from .errors import CoreInferError

__all__ = ["EXIT_ERROR", "EXIT_INTERRUPTED", "command_errors", "start_logging"]

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

P = ParamSpec("P")


def command_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Wrap a command: expected errors become one line on stderr and exit code 2, Ctrl-C and SIGTERM exit code 130."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            command(*args, **kwargs)
        except CoreInferError as error:
            fail(" ".join(str(error).split()), EXIT_ERROR)
        except KeyboardInterrupt:
            fail("interrupted; nothing was left behind", EXIT_INTERRUPTED)
        except BrokenPipeError:
            # The reader of stdout went away (`coreinfer-run ... | head`): nothing to report, and nothing to flush.
            sys.stderr.close()
            sys.exit(EXIT_ERROR)

    return wrapped


def fail(message: str, code: int) -> NoReturn:
    """Print one line on stderr and exit."""
    click.echo(f"error: {message}", err=True)
    sys.exit(code)


def start_logging(*, verbose: bool) -> None:
    """Send the library's log to stderr: warnings always, progress remarks with `verbose`."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("coreinfer").setLevel(logging.INFO if verbose else logging.WARNING)
    if not verbose:
        # Each failed try to reach the Hub is two lines here; what came of them is one line of ours.
        logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)


def _interrupt(signum: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt
