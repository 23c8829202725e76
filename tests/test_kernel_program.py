import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
COMPILER = os.environ.get("CXX", "g++")


def builds(options: list[str], folder: Path) -> bool:
    """Whether the compiler has these options and what they link."""
    source = folder / "nothing.cpp"
    source.write_text("int main() {}", encoding="utf-8")
    command = [COMPILER, *options, str(source), "-o", str(folder / "nothing")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler here")
@pytest.mark.parametrize("options", [[], SANITIZERS], ids=["optimized", "sanitized"])
def test_kernels_and_threads_pass_the_kernel_test(options: list[str], tmp_path: Path) -> None:
    if not builds(options, tmp_path):
        pytest.skip(f"{COMPILER} does not build with {' '.join(options)}")
    # Python's own environment may preload what the sanitizers must come before.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = ["bash", str(ROOT / "tools" / "test-kernels.sh"), *options]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    for line in ("deals: whole", "waits: kept", "forks: work", "portable: agrees"):
        assert line in run.stdout
