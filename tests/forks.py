"""Processes that are forked from a test."""

import os
import signal
from collections.abc import Callable

import pytest
from coreinfer.bundles import CoreInferError

__all__ = ["CHILD_SECONDS", "in_fork", "refusal_in_fork"]

CHILD_SECONDS = 20


# From Python 3.12 on a fork beside other threads is warned of: it is what is tested here.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def in_fork(work: Callable[[], str]) -> str:
    """What a forked process says; ends it where it hangs."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(CHILD_SECONDS)
        try:
            os.write(writer, work().encode())
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        said = file.read().decode()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child ended by signal {status}"
    return said


def refusal_in_fork(work: Callable[[], object]) -> str:
    """What a forked process is refused with; empty if it is not."""

    def refused() -> str:
        try:
            work()
        except CoreInferError as error:
            return str(error)
        return ""

    return in_fork(refused)
