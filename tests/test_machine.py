"""How many cores a process may keep busy: by affinity, and by the quota of its control groups."""

import os
from pathlib import Path

import pytest
from coreinfer.bundles.shared.machine import bf16_products_are_faster, cpu_multiplies_bf16, usable_cores

Files = dict[str, str]

UNLIMITED = "max 100000"
V2: Files = {"proc/self/cgroup": "0::/pod/box\n"}
V1: Files = {"proc/self/cgroup": "7:cpuset:/box\n4:cpu,cpuacct:/pod/box\n1:name=systemd:/box\n"}
V1_GROUP = "sys/fs/cgroup/cpu,cpuacct/pod/box/cpu.cfs"


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


def machine(root: Path, files: Files) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="ascii")
    return root


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({**V2, "sys/fs/cgroup/pod/box/cpu.max": f"{UNLIMITED}\n"}, 8),
        ({**V2, "sys/fs/cgroup/pod/box/cpu.max": "200000 100000\n"}, 2),
        ({**V2, "sys/fs/cgroup/pod/box/cpu.max": "150000 100000\n"}, 2),
        ({**V2, "sys/fs/cgroup/pod/box/cpu.max": "10000 100000\n"}, 1),
        ({**V2, "sys/fs/cgroup/pod/box/cpu.max": "6400000 100000\n"}, 8),
        # The group around it has less.
        ({**V2, "sys/fs/cgroup/pod/box/cpu.max": UNLIMITED, "sys/fs/cgroup/pod/cpu.max": "300000 100000\n"}, 3),
        # In a container: the path is the host's, the group is what is mounted.
        ({**V2, "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 20000\n"}, 3),
        ({"proc/self/cgroup": "0::/box\n", "sys/fs/cgroup/unified/box/cpu.max": "50000 20000\n"}, 3),
        ({**V1, f"{V1_GROUP}_quota_us": "-1\n", f"{V1_GROUP}_period_us": "100000\n"}, 8),
        ({**V1, f"{V1_GROUP}_quota_us": "350000\n", f"{V1_GROUP}_period_us": "100000\n"}, 4),
        (
            {
                "proc/self/cgroup": "4:cpu:/docker/77\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
        # What cannot be read as numbers is no limit.
        ({**V2, "sys/fs/cgroup/pod/box/cpu.max": "many 100000\n"}, 8),
        ({**V2, "sys/fs/cgroup/pod/box/cpu.max": "100000 0\n"}, 8),
        ({"proc/self/cgroup": "nonsense\n", "sys/fs/cgroup/cpu.max": "100000\n"}, 8),
    ],
)
def test_quota_of_cpu_time_counts_as_cores(files: Files, cores: int, tmp_path: Path) -> None:
    assert usable_cores(machine(tmp_path, files)) == cores


def test_two_threads_of_a_core_are_one_core(tmp_path: Path) -> None:
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    files = {topology.format(cpu): f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}\n" for cpu in range(8)}
    assert usable_cores(machine(tmp_path, files)) == 4
    assert usable_cores(machine(tmp_path, {**V2, "sys/fs/cgroup/cpu.max": "300000 100000\n"})) == 3


def test_affinity_bounds_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5})
    assert usable_cores(machine(tmp_path, {**V2, "sys/fs/cgroup/cpu.max": "300000 100000\n"})) == 1


@pytest.mark.parametrize(
    ("vendor", "flags", "multiplies", "faster"),
    [
        ("AuthenticAMD", "avx2 fma", False, False),
        ("AuthenticAMD", "avx512f avx512_bf16", True, True),
        ("GenuineIntel", "avx512f avx512_vnni", False, False),
        ("GenuineIntel", "avx512f avx512_bf16", True, False),
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16", True, True),
    ],
)
def test_bf16_is_taken_where_its_products_are_faster(
    vendor: str, flags: str, multiplies: bool, faster: bool, tmp_path: Path
) -> None:
    root = machine(tmp_path, {"proc/cpuinfo": f"processor: 0\nvendor_id: {vendor}\nflags: {flags}\n"})
    assert cpu_multiplies_bf16(root) == multiplies
    assert bf16_products_are_faster(root) == faster


def test_a_machine_that_says_nothing_of_its_cpus_multiplies_float32(tmp_path: Path) -> None:
    assert not cpu_multiplies_bf16(tmp_path)
    assert not bf16_products_are_faster(tmp_path)
