import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
COMPILER = os.environ.get("CXX", "g++")


def sanitizers(folder: Path) -> list[str]:
    """The compiler's options for them, none where it comes without."""
    source = folder / "nothing.cpp"
    source.write_text("int main() {}", encoding="utf-8")
    command = [COMPILER, *SANITIZERS, str(source), "-o", str(folder / "nothing")]
    return SANITIZERS if subprocess.run(command, capture_output=True, check=False).returncode == 0 else []


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler here")
def test_kernels_and_threads_pass_the_kernel_test(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "tools" / "test-kernels.sh"), *sanitizers(tmp_path)]
    # Python's own environment may preload what the sanitizers must come before.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "deals: whole" in run.stdout
    assert "waits: kept" in run.stdout
    assert "portable: agrees" in run.stdout
