import os
import subprocess
from pathlib import Path

import pytest

from .c_library import COMPILERS, ROOT, build_library, has_compilers

# They find the same in code that is hardly optimized, which is compiled in half the time.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1"]
# AMX's kernels too on every CPU with AVX-512: what they read of memory is checked.
EMULATED_TILES = ["-DCOREINFER_EMULATE_TILES", "-include", "tools/kernel_tests/emulated_tiles.h"]

pytestmark = pytest.mark.skipif(not has_compilers(), reason="no C or C++ compiler here")


def builds(options: list[str], folder: Path) -> bool:
    """Whether the compiler has these options and what they link."""
    source = folder / "nothing.cpp"
    source.write_text("int main() {}", encoding="utf-8")
    command = [*COMPILERS[0], *options, str(source), "-o", str(folder / "nothing")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def check_kernels(*options: str, **variables: str) -> None:
    # Python's own environment may preload what the sanitizers must come before.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = ["bash", str(ROOT / "tools" / "test-kernels.sh"), *options]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env={**environment, **variables})
    assert run.returncode == 0, run.stdout + run.stderr
    for line in ("deals: whole", "waits: kept", "forks: work", "portable: agrees"):
        assert line in run.stdout


def test_optimized_kernels_and_threads_pass_the_kernel_test() -> None:
    """As they are shipped: the C library's objects, of the same sources."""
    check_kernels(OBJECTS=str(build_library() / "objects"))


def test_sanitized_kernels_and_threads_pass_the_kernel_test(tmp_path: Path) -> None:
    if not builds(SANITIZERS, tmp_path):
        pytest.skip(f"{COMPILERS[0][0]} does not build with {' '.join(SANITIZERS)}")
    check_kernels(*SANITIZERS, *EMULATED_TILES)
