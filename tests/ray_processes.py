"""The processes of replicas, to stop and kill them."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["replica_processes", "run_until", "stopped"]


def replica_processes(server_id: int) -> list[int]:
    """The processes of replicas that descend from a server."""
    parents, replicas = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if (folder / "cmdline").read_bytes().startswith(b"ray::ServeReplica"):
                replicas.append(int(folder.name))
    return sorted(number for number in replicas if _descends(number, server_id, parents))


def _descends(number: int, ancestor: int, parents: dict[int, int]) -> bool:
    while number in parents:
        if number == ancestor:
            return True
        number = parents[number]
    return False


def _send(sent: signal.Signals, processes: list[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, sent)


@contextmanager
def stopped(processes: list[int]) -> Iterator[None]:
    """Stop processes in the block; those that were killed there stay dead."""
    _send(signal.SIGSTOP, processes)
    try:
        yield
    finally:
        _send(signal.SIGCONT, processes)


def run_until(holds: Callable[[], bool], processes: list[int], seconds: float = 30.0) -> bool:
    """Let stopped processes go on in short slices, so that a fast machine is not done with everything by then."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        _send(signal.SIGCONT, processes)
        time.sleep(0.02)
        _send(signal.SIGSTOP, processes)
        # What was sent before the stop arrives meanwhile.
        time.sleep(0.05)
    return True
