"""Control groups of Linux that limit the memory of a process, in version 1 or 2, and forgetting files before a run."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import click

__all__ = ["MemoryGroup", "forget_files", "memory_group"]

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class MemoryGroup:
    """A group that processes can be put into.

    Attributes:
        folder: where the system shows it.
        peak_name: file with the most bytes that it had.
    """

    folder: Path
    peak_name: str

    def command(self, command: Sequence[str]) -> list[str]:
        """The command that runs another one in the group: all that it reads and allocates is charged to the group."""
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs"), *command]

    @property
    def peak_bytes(self) -> int | None:
        """The most memory that it had, page cache included; None where the system does not say."""
        with suppress(OSError):
            return int((self.folder / self.peak_name).read_text(encoding="ascii"))
        return None


@contextmanager
def memory_group(name: str, limit_bytes: int | None) -> Iterator[MemoryGroup]:
    """Make a group, and remove it at the end.

    Args:
        limit_bytes: of anonymous memory and page cache together; None for no limit.
    Raises:
        click.ClickException: the system has no such groups, or this user may not make them.
    """
    is_second = (_ROOT / "cgroup.controllers").exists()
    folder = (_ROOT if is_second else _ROOT / "memory") / name
    limits = {"memory.max": limit_bytes, "memory.swap.max": 0} if is_second else {"memory.limit_in_bytes": limit_bytes}
    try:
        if is_second:
            (_ROOT / "cgroup.subtree_control").write_text("+memory", encoding="ascii")
        folder.mkdir()
    except OSError as error:
        raise click.ClickException(
            f"cannot make a memory cgroup at {folder} ({error.strerror}): run as root, where cgroup v2 with the memory "
            "controller or v1's memory hierarchy is mounted at /sys/fs/cgroup"
        ) from error
    try:
        for file, value in limits.items():
            # A kernel without swap has no file for it.
            if value is not None and (folder / file).exists():
                (folder / file).write_text(str(value), encoding="ascii")
        yield MemoryGroup(folder=folder, peak_name="memory.peak" if is_second else "memory.max_usage_in_bytes")
    finally:
        folder.rmdir()


def forget_files(path: Path) -> None:
    """Drop the page cache of a file or of all files of a folder, so that whoever reads them is charged for them."""
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
