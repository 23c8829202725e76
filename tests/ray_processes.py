"""The processes of replicas, to stop and kill them."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["replica_processes", "stopped"]


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


@contextmanager
def stopped(processes: list[int]) -> Iterator[None]:
    """Stop processes in the block; those that were killed there stay dead."""
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)
