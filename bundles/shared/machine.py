"""What this machine can do."""

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

__all__ = ["bf16_products_are_faster", "cpu_multiplies_bf16", "give_back_heap", "usable_cores"]


def cpu_multiplies_bf16(root: Path = Path("/")) -> bool:
    """Whether the CPU multiplies bfloat16 natively; emulated, it is slower than float32.

    Args:
        root: where /proc is.
    """
    found = _cpu_info(root)
    return "avx512_bf16" in found or "amx_bf16" in found


def bf16_products_are_faster(root: Path = Path("/")) -> bool:
    """Whether large products of bfloat16 take less time than those of float32.

    They do with AMX. Of AVX-512 alone, AMD's Zen 4 multiplies bfloat16 at 2.2 times the speed of float32, and an Intel
    Emerald Rapids at 0.57 of it: there one unit has the instruction, and two multiply float32.

    Args:
        root: where /proc is.
    """
    found = _cpu_info(root)
    return "amx_bf16" in found or ("avx512_bf16" in found and "GenuineIntel" not in found)


def _cpu_info(root: Path) -> str:
    """What Linux says of the CPUs; nothing where there is no such file."""
    return _read(root / "proc/cpuinfo") or ""


def usable_cores(root: Path = Path("/")) -> int:
    """Count the physical cores that this process may keep busy: the default for threads everywhere.

    A second thread on a core adds no memory bandwidth. A container's quota of CPU time counts as that many cores,
    rounded
    up: more threads than that use it up early and then all stand still until the next period.

    Args:
        root: where /proc and /sys are.
    Returns:
        At least 1.
    """
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_core_of(root, cpu) for cpu in cpus}
    return max(1, min([len(cores), *(math.ceil(quota) for quota in _quotas(root))]))


def _core_of(root: Path, cpu: int) -> str:
    return _read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu)


def _quotas(root: Path) -> Iterator[float]:
    """Return the limits of CPU time, in CPUs, of the process's control groups and of those around them."""
    mounts = root / "sys/fs/cgroup"
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        # hierarchy:controllers:path; version 2 has no controllers here.
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            folders = [mounts, mounts / "unified"]
        elif "cpu" in controllers.split(","):
            folders = [mounts / controllers, mounts / "cpu"]
        else:
            continue
        # In a container the path may be the host's, which no folder has here: the group itself is what is mounted.
        groups = [PurePosixPath(path), *PurePosixPath(path).parents]
        for group in {folder / str(part).lstrip("/") for folder in folders for part in groups}:
            yield from _quota(group)


def _quota(group: Path) -> Iterator[float]:
    """Return the limit of one control group, by either version's files; none where there is no limit."""
    both = _read(group / "cpu.max") or f"{_read(group / 'cpu.cfs_quota_us')} {_read(group / 'cpu.cfs_period_us')}"
    quota, _, period = both.partition(" ")
    # "max" and -1 are no limit.
    if quota.isdigit() and period.isdigit() and int(quota) and int(period):
        yield int(quota) / int(period)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def give_back_heap() -> None:
    """Return free heap memory to the system, if its C library can: glibc keeps it for later."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
